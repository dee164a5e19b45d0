import albumentations as A
import numpy as np
import pytest
from mmcv.image import imresize, rescale_size

from tasks.core.data import seed_augmentation
from tasks.core.images import resized_size
from tasks.detection.instances import Instances
from tasks.detection.transforms import Crop, JitterScale, Mirror, Resize, resize_image, train_transforms


def scene(height: int = 60, width: int = 80) -> tuple[np.ndarray, Instances]:
    """An image whose first channel is 10 times the label + 10 inside of each object, which fills its box."""
    boxes = np.array([[4, 6, 24, 30], [40, 10, 70, 50], [70, 0, 80, 8]], dtype=np.float64)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    masks = np.zeros((3, height, width), dtype=np.uint8)
    for label, (x1, y1, x2, y2) in enumerate(boxes.astype(int).tolist()):
        image[y1:y2, x1:x2, 0] = 10 * label + 10
        masks[label, y1:y2, x1:x2] = 1
    return image, Instances(boxes, np.arange(3), masks)


def seeded(transform, seed: int):
    seed_augmentation(transform, seed, 0, 0)
    return transform


def extent(mask: np.ndarray) -> list[int]:
    """The box around the pixels of a mask."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def assert_together(image: np.ndarray, instances: Instances, tolerance: float = 0) -> None:
    """Every object has its own pixels, label and mask; its box is around them."""
    assert len(instances.boxes) == len(instances.labels) == len(instances.masks)
    for box, label, mask in zip(instances.boxes, instances.labels, instances.masks, strict=True):
        assert mask.shape == image.shape[:2]
        np.testing.assert_allclose(box, extent(mask), rtol=0, atol=tolerance)
        if tolerance == 0:
            assert (image[..., 0][mask == 1] == 10 * label + 10).all()


@pytest.mark.parametrize("short", [480, 800])
def test_sizes_are_those_of_mmdet(short):
    draw = np.random.default_rng(short)
    sizes = [(480, 640), (640, 480), (427, 640), (612, 612), (333, 500), (1, 5000), (800, 1333), (801, 1334)]
    for height, width in sizes + draw.integers(20, 2000, (3000, 2)).tolist():
        expected_width, expected_height = rescale_size((width, height), (1333, short))
        assert resized_size(height, width, short, 1333) == (max(expected_height, 1), max(expected_width, 1))


def test_pixels_are_those_of_mmdet():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(image, 80, 107), imresize(image, (107, 80)))
    assert resize_image(image, 48, 64) is image


def test_resizing_scales_boxes_by_the_sides_and_masks_by_the_nearest_pixel():
    image, instances = scene()
    result = Resize([90], 1000)(image=image, instances=instances)
    assert result["image"].shape == (90, 120, 3)
    np.testing.assert_allclose(result["instances"].boxes, instances.boxes * 1.5, rtol=1e-15)
    for mask, before in zip(result["instances"].masks, instances.masks, strict=True):
        np.testing.assert_array_equal(mask, imresize(before, (120, 90), interpolation="nearest"))
    # rounded to whole pixels, the sides have different scales
    result = Resize([31], 1000)(image=image, instances=instances)
    assert result["image"].shape == (31, 41, 3)
    np.testing.assert_allclose(result["instances"].boxes, instances.boxes * ([41 / 80, 31 / 60] * 2), rtol=1e-15)
    assert_together(result["image"], result["instances"], tolerance=1)


def test_resizing_draws_every_short_side_and_keeps_to_the_longer():
    image, instances = scene()
    drawn = {
        seeded(Resize([30, 45, 60], 70), seed)(image=image, instances=instances)["image"].shape for seed in range(30)
    }
    assert drawn == {(30, 40, 3), (45, 60, 3), (53, 70, 3)}


def test_mirroring_is_exact():
    image, instances = scene()
    result = Mirror(p=1)(image=image, instances=instances)
    np.testing.assert_array_equal(result["instances"].boxes[0], [80 - 24, 6, 80 - 4, 30])
    np.testing.assert_array_equal(result["image"], image[:, ::-1])
    assert_together(result["image"], result["instances"])
    twice = Mirror(p=1)(**result)["instances"]
    np.testing.assert_array_equal(twice.boxes, instances.boxes)
    np.testing.assert_array_equal(twice.masks, instances.masks)
    odd = Instances(np.array([[0.1, 0, 0.3, 1]]), np.array([0])).mirrored(1000)
    np.testing.assert_array_equal(odd.boxes, [[1000 - 0.3, 0, 1000 - 0.1, 1]])


def test_cropping_keeps_labels_and_masks_with_their_boxes_and_counts_what_it_drops():
    image, instances = scene()
    cropped = instances.cropped(20, 10, 30, 40)
    np.testing.assert_array_equal(cropped.boxes, [[0, 0, 14, 10], [30, 0, 40, 30]])
    np.testing.assert_array_equal(cropped.labels, [0, 1])
    assert cropped.dropped == 1
    assert_together(image[20:50, 10:50], cropped)
    again = cropped.cropped(0, 0, 30, 10)  # the count goes on
    assert (again.labels.tolist(), again.dropped) == ([0], 2)


def test_an_object_whose_pixels_are_all_outside_is_dropped_although_its_box_is_not():
    masks = np.zeros((1, 10, 10), dtype=np.uint8)
    masks[0, 0, 0] = 1
    instances = Instances(np.array([[0, 0, 8, 8.0]]), np.array([3]), masks)
    assert len(instances.cropped(4, 4, 6, 6)) == 0
    assert len(Instances(instances.boxes, instances.labels).cropped(4, 4, 6, 6)) == 1


def test_every_window_of_a_crop_is_possible_and_none_is_larger_than_the_image():
    image, instances = scene(60, 80)
    shapes, positions = set(), set()
    for seed in range(400):
        crop = seeded(Crop(58, 70), seed)
        result = crop(image=image, instances=instances)
        shapes.add(result["image"].shape[:2])
        positions.add(crop.get_applied_params()["window"][:2])
        assert_together(result["image"], result["instances"])
        assert result["instances"].dropped + len(result["instances"]) == 3
    assert {shape[0] for shape in shapes} == {58, 59, 60}
    assert {shape[1] for shape in shapes} == set(range(58, 71))
    assert {top for top, _ in positions} == {0, 1, 2}
    assert {0, 22} <= {left for _, left in positions}


def test_jittered_scales_stay_in_their_range():
    image, instances = scene()
    longer = []
    for seed in range(200):
        result = seeded(JitterScale(100, (0.1, 2.0)), seed)(image=image, instances=instances)
        height, width = result["image"].shape[:2]
        assert height == pytest.approx(width * 60 / 80, abs=1)
        np.testing.assert_allclose(result["instances"].boxes, instances.boxes * ([width / 80, height / 60] * 2))
        longer.append(width)
    assert 10 <= min(longer) < 20
    assert 180 < max(longer) <= 200


def test_tiny_boxes_are_dropped_and_counted():
    boxes = np.array([[0, 0, 0.99, 5], [0, 0, 1, 1], [0, 0, 5, 0.5]])
    kept = Instances(boxes, np.array([4, 5, 6]), np.zeros((3, 8, 8), dtype=np.uint8)).without_tiny()
    assert (kept.labels.tolist(), kept.dropped, len(kept.masks)) == ([5], 2, 1)


def test_boxes_are_cut_at_the_borders():
    instances = Instances(np.array([[-3, -2, 200, 5], [10, 10, 20, 90.0]]), np.array([0, 1])).clipped(60, 80)
    np.testing.assert_array_equal(instances.boxes, [[0, 0, 80, 5], [10, 10, 20, 60]])


RECIPES = {
    "mmdet": {},
    "multi-scale": {"short_sides": [30, 45, 60]},
    "DETR": {"crop": True, "short_sides": [400, 500]},
    "jitter": {"jitter": (0.1, 2.0)},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_lose_no_object_silently(recipe):
    options = {"short_sides": [60], "max_long_side": 600, "flip": True, "crop": False, "jitter": None}
    transform = train_transforms(**options | RECIPES[recipe])
    empty = Instances(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros((0, 60, 80), dtype=np.uint8))
    seen = set()
    for seed in range(12):
        image, instances = scene()
        result = seeded(transform, seed)(image=image, instances=instances)
        after = result["instances"]
        assert len(after) + after.dropped == 3
        assert_together(result["image"], after, tolerance=1 + result["image"].shape[0] / 60)
        seen.add((result["image"].shape, result["image"].tobytes()))
        again = seeded(transform, seed)(image=image, instances=instances)
        np.testing.assert_array_equal(again["image"], result["image"])
        np.testing.assert_array_equal(again["instances"].boxes, after.boxes)
        nothing = seeded(transform, seed)(image=image, instances=empty)
        assert nothing["image"].shape == result["image"].shape
        assert nothing["instances"].masks.shape == (0, *result["image"].shape[:2])
    assert len(seen) > 1
    assert max(shape[1] for shape, _ in seen) <= 600


def test_recipes_mirror_only_when_asked_to():
    image, instances = scene()
    for flip, expected in ((True, {4, 56}), (False, {4})):
        transform = train_transforms([60], 80, flip, crop=False, jitter=None)
        lefts = {
            seeded(transform, seed)(image=image, instances=instances)["instances"].boxes[0, 0] for seed in range(20)
        }
        assert lefts == expected


def test_detrs_recipe_crops_half_of_the_images():
    transform = train_transforms([600], 1333, flip=False, crop=True, jitter=None)
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    ratios = []
    for seed in range(60):
        nothing = Instances(np.zeros((0, 4)), np.zeros(0, dtype=np.int64))
        height, width = seeded(transform, seed)(image=image, instances=nothing)["image"].shape[:2]
        ratios.append(round(width / height, 2))
    assert 15 < sum(ratio == 1.33 for ratio in ratios) < 45


def test_transforms_of_albumentations_that_move_no_pixel_fit_in():
    image, instances = scene()
    result = A.Compose([Mirror(p=1), A.InvertImg(p=1)])(image=image, instances=instances)
    np.testing.assert_array_equal(result["image"], 255 - image[:, ::-1])
    assert result["instances"].boxes[0, 0] == 56
