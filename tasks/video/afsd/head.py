"""Prediction head of AFSD (arXiv 2103.13137): coarse proposals at every point of the pyramid, and their refinement."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones.same_padding import SameConv1d
from kernels.boundary_max_pool import boundary_max_pool
from tasks.video.afsd.pyramid import NORM_GROUPS, ConvNorm, FrameFeature, Pyramid
from tasks.video.afsd.windows import frame_windows, level_windows

FINEST_STRIDE = 4  # frames per point of the first level by which `scale_by_level` multiplies, as in the official code


class BoundaryFeatures(NamedTuple):
    """Features whose first half of channels is about starts, the second about ends.

    `frame` is (B, C, L) for L frames, `loc` and `conf` (B, 2 C, T) are those of the two branches at the finest level.
    """

    frame: Tensor
    loc: Tensor
    conf: Tensor


class AFSDOutput(NamedTuple):
    """Predictions at the N points of all levels, the finest level first, for clips of `length` frames.

    `loc` (B, N, 2): coarse distances, in frames, from the point to start and end. `conf` (B, N, K + 1): logits, class 0
    is background. `prop_loc` (B, N, 2): corrections of the distances in half lengths of the coarse proposal.
    `prop_conf` (B, N, K + 1): refined logits. `quality` (B, N): logit of the overlap. `points` (N,): places from 0 to 1
    in the clip. `levels` (N,): numbers of the levels.
    """

    loc: Tensor
    conf: Tensor
    prop_loc: Tensor
    prop_conf: Tensor
    quality: Tensor
    points: Tensor
    levels: Tensor
    boundaries: BoundaryFeatures
    length: int


class ProposalBranch(nn.Module):
    """The feature of each point beside what is salient around the boundaries of its proposal."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.short = ConvNorm(dim, dim, 1)
        self.boundary = ConvNorm(dim, 2 * dim, 1)
        self.frame = ConvNorm(dim, dim, 1)
        self.fuse = ConvNorm(4 * dim, dim, 1)

    def forward(self, x: Tensor, boundary: Tensor, frame: Tensor, windows: tuple[Tensor, Tensor]) -> Tensor:
        """Refine (B, C, T), given `boundary` of it and the frame feature, to (B, C, T).

        `windows` are those of the level and of the frames, (B, T, 4) each.
        """
        pooled = self.frame(boundary_max_pool(frame, windows[1]))
        return self.fuse(torch.cat([pooled, boundary_max_pool(boundary, windows[0]), self.short(x)], dim=1))


