"""Checkpoints of a training: whether one belongs to the model at hand, asked before the run writes anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from backbones.checkpoint import first_names, read_content
from tasks.core.errors import UserError


def require_checkpoint_of(module: LightningModule, path: Path, training: bool) -> None:
    """Raise unless `path` is a checkpoint of this model, with the state of its training if that is to be resumed.

    Only tensors and plain values are ever constructed. Raises UserError or, for a file that is damaged or asks to run
    code, `backbones.checkpoint.CheckpointError`.
    """
    option = f"--ckpt_path {path}"
    if not path.is_file():
        raise UserError(f"{option}: no such file; expected a checkpoint such as runs/.../last.ckpt")
    content: Any = read_content(path)
    needed = {"state_dict", "pytorch-lightning_version", *(("optimizer_states", "loops") if training else ())}
    if not isinstance(content, Mapping) or not needed <= content.keys():
        raise UserError(
            f"{option}: not the checkpoint of a training; expected last.ckpt or best.ckpt of a run (weights alone are "
            "given as --model.weights)"
        )
    saved: Mapping[str, Tensor] = content["state_dict"]
    own = module.state_dict()
    differences = [f"{name} is missing" for name in own.keys() - saved.keys()]
    differences += [f"{name} is not part of the model" for name in saved.keys() - own.keys()]
    differences += [
        f"{name} is {tuple(saved[name].shape)}, in the model {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    if differences:
        raise UserError(f"{option}: a checkpoint of another model: {first_names(sorted(differences))}")
