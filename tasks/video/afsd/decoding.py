"""From the predictions of AFSD (arXiv 2103.13137) to segments and scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.video.afsd.head import AFSDOutput
from tasks.video.afsd.losses import refine

PREDICTIONS = 5  # the first fields of `AFSDOutput`


def decode(output: AFSDOutput) -> tuple[Tensor, Tensor]:
    """Segments (B, N, 2), in frames of the clip and within it, and scores (B, N, K) of the classes.

    A score is the mean of the coarse and the refined probability, times the predicted overlap.
    """
    scores = (output.conf.softmax(dim=-1) + output.prop_conf.softmax(dim=-1)) / 2 * output.quality.sigmoid()[..., None]
    return segments_of(output), scores[..., 1:]


def segments_of(output: AFSDOutput) -> Tensor:
    """Refined segments (B, N, 2), in frames of the clip and within it."""
    distances = refine(output.loc, output.prop_loc.to(output.loc.dtype))
    places = output.points.to(distances.dtype) * output.length
    return torch.stack([places - distances[..., 0], places + distances[..., 1]], dim=-1).clamp(0, output.length)


def average(outputs: Sequence[AFSDOutput]) -> AFSDOutput:
    """Fuse the outputs of several networks, RGB and optical flow, for the same clips: the mean of all predictions."""
    loc, conf, prop_loc, prop_conf, quality = (
        torch.stack(tensors).mean(dim=0) for tensors in zip(*(output[:PREDICTIONS] for output in outputs), strict=True)
    )
    return outputs[0]._replace(loc=loc, conf=conf, prop_loc=prop_loc, prop_conf=prop_conf, quality=quality)


def fuse_activitynet(outputs: Sequence[AFSDOutput]) -> tuple[Tensor, Tensor]:
    """`decode` for several networks as the official code for ActivityNet-1.3 fuses them.

    Scores are those of averaged logits, boundaries the geometric means of the networks' own.
    """
    segments = torch.stack([segments_of(output) for output in outputs])
    return segments.prod(dim=0) ** (1 / len(outputs)), decode(average(outputs))[1]
