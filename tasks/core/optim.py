"""Parameter groups, optimizer and learning-rate schedule, made by timm from plain values."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch, fnmatchcase
from typing import Any, Literal

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from tasks.core.errors import UserError, expect

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
POSITION_PARAMETERS = ("relative_position_bias_table", "pos_embed")  # also absolute_pos_embed
NO_DECAY_RULES = ("norm_and_embedding", "1d", "none")
SCHEDULES = ("poly", "cosine", "multistep", "constant")


@dataclass
class OptimConfig:
    """Optimizer, schedule and clipping. Schedules run per optimizer update, not per epoch.

    Args:
        optimizer: Name of an optimizer of timm, e.g. ``adamw`` or ``sgd``.
        lr: Learning rate of parameters without multiplier, for a global batch of `reference_batch_size`.
        weight_decay: Weight decay of the parameters that take it, see `no_decay`.
        betas: Running-average coefficients of Adam-like optimizers; None keeps the optimizer's own.
        momentum: Momentum of SGD-like optimizers; None keeps timm's 0.9.
        lr_multipliers: Factor on `lr` by prefix of the parameter name, e.g. ``{backbone: 0.1}``, or by a pattern for
            the whole name, e.g. ``{"*.conv_offset.weight": 0.01}``; the longest key that matches counts. `warmup_lr`
            and `min_lr` are not multiplied, as in torch, mmcv and the code of LIT and LITv2, where offsets at
            ``0.01 * lr = min_lr`` keep one learning rate after the warm-up. A factor of 0 holds parameters still.
        no_decay: Which parameters take no weight decay: ``norm_and_embedding`` (normalisation layers, embeddings and
            position tables; biases do decay), ``1d`` (timm: vectors, biases and the model's own list) or ``none`` (all
            parameters decay).
        layer_decay: Factor on the backbone's whole schedule per layer below the top (1 at the head), as in timm; None
            is off.
        schedule: ``poly``, ``cosine``, ``multistep`` or ``constant``.
        power: Exponent of ``poly``: lr * (1 - update / total)^power.
        milestones: Updates at which ``multistep`` multiplies the learning rate by `gamma`.
        gamma: Factor of ``multistep``.
        warmup_steps: Updates of linear warm-up from `warmup_lr`; they are part of the total.
        warmup_epochs: The same in epochs; a fraction is rounded to whole updates.
        warmup_lr: Learning rate of update 0 under warm-up.
        min_lr: Final learning rate of ``poly`` and ``cosine``.
        clip_grad: Largest global L2 norm of the gradient; None does not clip.
        reference_batch_size: The global batch (samples per process x processes x accumulated batches) that `lr`,
            `warmup_lr` and `min_lr` are given for; with another one all three change in proportion. None leaves them.
    """

    optimizer: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    momentum: float | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    no_decay: Literal["norm_and_embedding", "1d", "none"] = "1d"
    layer_decay: float | None = None
    schedule: Literal["poly", "cosine", "multistep", "constant"] = "cosine"
    power: float = 0.9
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    clip_grad: float | None = None
    reference_batch_size: int | None = None

    def __post_init__(self) -> None:
        # A look-ahead wrapper is part of timm's name: lookahead_adamw.
        base = self.optimizer.lower().rpartition("_")[2]
        known = [str(name) for name in list_optimizers()]
        if not {self.optimizer.lower(), base} & set(known):
            near = difflib.get_close_matches(base, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ", for instance adamw or sgd"
            raise UserError(f"optimizer: {self.optimizer!r} is not an optimizer of timm{hint}")
        expect("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        expect("no_decay", self.no_decay, self.no_decay in NO_DECAY_RULES, f"one of {', '.join(NO_DECAY_RULES)}")
        expect("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        for name in ("weight_decay", "warmup_steps", "warmup_epochs", "warmup_lr", "min_lr", "power", "gamma"):
            value = getattr(self, name)
            expect(name, value, 0 <= value < math.inf, "a number of at least 0")
        if self.warmup_steps and self.warmup_epochs:
            raise UserError(
                f"warmup_epochs: {self.warmup_epochs} was given beside warmup_steps: {self.warmup_steps}, one of them "
                "was expected"
            )
        batch = self.reference_batch_size
        expect("reference_batch_size", batch, batch is None or batch > 0, "a positive number of samples or null")
        for key, factor in self.lr_multipliers.items():
            expect(f"lr_multipliers.{key}", factor, 0 <= factor < math.inf, "a number of at least 0")
            rising_to = self.min_lr if self.schedule in ("poly", "cosine") and factor else 0.0
            fits = rising_to <= self.lr * factor * (1 + 1e-6)  # 0.01 * 1e-3 is a little less than 1e-5
            expect(f"lr_multipliers.{key}", factor, fits, f"a product with lr of at least min_lr ({self.min_lr})")
        expect("layer_decay", self.layer_decay, self.layer_decay is None or 0 < self.layer_decay <= 1, "0 < value <= 1")
        expect("clip_grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "a positive number or null")
        rising = all(a < b for a, b in zip([0, *self.milestones], self.milestones, strict=False))
        expect("milestones", self.milestones, rising, "positive numbers of updates in rising order")
        if self.schedule == "multistep" and not self.milestones:
            raise UserError("milestones: empty; schedule multistep needs the updates at which the learning rate drops")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    lr_multipliers: dict[str, float] | None = None,
    no_decay: Literal["norm_and_embedding", "1d", "none"] = "1d",
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` by learning rate and weight decay; each appears exactly once.

    A group has ``params``, ``lr``, ``weight_decay``, ``name`` and, for timm's schedules, ``initial_lr`` (`lr` times the
    multiplier) and ``lr_scale`` (the factor on the whole schedule). See `OptimConfig` for the arguments. Raises
    UserError for a multiplier that matches no parameter and for `layer_decay` with a backbone that does not number its
    layers.
    """
    multipliers = lr_multipliers or {}
    undecayed = UNDECAYED[no_decay](model)
    layers, depth = _backbone_layers(model) if layer_decay is not None else ({}, 0)
    used: set[str] = set()
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        keys = [key for key in multipliers if _concerns(key, name)]
        used.update(keys)
        if not parameter.requires_grad:
            continue
        key = max(keys, key=len, default=None)
        factor, scale = 1.0 if key is None else multipliers[key], 1.0
        if factor == 0:  # min_lr must not move what is to be held still
            factor, scale = 1.0, 0.0
        label = key or ("backbone" if name in layers else "base")
        if layer_decay is not None and name in layers:
            scale *= layer_decay ** (depth - layers[name])
            label += f" layer {layers[name]}"
        decay = 0.0 if name in undecayed else weight_decay
        if name in undecayed:
            label += " no decay"
        group = groups.setdefault(
            (factor, scale, decay),
            {
                "params": [],
                "lr": lr * factor * scale,
                "weight_decay": decay,
                "name": label,
                "initial_lr": lr * factor,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
    if unused := sorted(set(multipliers) - used):
        names = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
        raise UserError(
            f"lr_multipliers: no parameter starts with or matches {', '.join(unused)}; parameters start with {names}"
        )
    return list(groups.values())


def for_training(config: OptimConfig, global_batch: int, updates_per_epoch: int) -> OptimConfig:
    """`config` with the learning rates of `global_batch` and the warm-up in updates, as the schedule needs them."""
    scale = global_batch / config.reference_batch_size if config.reference_batch_size else 1.0
    return dataclasses.replace(
        config,
        lr=config.lr * scale,
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * scale,
        warmup_steps=config.warmup_steps or round(config.warmup_epochs * updates_per_epoch),
        warmup_epochs=0.0,
        reference_batch_size=None,
    )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Create the optimizer of `config` over `parameter_groups`; raises UserError for arguments it does not take."""
    groups = parameter_groups(
        model,
        config.lr,
        config.weight_decay,
        lr_multipliers=config.lr_multipliers,
        no_decay=config.no_decay,
        layer_decay=config.layer_decay,
    )
    if not groups:
        raise UserError("the network has no trainable parameter: nothing to optimise")
    extra: dict[str, Any] = {"betas": tuple(config.betas)} if config.betas is not None else {}
    if config.momentum is not None:
        extra["momentum"] = config.momentum
    optimizer = create_optimizer_v2(
        groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, **extra
    )
    # timm leaves out what an optimizer does not know; a setting without effect would go unnoticed.
    if unknown := sorted(set(extra) - set(optimizer.defaults)):
        raise UserError(f"{', '.join(unknown)}: optimizer {config.optimizer!r} has no such setting")
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> Scheduler:
    """Create the schedule of `config` over `total_steps` optimizer updates.

    Call ``step_update(updates_done)`` after each update. Raises UserError unless the warm-up fits into a
    positive total.
    """
    expect("the number of training steps", total_steps, total_steps > 0, "at least 1")
    if config.warmup_steps > total_steps:
        raise UserError(
            f"warmup_steps: {config.warmup_steps} is more than the {total_steps} steps of the training (those of "
            "warmup_epochs included)"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=total_steps,
        step_on_epochs=False,
        updates_per_epoch=1,
        decay_rate=config.power if config.schedule == "poly" else config.gamma,
        # timm applies milestone m at update m - 1; ours take effect after m updates, as in torch.
        decay_milestones=[step + 1 for step in config.milestones],
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_steps,
        warmup_lr=config.warmup_lr,
    )
    return scheduler


def _concerns(key: str, name: str) -> bool:
    """Whether a multiplier's key is the parameter's name, a prefix of it that ends at a dot, or a pattern for it."""
    return name == key or name.startswith(key.rstrip(".") + ".") or fnmatchcase(name, key)


def _norm_and_embedding_names(model: nn.Module) -> set[str]:
    """Parameters of normalisation layers and embeddings, and position tables."""
    names = set()
    for prefix, module in model.named_modules():
        whole = isinstance(module, (*NORM_LAYERS, nn.Embedding))
        for leaf, _ in module.named_parameters(recurse=False):
            if whole or leaf.endswith(POSITION_PARAMETERS):
                names.add(f"{prefix}.{leaf}" if prefix else leaf)
    return names


def _timm_undecayed_names(model: nn.Module) -> set[str]:
    """Vectors, biases and what modules list in ``no_weight_decay()`` (names or patterns)."""
    names = {name for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith(".bias")}
    for prefix, module in _modules_with(model, "no_weight_decay"):
        patterns = [prefix + pattern for pattern in module.no_weight_decay()]  # type: ignore[operator]
        names |= {name for name, _ in model.named_parameters() if any(fnmatch(name, p) for p in patterns)}
    return names


UNDECAYED: dict[str, Callable[[nn.Module], set[str]]] = {
    "norm_and_embedding": _norm_and_embedding_names,
    "1d": _timm_undecayed_names,
    "none": lambda model: set(),
}


def _backbone_layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """Layer number of each backbone parameter, and the number of whatever lies above the backbone."""
    backbone = getattr(model, "backbone", model)
    found = next(_modules_with(backbone, "group_matcher"), None)
    if found is None:
        raise UserError(f"layer_decay: {type(backbone).__name__} does not number its layers (it has no group_matcher)")
    inner, body = found
    prefix = ("backbone." if backbone is not model else "") + inner
    layers = group_parameters(body, body.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    numbered = {prefix + name: layer for name, layer in layers.items()}
    above = any(name not in numbered for name, _ in model.named_parameters())
    return numbered, max(numbered.values()) + int(above)


def _modules_with(model: nn.Module, method: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that define `method`, with their name as a prefix ending in a dot."""
    for name, module in model.named_modules():
        if callable(getattr(module, method, None)):
            yield (f"{name}." if name else ""), module
