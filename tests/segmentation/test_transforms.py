import random

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.core.data import seed_augmentation
from tasks.core.images import resized_size
from tasks.segmentation.transforms import (
    RandomCropUpTo,
    ResizeShortestEdge,
    SSDColorJitter,
    resize_image,
    resize_mask,
    train_transforms,
)


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, generator.integers(0, 150, (height, width), dtype=np.uint8)


def seeded(transform: A.BasicTransform, seed: int) -> A.BasicTransform:
    seed_augmentation(transform, seed, 0, 0)
    return transform


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((512, 683), 512, 2048, (512, 683)),
        ((683, 512), 256, 2048, (342, 256)),  # 341.5 rounds up
        ((1024, 2048), 512, 4096, (512, 1024)),
        ((100, 1000), 512, 2048, (205, 2048)),  # 204.8; the longer side is the limit
        ((64, 64), 64, 64, (64, 64)),
        ((1, 5000), 512, 2048, (1, 2048)),  # 0.4 would vanish
    ],
)
def test_output_size(size, short, longest, expected):
    assert resized_size(*size, short, longest) == expected


def test_images_are_resized_by_pils_antialiased_filter():
    image, _ = noise(50, 70)
    expected = np.asarray(Image.fromarray(image).resize((31, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_image(image, 20, 31), expected)
    halves = np.repeat(np.array([0, 240], dtype=np.uint8), 8).reshape(1, 16, 1).repeat(16, 0).repeat(3, 2)
    assert resize_image(halves, 2, 2)[0, 0, 0] > 0  # a filter of full support, not two taps


def test_masks_are_resized_as_torch_does():
    draw = random.Random(0)
    sizes = [(4, 218), (16, 218), (300, 299), (1, 7), (7, 1)]
    for before, after in sizes + [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(1000)]:
        row = np.arange(before, dtype=np.int16)[None]
        tensor = torch.from_numpy(row)[None, None].double()
        # 128 rows, because torch breaks ties in another way when height + width of the output is at most 128.
        expected = torch.nn.functional.interpolate(tensor, (128, after), mode="nearest")[0, 0]
        np.testing.assert_array_equal(resize_mask(row, 128, after), expected.short().numpy())
    _, mask = noise(31, 47)
    tensor = torch.from_numpy(mask)[None, None].double()
    expected = torch.nn.functional.interpolate(tensor, (70, 90), mode="nearest")[0, 0]
    np.testing.assert_array_equal(resize_mask(mask, 70, 90), expected.byte().numpy())


def test_resize_draws_every_short_side():
    image, mask = noise(40, 60)
    drawn = set()
    for seed in range(40):
        result = seeded(ResizeShortestEdge([20, 30, 50], 65), seed)(image=image, mask=mask)
        assert result["image"].shape[:2] == result["mask"].shape
        drawn.add(result["mask"].shape)
    assert drawn == {(20, 30), (30, 45), (43, 65)}


def test_crop_takes_the_same_window_of_image_and_mask():
    image, mask = noise(30, 40)
    image[..., 0] = mask
    corners = set()
    for seed in range(300):
        result = seeded(RandomCropUpTo(28, 37), seed)(image=image, mask=mask)
        np.testing.assert_array_equal(result["image"][..., 0], result["mask"])
        assert result["mask"].shape == (28, 37)
        corners.add(result["mask"].tobytes())
    assert len(corners) == 3 * 4  # all positions


def test_crop_leaves_a_smaller_side_whole():
    image, mask = noise(20, 40)
    result = seeded(RandomCropUpTo(32, 32), 0)(image=image, mask=mask)
    assert result["image"].shape == (20, 32, 3)
    assert result["mask"].shape == (20, 32)


def reference_jitter(image: np.ndarray, drawn: dict) -> np.ndarray:
    """SSD's jitter in BGR and floating point, as published implementations write it."""

    def convert(values: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
        return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    bgr = image[..., ::-1].copy()
    if drawn["brightness"]:
        bgr = convert(bgr, beta=drawn["brightness"][1])
    if drawn["contrast"] and drawn["contrast_first"]:
        bgr = convert(bgr, alpha=drawn["contrast"][0])
    if drawn["saturation"] is not None:
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], alpha=drawn["saturation"])
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if drawn["hue"] is not None:
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + drawn["hue"]) % 180
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if drawn["contrast"] and not drawn["contrast_first"]:
        bgr = convert(bgr, alpha=drawn["contrast"][0])
    return bgr[..., ::-1]


def test_color_jitter_equals_the_published_arithmetic():
    image, _ = noise(32, 32)
    untouched = image.copy()
    for seed in range(50):
        drawn = seeded(SSDColorJitter(), seed).get_params()
        np.testing.assert_array_equal(SSDColorJitter().apply(image, **drawn), reference_jitter(image, drawn))
    np.testing.assert_array_equal(image, untouched)


def test_color_jitter_draws_from_the_stated_ranges():
    jitter = seeded(SSDColorJitter(), 0)
    draws = [jitter.get_params() for _ in range(4000)]
    brightness = [draw["brightness"][1] for draw in draws if draw["brightness"]]
    contrast = [draw["contrast"][0] for draw in draws if draw["contrast"]]
    saturation = [draw["saturation"] for draw in draws if draw["saturation"] is not None]
    hue = [draw["hue"] for draw in draws if draw["hue"] is not None]
    for values in (brightness, contrast, saturation, hue, [d for d in draws if d["contrast_first"]]):
        assert 1850 < len(values) < 2150
    assert -32 <= min(brightness) < -31
    assert 31 < max(brightness) <= 32
    for values in (contrast, saturation):
        assert 0.5 <= min(values) < 0.51
        assert 1.49 < max(values) <= 1.5
    assert set(hue) == set(range(-18, 19))


def test_recipe_pads_right_and_bottom_after_flipping():
    image = np.zeros((10, 12, 3), dtype=np.uint8)
    image[:, :6] = 200
    mask = image[..., 0] // 200
    transform = train_transforms([10], 100, (16, 14), flip=True, color=[])
    left_sides = set()
    for seed in range(20):
        result = seeded(transform, seed)(image=image, mask=mask)
        assert result["image"].shape == (16, 14, 3)
        assert result["mask"].shape == (16, 14)
        assert (result["image"][10:] == 128).all()
        assert (result["image"][:, 12:] == 128).all()
        assert (result["mask"][10:] == 255).all()
        assert (result["mask"][:, 12:] == 255).all()
        np.testing.assert_array_equal(result["image"][:10, :12, 0] // 200, result["mask"][:10, :12])
        left_sides.add(int(result["mask"][0, 0]))
    assert left_sides == {0, 1}  # mirrored or not


def test_recipe_without_flip_never_mirrors():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = 200
    transform = train_transforms([8], 100, (8, 8), flip=False, color=[])
    for seed in range(20):
        assert seeded(transform, seed)(image=image, mask=image[..., 0])["image"][0, 0, 0] == 200


def test_color_transforms_do_not_touch_the_padding():
    image, mask = noise(8, 8)
    transform = train_transforms([8], 100, (8, 12), flip=True, color=[A.InvertImg(p=1)])
    result = seeded(transform, 0)(image=image, mask=mask)["image"]
    assert (result[:, 8:] == 128).all()
