"""Weights of segmentation networks: our checkpoints, bare backbones, and official releases."""

import io
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from backbones.checkpoint import LoadReport, load_checkpoint, rename
from backbones.keys import BACKBONE_TABLES, TIMM, TO_DETECTRON2_RESNET, TO_OFFICIAL_SWIN, Table, prefixed
from tasks.core.errors import UserError
from tasks.core.files import write_atomically
from tasks.segmentation.faseg.keys import HEAD_KEYS, OFFICIAL_HEAD_KEYS
from tasks.segmentation.faseg.network import FASegNetwork
from tasks.segmentation.semantic_fpn import MMSEGMENTATION_KEYS

NO_OBJECT_WEIGHT = 0.1


def _layouts() -> dict[str, Table]:
    """Every layout a file may have, as the key table that leads to our networks."""
    layouts: dict[str, Table] = {
        "our checkpoint": [(r"^(?!network\.)", None), (r"^network\.", "")],
        "our network": [],
    }
    layouts["mmsegmentation model"] = MMSEGMENTATION_KEYS
    layouts["mmsegmentation model, timm or torchvision names"] = [*MMSEGMENTATION_KEYS, *prefixed(TIMM, "backbone.")]
    for name, table in BACKBONE_TABLES.items():
        layouts[f"official model, {name}"] = [*HEAD_KEYS, *prefixed(table, "backbone.")]
    for name, table in BACKBONE_TABLES.items():
        layouts[f"backbone alone, {name}"] = [*table, (r"^", "backbone.")]
    return layouts


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load a weight file of any known layout into `network`; see `backbones.checkpoint.load_checkpoint`.

    Knows checkpoints of our training, the releases of FASeg, Mask2Former and MaskFormer (.pth, .pkl) and what
    `export_weights` writes, Semantic FPN of mmsegmentation as LIT and LITv2 released it, and files with a backbone
    alone (then the head keeps its initial values, as the report says).
    """
    return load_checkpoint(network, path, tables=_layouts())


def load_mmseg_weights(segmentor: nn.Module, path: str | Path) -> LoadReport:
    """Load a weight file of any known layout into a segmentor of mmsegmentation; names in the report are its own.

    Knows checkpoints of our training, models of mmsegmentation, LIT's and LITv2's among them, and files with a backbone
    alone or with that of a detector (then the heads keep their initial values).
    """
    has_features = hasattr(getattr(segmentor.backbone, "features", None), "channels")  # `FrugalBackbone`
    prefix = "backbone.features." if has_features else "backbone."
    inside: Table = [(r"^backbone\.", prefix)]
    layouts: dict[str, Table] = {
        "mmsegmentation model": inside,
        "mmsegmentation model, timm or torchvision names": [*prefixed(TIMM, "backbone."), *inside],
        "our checkpoint": [(r"^(?!network\.segmentor\.)", None), (r"^network\.segmentor\.", "")],
        "our network": [(r"^segmentor\.", "")],
    }
    for name, table in BACKBONE_TABLES.items():
        layouts[f"backbone alone, {name}"] = [*table, (r"^", prefix)]
    return load_checkpoint(segmentor, path, tables=layouts)


def official_key_table(network: nn.Module) -> Table:
    """Rows that rename the keys of a FASeg network to those of the official code.

    Raises UserError for a backbone that is neither a ResNet nor a Swin: the official code has no names for it.
    """
    names = {name for name, _ in network.named_parameters()}
    if {"backbone.layers.1.downsample.reduction.weight", "backbone.norm0.weight"} <= names:
        backbone = TO_OFFICIAL_SWIN
    elif "backbone.body.layer1.0.conv3.weight" in names:
        backbone = TO_DETECTRON2_RESNET
    else:
        raise UserError("export to official names: the backbone must be a bottleneck ResNet or a Swin")
    return [*OFFICIAL_HEAD_KEYS, *prefixed(backbone, "backbone.")]


def official_state_dict(network: FASegNetwork) -> dict[str, Tensor]:
    """The weights of `network` under the names of the official code, its buffers of constants included.

    Raises UserError as `official_key_table` does.
    """
    constants = {name: buffer for name, buffer in network.named_buffers() if name.endswith("relative_position_index")}
    official = rename({**network.state_dict(), **constants}, official_key_table(network))
    class_weight = torch.ones(network.num_classes + 1)
    class_weight[-1] = NO_OBJECT_WEIGHT
    return {**official, "criterion.empty_weight": class_weight}


def export_weights(network: FASegNetwork, path: str | Path) -> None:
    """Write `official_state_dict` as .safetensors, or as a .pth that the official code reads (``{"model": ...}``)."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise UserError(f"{path}: exported weights are written as .safetensors or .pth")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in official_state_dict(network).items()}
    if path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save({"model": tensors}, buffer)
        write_atomically(path, buffer.getvalue())
    else:
        write_atomically(path, save(tensors))