class AFSDHead(nn.Module):
    """Pyramid, coarse predictor and refinement; all weights are shared by the levels except one scale each.

    The defaults are the head for THUMOS14. For ActivityNet-1.3 the official one reads the coarser map alone and has
    `scale_by_level` and `small_init`.

    Args:
        channels: Channels of each input.
        num_classes: Classes K without background.
        sides: Height and width of each input map; None for a sequence of features (B, C, T).
        dim: Width.
        num_levels: Levels of the pyramid.
        scale_by_level: Predict distances in units of 4, 8, 16, ... frames per level instead of frames.
        small_init: Initialise what follows the pyramid from normal(0, 0.01).
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        sides: Sequence[int | None] = (6, 3),
        dim: int = 512,
        num_levels: int = 6,
        scale_by_level: bool = False,
        small_init: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1 or dim % (2 * NORM_GROUPS):  # a group of one channel would be normalised to nothing
            raise ValueError(f"dim={dim}: expected a multiple of {2 * NORM_GROUPS}")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: expected at least 1")
        self.num_classes, self.scale_by_level = num_classes, scale_by_level
        self.pyramid = Pyramid(channels, sides, dim, num_levels)
        self.frame_feature = FrameFeature(dim)
        self.scales = nn.ParameterList(torch.ones(1) for _ in range(num_levels))
        self.loc_tower = nn.Sequential(ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 3))
        self.conf_tower = nn.Sequential(ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 3))
        self.loc_head = SameConv1d(dim, 2, 3)
        self.conf_head = SameConv1d(dim, num_classes + 1, 3)
        self.loc_branch = ProposalBranch(dim)
        self.conf_branch = ProposalBranch(dim)
        self.prop_loc_head = SameConv1d(dim, 2, 1)
        self.prop_conf_head = SameConv1d(dim, num_classes + 1, 1)
        self.quality_head = SameConv1d(dim, 1, 3)
        self._initialise(small_init)

    def forward(self, inputs: Sequence[Tensor], length: int) -> AFSDOutput:
        """Predict from maps (B, C_i, T_i, H_i, W_i), or features (B, C, T), of clips of `length` frames."""
        features = self.pyramid(inputs)
        frame = self.frame_feature(features[0], length)
        rows, boundaries = [], []
        for level, x in enumerate(features):
            row, boundary = self._predict(level, x, frame, length)
            rows.append(row)
            boundaries.append(boundary)
        loc, conf, prop_loc, prop_conf, quality, points, levels = (
            torch.cat(parts, dim=1 if parts[0].ndim == 3 else 0) for parts in zip(*rows, strict=True)
        )
        finest = BoundaryFeatures(frame, *boundaries[0])
        return AFSDOutput(loc, conf, prop_loc, prop_conf, quality[..., 0], points, levels, finest, length)

    def boundary_features(self, inputs: Sequence[Tensor], length: int) -> BoundaryFeatures:
        """The boundary features of `forward` alone."""
        finest = self.pyramid(inputs, num_levels=1)[0]
        loc, conf = self.loc_tower(finest), self.conf_tower(finest)
        frame = self.frame_feature(finest, length)
        return BoundaryFeatures(frame, self.loc_branch.boundary(loc), self.conf_branch.boundary(conf))

    def _predict(
        self, level: int, x: Tensor, frame: Tensor, length: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """Predictions (B, T, ·), places and level of the points of a level (B, C, T), and its boundary features."""
        loc_feature, conf_feature = self.loc_tower(x), self.conf_tower(x)
        steps = x.shape[2]
        # Frames, of which there may be hundreds, do not fit into half precision.
        precise = torch.promote_types(x.dtype, torch.float32)
        centres = (torch.arange(steps, device=x.device, dtype=precise) + 0.5) / steps
        loc = (self.loc_head(loc_feature).to(precise) * self.scales[level]).exp().transpose(1, 2)  # (B, T, 2)
        if self.scale_by_level:
            loc = loc * (FINEST_STRIDE << level)
        distances, places = loc.detach(), centres * length
        windows = (
            level_windows(distances, centres, length),
            frame_windows(places - distances[..., 0], places + distances[..., 1]),
        )
        boundaries = self.loc_branch.boundary(loc_feature), self.conf_branch.boundary(conf_feature)
        refined_loc = self.loc_branch(loc_feature, boundaries[0], frame, windows)
        refined_conf = self.conf_branch(conf_feature, boundaries[1], frame, windows)
        predictions = [
            head(y).transpose(1, 2)
            for head, y in (
                (self.conf_head, conf_feature),
                (self.prop_loc_head, refined_loc),
                (self.prop_conf_head, refined_conf),
                (self.quality_head, refined_loc),
            )
        ]
        return (loc, *predictions, centres, torch.full((steps,), level, device=x.device)), boundaries

    def _initialise(self, small: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv3d):
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
                limit = math.sqrt(3 / max(1, (fan_in + fan_out) / 2))
                nn.init.uniform_(module.weight, -limit, limit)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if small:
            behind = [child for name, child in self.named_children() if name not in ("pyramid", "frame_feature")]
            for module in (module for child in behind for module in child.modules()):
                if isinstance(module, nn.Conv1d):
                    nn.init.normal_(module.weight, std=0.01)
