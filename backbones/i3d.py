"""Inception I3D: "Quo Vadis, Action Recognition?" (CVPR 2017, arXiv 1705.07750), the backbone of AFSD.

State-dict keys are those of the PyTorch weights for RGB and optical flow that AFSD starts from.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.registration import build, video_cfg
from backbones.same_padding import SameConv3d, SameMaxPool3d

Axes = tuple[int, int, int]

# Channels of the branches of an inception module: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 behind the pooling.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride of the poolings in front of a layer.
POOLS: dict[str, tuple[str, Axes, Axes]] = {
    "Conv3d_2b_1x1": ("MaxPool3d_2a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}
STEM: dict[str, tuple[int, Axes, Axes]] = {
    "Conv3d_1a_7x7": (64, (7, 7, 7), (2, 2, 2)),
    "Conv3d_2b_1x1": (64, (1, 1, 1), (1, 1, 1)),
    "Conv3d_2c_3x3": (192, (3, 3, 3), (1, 1, 1)),
}
STRIDES: dict[str, Axes] = {"Mixed_3c": (2, 8, 8), "Mixed_4f": (4, 16, 16), "Mixed_5c": (8, 32, 32)}


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: Axes = (1, 1, 1), stride: Axes = (1, 1, 1)) -> None:
        super().__init__()
        self.conv3d = SameConv3d(in_chans, out_chans, kernel_size, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_chans, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Transform maps (B, C, T, H, W)."""
        return F.relu(self.bn(self.conv3d(x)))


class Inception(nn.Module):
    """Four branches side by side, their channels concatenated."""

    def __init__(self, in_chans: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = Unit(in_chans, widths[0])
        self.b1a = Unit(in_chans, widths[1])
        self.b1b = Unit(widths[1], widths[2], (3, 3, 3))
        self.b2a = Unit(in_chans, widths[3])
        self.b2b = Unit(widths[3], widths[4], (3, 3, 3))
        self.b3a = SameMaxPool3d((3, 3, 3), stride=(1, 1, 1))
        self.b3b = Unit(in_chans, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        """Transform maps (B, C, T, H, W)."""
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, dim=1)


class I3DLayers(nn.Module):
    """The layers up to `last`.

    Args:
        in_chans: 3 for RGB, 2 for optical flow.
        width: Factor on all channels, for small networks.
        last: Name of the last layer.
    """

    def __init__(self, in_chans: int = 3, width: float = 1.0, last: str = "Mixed_5c") -> None:
        super().__init__()
        names = [*STEM, *MIXED]
        if last not in names:
            raise ValueError(f"last={last!r}: expected one of {', '.join(names)}")
        self.names: list[str] = []
        self.dims: dict[str, int] = {}
        self.grad_checkpointing = False
        channels = in_chans
        for name in names[: names.index(last) + 1]:
            if name in POOLS:
                pool, kernel_size, stride = POOLS[name]
                self._append(pool, SameMaxPool3d(kernel_size, stride=stride), channels)
            if name in STEM:
                out_chans, kernel_size, stride = STEM[name]
                out_chans = max(round(out_chans * width), 1)
                self._append(name, Unit(channels, out_chans, kernel_size, stride), out_chans)
            else:
                widths = [max(round(size * width), 1) for size in MIXED[name]]
                out_chans = widths[0] + widths[2] + widths[4] + widths[5]
                self._append(name, Inception(channels, widths), out_chans)
            channels = out_chans

    def _append(self, name: str, layer: nn.Module, channels: int) -> None:
        self.add_module(name, layer)
        self.names.append(name)
        self.dims[name] = channels

    def forward_layers(self, clip: Tensor) -> dict[str, Tensor]:
        """Output of every layer by name, for a clip (B, C_in, T, H, W)."""
        maps, x = {}, clip
        for name in self.names:
            layer = self.get_submodule(name)
            x = checkpoint(layer, x) if self.grad_checkpointing and torch.is_grad_enabled() else layer(x)
            maps[name] = x
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """None."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        layers = [*STEM, *MIXED]
        if coarse:
            return {"stem": r"^Conv3d_", "blocks": [(rf"^{name}", (i,)) for i, name in enumerate(MIXED)]}
        return {"stem": rf"^{layers[0]}", "blocks": [(rf"^{name}", (i,)) for i, name in enumerate(layers[1:])]}


class _Logits(nn.Module):
    """The classifier, a convolution of 1 x 1 x 1 under its official name."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_chans, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(I3DLayers):
    """Classifier of clips (B, C_in, T, H, W) of any size.

    Args:
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: ``avg``, or an empty string for the map of the last layer.
        drop_rate: Dropout before the classifier.
        **layers: The arguments of `I3DLayers`.
    """

    num_frames: ClassVar[int] = 64

    def __init__(
        self, *, num_classes: int = 400, global_pool: str | None = None, drop_rate: float = 0.0, **layers: Any
    ) -> None:
        super().__init__(**layers)
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = self.dims[self.names[-1]]
        self.feature_info = [
            {"num_chs": self.dims[name], "reduction": stride[-1], "temporal_reduction": stride[0], "module": name}
            for name, stride in STRIDES.items()
        ]
        self.reset_classifier(num_classes, "avg" if global_pool is None else global_pool)

    def forward_features(self, clip: Tensor) -> Tensor:
        """Map (B, C, T / 8, H / 32, W / 32) of the last layer."""
        return self.forward_layers(clip)[self.names[-1]]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores (B, K) of `forward_features`; with `pre_logits` what enters the classifier, (B, C)."""
        if self.global_pool:
            x = x.mean(dim=(2, 3, 4), keepdim=True)
        x = F.dropout(x, self.drop_rate, self.training)
        x = x if pre_logits else self.logits(x)
        return x.flatten(1) if self.global_pool else x

    def forward(self, clip: Tensor) -> Tensor:
        """Class scores (B, K) of a clip (B, C_in, T, H, W)."""
        return self.forward_head(self.forward_features(clip))

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.logits

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` (0: none)."""
        if global_pool not in ("avg", "", None):
            raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = next(self.parameters())
        logits: nn.Module = _Logits(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.logits = logits.to(weight.device, weight.dtype)


class I3DFeatures(I3DLayers):
    """Maps of layers as (B, C, T, H, W), by default the two that AFSD reads.

    ``channels`` and ``strides``, along (t, h, w), describe the returned maps.

    Args:
        taps: Names of the layers, ends of stages; in order.
        **layers: The arguments of `I3DLayers`.
    """

    def __init__(self, *, taps: Sequence[str] = ("Mixed_4f", "Mixed_5c"), **layers: Any) -> None:
        unknown = [name for name in taps if name not in STRIDES]
        if unknown or not taps:
            raise ValueError(f"taps {list(taps)}: expected some of {', '.join(STRIDES)}")
        super().__init__(last=taps[-1], **layers)
        self.taps = list(taps)
        self.channels = [self.dims[name] for name in taps]
        self.strides = [STRIDES[name] for name in taps]

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Map a clip (B, C_in, T, H, W) to maps (B, C_i, T / s_t, H / s_h, W / s_w), sizes rounded up."""
        maps = self.forward_layers(clip)
        return [maps[name] for name in self.taps]


default_cfgs = generate_default_cfgs({"i3d": video_cfg(224, "Conv3d_1a_7x7.conv3d", "logits.conv3d")})


@register_model
def i3d(pretrained: bool = False, **kwargs: Any) -> I3D:
    """Inception I3D; ``in_chans=2`` for optical flow."""
    return build(I3D, "i3d", pretrained, **kwargs)
