"""The optimizer and schedule of BERT as UNITER and ORIST use them, which differ from PyTorch's in small ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tasks.core.errors import expect

UNDECAYED = ("bias", "LayerNorm.weight", "LayerNorm.bias")  # parts of names: other normalisations decay
LOWEST_LR = 1e-8


class BertAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with epsilon added before the bias correction and weight decay after the update.

    Args:
        params: Parameters or groups of them, which may set the other arguments.
        lr: Learning rate.
        betas: Decay of the running averages of gradient and squared gradient.
        eps: Added to the root of the running average, uncorrected.
        weight_decay: Weights are multiplied by 1 - lr * weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            if updated:
                self._update(updated, group)
        return loss

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        weights: list[Tensor] = list(params)
        grads = [p.grad for p in params if p.grad is not None]
        averages, squares, sizes = [], [], []
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            count = state["step"]
            sizes.append(-lr * math.sqrt(1 - beta2**count) / (1 - beta1**count))
        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, grads, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(weights, averages, roots, sizes)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])


def parameter_groups(
    network: nn.Module, lr: float, weight_decay: float, lr_multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay; `lr_multipliers` are factors by prefix of the name.

    Raises UserError for a prefix of no parameter.
    """
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for prefix in lr_multipliers:
        found = any(name.startswith(f"{prefix}.") for name in names)
        expect("optim.lr_multipliers", prefix, found, "the beginning of a parameter's name, up to a dot")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name in names:
        factors = [factor for prefix, factor in lr_multipliers.items() if name.startswith(f"{prefix}.")]
        decayed = not any(part in name for part in UNDECAYED)
        groups.setdefault((factors[0] if factors else 1.0, decayed), []).append(network.get_parameter(name))
    return [
        {
            "params": params,
            "lr": lr * factor,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": ("base" if factor == 1 else f"{factor:g} x base") + ("" if decayed else " no decay"),
        }
        for (factor, decayed), params in groups.items()
    ]


def linear_factor(update: int, warmup: int, total: int) -> float:
    """Factor on the learning rate of update 1, 2, ...: linear to 1 during `warmup` updates, then linear to 0."""
    if update < warmup:
        return update / warmup
    return (total - update) / max(total - warmup, 1)


def linear_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int, lowest: float = LOWEST_LR) -> LambdaLR:
    """`linear_factor` for every update, never below `lowest`, which heads multiply as they do the rest."""
    expect("optim.warmup_steps", warmup, 0 <= warmup <= total, f"at most the {total} updates of the training")

    base = min(group["lr"] for group in optimizer.param_groups)
    return LambdaLR(optimizer, lambda done: max(base * linear_factor(done + 1, warmup, total), lowest) / base)
