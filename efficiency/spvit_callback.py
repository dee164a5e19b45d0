"""SPViT's search and the start of its fine-tuning, as a Lightning callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import save
from torch import Tensor

from backbones.spvit_architecture import Architecture
from efficiency.callback import EfficiencyCallback
from efficiency.spvit import (
    convert,
    cost,
    found_architecture,
    is_gated,
    prune,
    prune_plain,
    read_indicators,
    target_loss,
    with_indicators,
)


class SPViT(EfficiencyCallback):
    """Pruning of a DeiT or Swin Transformer (arXiv 2111.11802): the search with `target`, or `architecture`'s network.

    A search makes the super-network of the module's network, with the weights that it has then, and adds
    ``weight * (target - cost)²`` to the training loss. At its end the run folder holds ``architecture.json`` and
    ``pruned.safetensors``, the weights of the pruned network, for ``backbone: spvit_deit`` or ``spvit_swin`` with
    ``backbone_options: {architecture: ...}``. Gates want a learning rate of their own:
    ``optim.lr_multipliers: {"*.kernel_thresholds*": 10, "*.ffn_thresholds": 10}``; they take no weight decay.

    With `architecture`, the network is pruned as it says before the training. It keeps the weights that it has then,
    from no search: this is the authors' fine-tuning.

    Args:
        target: Multiply-adds of one image to search for, in 10⁹.
        weight: Weight of the squared distance to `target`, in 10¹⁸ multiply-adds squared.
        alpha: Temperature of the softmax over heads that makes convolutions; None is the authors'.
        architecture: A JSON file that a search has written, or the name of a published one.
        indicators: An official ``ffn_indicators`` file: the hidden units of a published `architecture`.
        official_blocks: Skip mixers and convolve as the official pruned networks do (see `SPViTSwin`), which published
            accuracies belong to.
    """

    exchanges_attention = True

    def __init__(
        self,
        target: float | None = None,
        weight: float | None = None,
        alpha: float | None = None,
        architecture: str | None = None,
        indicators: str | None = None,
        official_blocks: bool = False,
    ) -> None:
        super().__init__()
        if (target is None) == (architecture is None):
            raise ValueError("SPViT: expected either target, for a search, or architecture, for what one has found")
        pruning = {"indicators": indicators, "official_blocks": official_blocks or None}
        unused = {"weight": weight, "alpha": alpha} if target is None else pruning
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(
                f"SPViT: {given[0]} has no meaning beside {'architecture' if target is None else 'target'}"
            )
        if target is not None and (weight is None or weight <= 0 or target <= 0):
            raise ValueError(f"SPViT: target {target} and weight {weight}: expected two positive numbers")
        self.target, self.weight, self.alpha = target, weight, alpha
        self.architecture, self.indicators, self.official_blocks = architecture, indicators, official_blocks
        self._found: Architecture | None = None
        self._unpruned = 0
        self._module: LightningModule | None = None

    def convert(self, module: LightningModule) -> None:
        """Put the super-network or the pruned one in the place of `module.network`."""
        network: Any = module.network
        if self.architecture is None:
            module.network = convert(network, self.alpha)
            plain: Any = module.network
        else:
            chosen = Architecture.read(self.architecture)
            if self.indicators is not None:
                chosen = with_indicators(chosen, read_indicators(self.indicators))
            module.network = prune_plain(network, chosen, self.official_blocks)
            plain = module.network
        self._module = module
        self._unpruned = _unpruned(plain.architecture).macs(plain.img_size, plain.num_classes)

    def loss_terms(self, module: LightningModule) -> Mapping[str, Tensor]:
        """The distance of the cost to its target, in a search."""
        if self.target is None or self.weight is None:
            return {}
        network: Any = module.network
        return {"cost": target_loss(cost(network, network.img_size), self.target, self.weight).float()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the multiply-adds of what the gates choose."""
        network: Any = pl_module.network
        if is_gated(network):
            pl_module.log("train/gmacs", float(cost(network, network.img_size).total.detach()) / 1e9)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the search has found, from the weights at its end."""
        network: Any = pl_module.network
        if not is_gated(network):
            return
        found = self._found = found_architecture(network)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            weights = {name: tensor.cpu().contiguous() for name, tensor in prune(network).state_dict().items()}
            _write(folder / "architecture.json", found.to_json().encode())
            _write(folder / "pruned.safetensors", save(weights))
            rank_zero_info(f"SPViT: wrote {folder / 'architecture.json'} and pruned.safetensors beside it")

    def report_rows(self) -> list[tuple[str, str | int | float]]:
        """Target and cost by the authors' formula, mixers and widths."""
        if self._module is None:
            return []
        network: Any = self._module.network
        gated = is_gated(network)
        found = (self._found or found_architecture(network)) if gated else network.architecture
        macs = found.macs(network.img_size, network.num_classes)
        rows: list[tuple[str, str | int | float]] = []
        if self.target is not None:
            rows.append(("target, 10⁶ multiply-adds", round(self.target * 1e3, 4)))
            rows.append(("distance to the target, %", round((macs / 1e9 / self.target - 1) * 100, 2)))
        hidden = sum(block.width for block in found.blocks)
        whole = sum(block.width for block in _unpruned(found).blocks)
        rows += [
            ("10⁶ multiply-adds", round(macs / 1e6, 4)),
            ("share of the unpruned network, %", round(100 * macs / self._unpruned, 1)),
            ("mixers by block", " ".join(block.mixer for block in found.blocks)),
            ("hidden units by block", " ".join(str(block.width) for block in found.blocks)),
            ("hidden units left, %", round(100 * hidden / whole, 1)),
        ]
        return rows


def _unpruned(found: Architecture) -> Architecture:
    return Architecture.unpruned(
        found.family, found.embed_dim, found.depths, found.num_heads, found.patch_size, found.mlp_ratio, found.alpha
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
