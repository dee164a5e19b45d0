"""Video backbones by name: STPT, I3D, and any image backbone applied to single frames."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.features import create_features
from backbones.i3d import I3DFeatures
from backbones.stpt import STPTFeatures

Maps = Literal["both", "coarse"]
VIDEO_BACKBONES: dict[str, type[nn.Module]] = {"stpt": STPTFeatures, "i3d": I3DFeatures}
# The option that names the maps of a network, and the two maps.
MAP_OPTIONS: dict[str, tuple[str, tuple[Any, Any]]] = {
    "stpt": ("out_indices", (2, 3)),
    "i3d": ("taps", ("Mixed_4f", "Mixed_5c")),
}
FRAME_STRIDES = ((4, 16), (8, 32))  # along time, and along height and width


def create_video_features(
    name: str,
    *,
    pretrained: bool = False,
    norm: Literal["batch", "frozen"] = "batch",
    drop_path_rate: float | None = None,
    maps: Maps = "both",
    frames_per_pass: int = 32,
    **kwargs: Any,
) -> nn.Module:
    """Create a backbone whose forward maps a normalised clip (B, 3, T, H, W) to two maps (B, C, T / s_t, H / s, W / s).

    Their strides (s_t, s, s) are (4, 16, 16) and (8, 32, 32); sizes that they do not divide are rounded up. With
    ``maps="coarse"`` there is the second alone. The module has ``channels`` and ``strides``. ``name`` is ``stpt``,
    ``i3d`` or any model that `create_features` takes, which then sees every fourth frame (`FrameFeatures`),
    ``frames_per_pass`` at a time. ``norm="frozen"`` makes every batch normalisation a fixed affine map. ``kwargs`` are
    the network's own, e.g. ``in_chans``.

    Raises ValueError for an unknown name or option and RuntimeError where ``pretrained`` finds no weights.
    """
    if norm not in ("batch", "frozen"):
        raise ValueError(f"norm={norm!r}: expected 'batch' or 'frozen'")
    if maps not in ("both", "coarse"):
        raise ValueError(f"maps={maps!r}: expected 'both' or 'coarse'")
    if name not in VIDEO_BACKBONES:
        features = create_features(name, pretrained=pretrained, norm=norm, drop_path_rate=drop_path_rate, **kwargs)
        return FrameFeatures(features, frames_per_pass, maps)
    if pretrained:
        raise RuntimeError(
            f"there are no weights of {name!r} to download; set pretrained to false and name the file of released or "
            "trained weights as the option weights"
        )
    if drop_path_rate is not None:
        if name == "i3d":
            raise ValueError("drop_path_rate: i3d has no residual paths to drop")
        kwargs["drop_path_rate"] = drop_path_rate
    option, names = MAP_OPTIONS[name]
    network = VIDEO_BACKBONES[name](**{option: names if maps == "both" else names[1:], **kwargs})
    return freeze_batch_norm_3d(network) if norm == "frozen" else network


class FrameFeatures(nn.Module):
    """Maps of an image backbone for single frames, made to look like those of a video backbone.

    Every fourth frame is seen, the third of each four or the last there is; the coarser map is the mean of pairs of
    frames, so that no seen frame is lost. `frames_per_pass` images go through the backbone at a time; in training
    each pass is computed again in the backward pass, so that memory is that of one pass and of the maps.

    Args:
        features: A module with ``strides`` 16 and 32 among them, as `create_features` makes.
        frames_per_pass: Images at a time.
        maps: Both maps, or the ``coarse`` one alone.
    """

    def __init__(self, features: Any, frames_per_pass: int = 32, maps: Maps = "both") -> None:
        super().__init__()
        if frames_per_pass < 1:
            raise ValueError(f"frames_per_pass={frames_per_pass}: expected at least 1")
        self.features = features
        self.frames_per_pass = frames_per_pass
        wanted = FRAME_STRIDES if maps == "both" else FRAME_STRIDES[1:]
        self.levels = [features.strides.index(stride) for _, stride in wanted]
        for level in set(range(len(features.strides))).difference(self.levels):
            if hasattr(features, f"norm{level}"):  # of a map that nobody reads: parameters without gradient
                setattr(features, f"norm{level}", nn.Identity())
        self.channels: list[int] = [features.channels[level] for level in self.levels]
        self.strides = [(time, stride, stride) for time, stride in wanted]

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Map a clip (B, 3, T, H, W) to its maps (B, C_i, T / s_t, H / s, W / s), lengths rounded up."""
        batch, _, length = clip.shape[:3]
        step = FRAME_STRIDES[0][0]
        seen = torch.arange(-(-length // step), device=clip.device) * step + step // 2
        frames = clip.index_select(2, seen.clamp(max=length - 1)).transpose(1, 2).flatten(0, 1)  # (B * T / 4, 3, H, W)
        passes = [self._pass(part) for part in frames.split(self.frames_per_pass)]
        maps = [torch.cat(parts).unflatten(0, (batch, -1)).transpose(1, 2) for parts in zip(*passes, strict=True)]
        return [*maps[:-1], _mean_of_pairs(maps[-1])]

    def _pass(self, frames: Tensor) -> Sequence[Tensor]:
        if torch.is_grad_enabled():
            maps = checkpoint(self.features, frames, use_reentrant=False)
        else:
            maps = self.features(frames)
        return [maps[level] for level in self.levels]


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Mean of neighbours along time of (B, C, T, H, W), the last one alone where T is odd."""
    if x.shape[2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    return x.unflatten(2, (-1, 2)).mean(dim=3)


class FrozenBatchNorm3d(nn.Module):
    """Batch normalisation whose weight, bias and statistics are buffers, under their usual names."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm3d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, T, H, W)."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def freeze_batch_norm_3d(module: nn.Module) -> nn.Module:
    """Turn every batch normalisation below `module` into a fixed affine map, in place; returns it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, name, FrozenBatchNorm3d(child))
        else:
            freeze_batch_norm_3d(child)
    return module
