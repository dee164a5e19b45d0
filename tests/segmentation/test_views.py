import pytest
import torch

from tasks.core.errors import UserError
from tasks.segmentation.views import EvaluationConfig, multi_scale_scores, sliding_window_scores


def colours(image):
    """Scores that any size of image gives: its own channels."""
    return image.float()


def test_multi_scale_averages_sizes_and_mirrors():
    seen = []

    def scores(image):
        seen.append(tuple(image.shape))
        return image.float() + torch.arange(image.shape[2])  # depends on the position in the view

    image = torch.full((3, 20, 30), 7, dtype=torch.uint8)
    result = multi_scale_scores(scores, image, short_sides=[20, 40], max_size=45, output_size=(10, 12))
    assert seen == [(3, 20, 30), (3, 20, 30), (3, 30, 45), (3, 30, 45)]
    assert result.shape == (3, 10, 12)
    # Ramp plus mirrored ramp is constant: 7 + (29 / 2 + 44 / 2) / 2
    torch.testing.assert_close(result, torch.full_like(result, 7 + 18.25), rtol=1e-3, atol=0)


def test_one_scale_without_mirror_is_the_plain_result():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    result = multi_scale_scores(colours, image, [16], 100, (16, 24), flip=False)
    assert torch.equal(result, image.float())


@pytest.mark.parametrize("short_sides", [[], [8, 0]])
def test_multi_scale_needs_sizes(short_sides):
    with pytest.raises(UserError, match=r"short_sides: \[.*\] was given, at least one size of at least 1 pixel"):
        multi_scale_scores(colours, torch.zeros(3, 8, 8, dtype=torch.uint8), short_sides, 100, (8, 8))


@pytest.mark.parametrize("size", [(30, 47), (16, 16), (10, 40), (9, 7)])
def test_sliding_windows_cover_every_pixel_once_on_average(size):
    windows = []

    def scores(image):
        windows.append(tuple(image.shape[1:]))
        return image.float()

    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    result = sliding_window_scores(scores, image, window=(16, 16), stride=(12, 10))
    torch.testing.assert_close(result, image.float())
    assert set(windows) == {(min(16, size[0]), min(16, size[1]))}


@pytest.mark.parametrize("stride", [(17, 8), (0, 8)])
def test_sliding_windows_must_not_leave_gaps(stride):
    with pytest.raises(UserError, match=rf"stride\[0\]: {stride[0]} was given, 1 to 16 \(the window\) was expected"):
        sliding_window_scores(colours, torch.zeros(3, 32, 32), (16, 16), stride)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_sides": [256, -1]}, r"short_sides and max_long_side: \[256, -1, 3584\] was given"),
        ({"max_long_side": 0}, r"short_sides and max_long_side: \[0\] was given"),
        (
            {"stride": (341, 600)},
            r"model\.evaluation\.stride\[1\]: 600 was given, 1 to 512 \(the window\) was expected",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**options)
