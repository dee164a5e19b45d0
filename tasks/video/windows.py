"""Windows of a video and clips spliced from them, as AFSD (Lin et al., CVPR 2021) trains on them.

Positions are frames of the sampled video or, inside a window, of the window. Instances in a window are clipped to
[1, length], because the official code counts a window's frames from 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.video.segments import Floats, Integers

SHARE_INSIDE = 0.5  # of an instance, for it to count in a window


@dataclass(frozen=True)
class Window:
    """The frames offset .. offset + length - 1 of a video and the instances in them, in frames of the window."""

    offset: int
    segments: Floats  # (n, 2)
    labels: Integers  # (n,)


def window_offsets(num_frames: int, length: int, stride: int) -> list[int]:
    """First frames of windows every `stride` frames; the last window is flush with the end of the video."""
    if num_frames <= length:
        return [0]
    last = num_frames - length
    return [*range(0, last + 1, stride), *([last] if last % stride else [])]


def training_windows(
    segments: Floats, labels: Integers, num_frames: int, length: int, stride: int
) -> tuple[list[Window], float]:
    """The windows of a video in which an instance lies entirely, and the length of its shortest instance.

    A window holds the instances at least half of which is inside, clipped to it; the shortest is taken over the
    clipped instances of all windows, also those without an entire one.

    Args:
        segments: (n, 2) start and end of the instances in sampled frames; ends are after starts.
        labels: (n,) their classes.
        num_frames: Sampled frames of the video.
        length: Frames of a window.
        stride: Frames between windows.
    """
    windows, shortest = [], float(length)
    lengths = segments[:, 1] - segments[:, 0]
    if num_frames <= length:
        shortest = min(shortest, lengths.min(initial=np.inf))
    for offset in window_offsets(num_frames, length, stride):
        inside = np.minimum(offset + length, segments[:, 1]) - np.maximum(offset + 1, segments[:, 0])
        share = inside / lengths
        kept = share >= SHARE_INSIDE
        clipped = np.stack(
            [np.maximum(segments[kept, 0] - offset, 1), np.minimum(segments[kept, 1] - offset, length)], axis=1
        )
        shortest = min(shortest, (clipped[:, 1] - clipped[:, 0]).min(initial=np.inf))
        if (share >= 1).any():
            windows.append(Window(offset, clipped, labels[kept]))
    return windows, shortest


def boundary_masks(segments: Floats, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """0/1 masks (length,) of the frames around the starts and the ends of instances (n, 2).

    A boundary is as wide as a tenth of its instance, at least two frames, both of its ends included.
    """
    masks = np.zeros((2, length), dtype=np.float32)
    half = np.maximum((segments[:, 1] - segments[:, 0]) / 10, 2) / 2
    for mask, middle in zip(masks, segments.T, strict=True):
        first = np.rint(middle - half).clip(0, length - 1).astype(int)
        last = np.rint(middle + half).clip(0, length - 1).astype(int)
        for begin, end in zip(first, last, strict=True):
            mask[begin : end + 1] = 1
    return masks[0], masks[1]


# -- spliced clips ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splice:
    """A clip in which background interrupts an instance: `frames` (T,) names the source of each of its frames.

    `segments` (3, 2) are the instance's part before the cut, its part behind, and the background between.
    """

    frames: Integers
    segments: Floats


def long_instances(segments: Floats, piece: int, or_equal: bool = False) -> Floats:
    """The instances (n, 2) that are longer than two pieces, or at least as long."""
    lengths = segments[:, 1] - segments[:, 0]
    return segments[lengths >= 2 * piece if or_equal else lengths > 2 * piece]


def cuts(instance: Sequence[float], piece: int) -> range:
    """Frames at which an instance can be cut, at least `piece` frames from its ends."""
    start, end = instance
    return range(math.ceil(start) + piece, math.ceil(start) + math.ceil(end - start - piece))


def background_gaps(segments: Floats, piece: int, length: int) -> list[tuple[int, int]]:
    """Whole frames (first, last) of the stretches between boundaries that are no instance and longer than `piece`."""
    instances = {tuple(segment) for segment in segments.tolist()}
    times = sorted([0, length - 1, *segments.ravel().tolist()])
    stretches = [(a, b) for a, b in itertools.pairwise(times) if (a, b) not in instances]
    gaps = [(math.ceil(a), math.floor(b)) for a, b in stretches]
    return [(first, last) for first, last in gaps if last - first > piece]


def splice(instance: Sequence[float], cut: int, begin: int, piece: int, length: int) -> Splice | None:
    """Move the background frames begin .. begin + piece - 1 to the frame `cut` inside `instance`.

    What lies between moves up to fill the hole. None where the background is not clear of the cut.
    """
    start, end = instance
    stop = begin + piece
    frames = np.arange(length)
    if end <= begin and stop <= length:
        frames[cut:stop] = np.concatenate([np.arange(begin, stop), np.arange(cut, begin)])
        segments = [(start, cut), (cut + piece, end + piece), (cut + 1, cut + piece - 1)]
    elif begin >= 0 and stop <= cut:
        frames[begin:cut] = np.concatenate([np.arange(stop, cut), np.arange(begin, stop)])
        segments = [(start - piece, cut - piece), (cut, end), (cut - piece + 1, cut - 1)]
    else:
        return None
    return Splice(frames, np.array(segments, dtype=np.float64))


def random_splice(
    segments: Floats, piece: int, length: int, generator: np.random.Generator, or_equal: bool = False
) -> Splice | None:
    """Choose instance, cut and background at random; None where there is no long instance or gap."""
    candidates = long_instances(segments, piece, or_equal)
    gaps = background_gaps(segments, piece, length)
    if piece < 1 or not len(candidates) or not gaps:
        return None
    instance = candidates[generator.integers(len(candidates))].tolist()
    places = cuts(instance, piece)
    if not places:
        return None
    first, last = gaps[generator.integers(len(gaps))]
    begin = first + int(generator.integers(last - first - piece))
    return splice(instance, places[int(generator.integers(len(places)))], begin, piece, length)
