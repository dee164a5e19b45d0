"""Write a released weight file of one of our networks as a file of its own: bare tensors under our names."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from backbones.checkpoint import CheckpointError, LoadReport, first_names, read_state_dict, rename
from backbones.features import create, create_features
from backbones.keys import COMPUTED, OFFICIAL_PVT
from backbones.published import PUBLISHED
from backbones.staged import Flavour

SUFFIXES = (".safetensors", ".pth")
DENSE_PREFIX = "backbone."  # of detectors and segmentation networks


@dataclass(frozen=True)
class Conversion:
    """What was written: the network, the others that the tensors fit too, and the heads that were left out."""

    report: LoadReport
    target: Path
    also: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        """The load report, with the file written in its first line."""
        lines = [f"{self.target} from {self.report}"]
        if self.left_out:
            lines.append(f"  {'left out':<12}{len(self.left_out):>6}  {first_names(self.left_out)}")
        if self.also:
            lines.append(f"  the same tensors fit {', '.join(self.also)}")
        return "\n".join(lines)


def convert(source: Path, target: Path, model: str | None = None) -> Conversion:
    """Read a weight file of any release and write the network's tensors to `target`, completely or not at all.

    A .safetensors file has the metadata ``model``, ``flavour`` (empty for a classifier) and ``source``, a .pth file
    holds ``{"model": tensors}`` beside them. Data types stay; heads of detectors and segmentation networks are left
    out. Without the name `model` the network of `PUBLISHED` is taken that has exactly these tensors.

    Raises CheckpointError for a file that cannot be read or does not have exactly the tensors of the network, and for a
    target of another kind; ValueError for an unknown `model`.
    """
    if target.suffix not in SUFFIXES:
        raise CheckpointError(f"{target}: expected a name ending in {' or '.join(SUFFIXES)}")
    if source.exists() and target.exists() and source.samefile(target):
        raise CheckpointError(f"{target} is the file to read; give the new one another name")
    state_dict, heads = read_state_dict(source), []
    if any(name.startswith(DENSE_PREFIX) for name in state_dict):
        heads = [name for name in state_dict if not name.startswith(DENSE_PREFIX)]
        inside = {name: tensor for name, tensor in state_dict.items() if name.startswith(DENSE_PREFIX)}
        state_dict = {name.removeprefix(DENSE_PREFIX): tensor for name, tensor in inside.items()}
    fits = [
        (_fit(source, label, tensors, wanted), tensors)
        for label, wanted in _candidates(state_dict, model)
        for tensors in _names(state_dict)
    ]
    fits.sort(key=lambda fit: _misfits(fit[0]))  # stable: of equals the first
    best, tensors = fits[0]
    if _misfits(best):
        raise CheckpointError(_explain(best, model))
    _write(target, {name: tensors[name].contiguous() for name in best.loaded}, best.layout, source)
    return Conversion(best, target, [report.layout for report, _ in fits[1:] if not _misfits(report)], heads)


def _names(state_dict: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The tensors under their names and, where they could be official names of PVTv2, under ours."""
    renamed = rename(state_dict, OFFICIAL_PVT)
    return [state_dict] if renamed.keys() == state_dict.keys() else [state_dict, renamed]


def _candidates(state_dict: Mapping[str, Tensor], model: str | None) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Names of networks, or of a network and its dense flavour, with the tensors they have; nothing is allocated."""
    classifier = state_dict.get("head.weight")
    for name in [model] if model else PUBLISHED:
        with torch.device("meta"):
            if classifier is not None:
                yield name, create(name, num_classes=len(classifier)).state_dict()
                continue
            yield name, create(name, num_classes=0).state_dict()
            for flavour in get_args(Flavour):
                if name in PUBLISHED and flavour in PUBLISHED[name].layouts:
                    yield f"{name} {flavour}", create_features(name, flavour=flavour).state_dict()


def _fit(path: Path, label: str, state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> LoadReport:
    shapes = {name: (tuple(state_dict[name].shape), tuple(wanted[name].shape)) for name in wanted if name in state_dict}
    mismatched = {name: (file, model) for name, (file, model) in shapes.items() if file != model}
    return LoadReport(
        path,
        label,
        loaded=[name for name in shapes if name not in mismatched],
        missing=[name for name in wanted if name not in state_dict and not name.endswith(COMPUTED)],
        unexpected=[name for name in state_dict if name not in wanted and not name.endswith(COMPUTED)],
        mismatched=mismatched,
    )


def _misfits(report: LoadReport) -> int:
    return len(report.missing) + len(report.unexpected) + len(report.mismatched)


def _explain(report: LoadReport, model: str | None) -> str:
    shapes = [f"{name} {file} in the file, {here} in the network" for name, (file, here) in report.mismatched.items()]
    found = {"missing": report.missing, "unexpected": report.unexpected, "other shape": shapes}
    differences = "; ".join(f"{what}: {first_names(names)}" for what, names in found.items() if names)
    which = f"does not hold {report.layout}" if model else f"fits no network here; the nearest is {report.layout}"
    return f"{report.path} {which} ({differences})"


def _write(target: Path, tensors: dict[str, Tensor], label: str, source: Path) -> None:
    name, _, flavour = label.partition(" ")
    metadata = {"model": name, "flavour": flavour, "source": source.name}
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.suffix == ".pth":
            torch.save({"model": tensors, "metadata": metadata}, part)
        else:
            save_file(tensors, part, metadata)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
