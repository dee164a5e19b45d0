"""Windows and spliced clips beyond what the goldens of the official code cover."""

import numpy as np
import pytest

from tasks.video.windows import (
    background_gaps,
    boundary_masks,
    random_splice,
    splice,
    training_windows,
    window_offsets,
)


@pytest.mark.parametrize(
    ("num_frames", "offsets"),
    [(10, [0]), (16, [0]), (17, [0, 1]), (32, [0, 8, 16]), (35, [0, 8, 16, 19])],
)
def test_the_last_window_is_flush_with_the_end(num_frames, offsets):
    assert window_offsets(num_frames, 16, 8) == offsets


def test_windows_keep_instances_half_inside_and_need_an_entire_one():
    segments, labels = np.array([[2.0, 6], [14, 20], [15, 40]]), np.array([0, 1, 2])
    windows, shortest = training_windows(segments, labels, 48, 16, 8)
    assert [window.offset for window in windows] == [0, 8]
    assert windows[0].segments.tolist() == [[2, 6]]  # a third of the next is inside
    assert windows[1].segments.tolist() == [[6, 12]]
    assert windows[1].labels.tolist() == [1]
    assert shortest == 3  # the half of the second that is in the window from 16


def test_an_instance_that_starts_before_frame_one_fits_no_window():
    windows, _ = training_windows(np.array([[0.5, 6.0]]), np.array([0]), 20, 16, 8)
    assert windows == []


def test_masks_are_clipped_to_the_window():
    start, end = boundary_masks(np.array([[0.0, 15.0]]), 16)
    assert np.flatnonzero(start).tolist() == [0, 1]
    assert np.flatnonzero(end).tolist() == [14, 15]


@pytest.mark.parametrize("seed", range(20))
def test_a_splice_moves_background_into_the_instance(seed):
    generator = np.random.default_rng(seed)
    segments = np.array([[30.0, 60.5], [90.25, 118.0]])
    spliced = random_splice(segments, 5, 128, generator)
    assert sorted(spliced.frames.tolist()) == list(range(128))  # every frame once
    before, behind, between = spliced.segments
    # The piece between holds frames that were background, and the instance is whole around it.
    piece = spliced.frames[int(between[0]) - 1 : int(between[0]) + 4]
    assert not any(start <= frame < end for frame in piece for start, end in segments)
    original = before[1] - before[0] + behind[1] - behind[0]
    assert any(abs(original - (end - start)) < 1 for start, end in segments)


def test_nothing_is_spliced_where_background_and_cut_overlap():
    assert splice((10, 40), 20, 18, 6, 64) is None
    assert splice((10, 40), 20, 60, 6, 64) is None  # the piece leaves the clip
    assert random_splice(np.array([[5.0, 60.0]]), 0, 64, np.random.default_rng(0)) is None


def test_gaps_between_overlapping_instances():
    assert background_gaps(np.array([[10.0, 30.0], [20.0, 50.0]]), 5, 64) == [
        (0, 10),
        (10, 20),
        (20, 30),
        (30, 50),
        (50, 63),
    ]
