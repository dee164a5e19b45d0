import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from tasks.classification.transforms import AlbumentationsTransform, TimmTransform, evaluation_transform
from tasks.core.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = {
    "interpolation": "bicubic",
    "crop_scale": (1.0, 1.0),
    "hflip": 0.0,
    "auto_augment": None,
    "color_jitter": 0.0,
    "random_erasing": 0.0,
}
RECIPE = {
    "interpolation": "bicubic",
    "crop_scale": (0.08, 1.0),
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "random_erasing": 0.25,
}


def photo(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth and grainy parts, so that filters and positions matter."""
    generator = np.random.default_rng(0)
    smooth = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((smooth + generator.integers(0, 56, (height, width, 3))).astype(np.uint8))


def timm_transform(size: int = 64, **options) -> TimmTransform:
    return TimmTransform(size, MEAN, STD, **OFF | options)


def normalised(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    return (torch.from_numpy(array) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# -- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (40, 33)])
@pytest.mark.parametrize(("image_size", "crop_pct", "shorter_side"), [(224, 0.875, 256), (384, 1.0, 384)])
def test_evaluation_is_exactly_that_of_the_official_code(size, image_size, crop_pct, shorter_side):
    image = photo(*size)
    official = T.Compose(
        [
            T.Resize(shorter_side, InterpolationMode.BICUBIC),
            T.CenterCrop(image_size),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    ours = evaluation_transform(image_size, MEAN, STD, "bicubic", crop_pct)(image)
    assert torch.equal(ours, official(image))
    assert ours.shape == (3, image_size, image_size)


def test_evaluation_without_crop_resizes_the_whole_image_to_the_square():
    image = photo(500, 375)
    expected = normalised(image.resize((384, 384), Image.Resampling.BICUBIC))
    result = evaluation_transform(384, MEAN, STD, "bicubic", None)(image)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    other = evaluation_transform(384, MEAN, STD, "bilinear", None)(image)
    torch.testing.assert_close(
        other, normalised(image.resize((384, 384), Image.Resampling.BILINEAR)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("crop_pct", [0.0, 1.1, -1.0])
def test_impossible_share_of_the_side(crop_pct):
    with pytest.raises(UserError, match="crop_pct"):
        evaluation_transform(224, MEAN, STD, "bicubic", crop_pct)


# -- timm's recipe --------------------------------------------------------------------------------------------------


def test_with_everything_off_the_image_is_only_resized():
    image = photo(150, 150)
    expected = normalised(image.resize((64, 64), Image.Resampling.BICUBIC))
    torch.testing.assert_close(timm_transform()(image, 0, 0, 0), expected, rtol=0, atol=1e-6)


def test_mirror_image():
    image = photo(64, 64)
    plain = timm_transform()(image, 0, 0, 0)
    assert torch.equal(timm_transform(hflip=1.0)(image, 0, 0, 0), plain.flip(2))


def test_crop_shows_a_part_of_the_image():
    image = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, 0).repeat(3, 2))
    transform = timm_transform(crop_scale=(0.08, 0.1))
    for index in range(10):
        row = transform(image, 0, 0, index)[0, 32] * STD[0] * 255 + MEAN[0] * 255
        share = float(row[-1] - row[0]) / 199  # of the width
        assert 0.2 < share < 0.4  # square root of the area, with an aspect ratio of 3/4 to 4/3


def test_erasing_fills_one_rectangle_with_noise():
    image = photo(64, 64)
    plain = timm_transform()(image, 0, 0, 0)
    changed = (timm_transform(random_erasing=1.0)(image, 0, 0, 1) != plain).all(0)
    rows, columns = changed.any(1).nonzero().ravel(), changed.any(0).nonzero().ravel()
    assert 0.02 * 64 * 64 * 0.9 < changed.sum() < 0.34 * 64 * 64
    assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_colour_jitter_is_for_trainings_without_a_policy():
    image = photo(64, 64)
    jittered = timm_transform(color_jitter=0.4)(image, 0, 0, 0)
    assert not torch.equal(jittered, timm_transform()(image, 0, 0, 0))
    policy = timm_transform(auto_augment="rand-m9-mstd0.5-inc1")
    both = timm_transform(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    assert any(not torch.equal(policy(image, 0, 0, index), timm_transform()(image, 0, 0, index)) for index in range(5))
    for index in range(5):
        assert torch.equal(policy(image, 0, 0, index), both(image, 0, 0, index))


def test_recipe_is_that_of_timm():
    official = create_transform(
        224, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1,
    )  # fmt: skip
    ours = TimmTransform(224, MEAN, STD, **RECIPE)
    assert str(ours.transform) == str(official)
    erasing, expected = ours.transform.transforms[-1], official.transforms[-1]
    assert vars(erasing) == vars(expected)


@pytest.mark.parametrize("policy", ["rand-m10-n5-inc1", "rand-m10-n3", "original", "v0"])
def test_strongest_policies_run_with_every_pillow(policy):
    """A posterisation that keeps none of the bits, which newer releases refuse, makes the image black."""
    transform = timm_transform(32, auto_augment=policy)
    image = photo(32, 32)
    for index in range(300):
        assert transform(image, 0, 0, index).isfinite().all()


def draw(transform, *key, seed_of_the_process: int = 0):
    random.seed(seed_of_the_process)
    np.random.seed(seed_of_the_process)  # noqa: NPY002
    torch.manual_seed(seed_of_the_process)
    return transform(photo(), *key).numpy().tobytes()


def both_transforms():
    every = [{"HorizontalFlip": {"p": 0.5}}, {"Affine": {"rotate": [-20, 20]}}, {"RandomBrightnessContrast": {"p": 1}}]
    return {
        "timm": TimmTransform(64, MEAN, STD, **RECIPE),
        "own": AlbumentationsTransform(every, 64, MEAN, STD, "bicubic"),
    }


@pytest.mark.parametrize("name", ["timm", "own"])
def test_augmentation_depends_on_seed_epoch_and_index_only(name):
    transform = both_transforms()[name]
    first = draw(transform, 0, 1, 2)
    for process in (1, 2):
        draw(transform, 5, 6, 7)  # what came before does not matter
        assert draw(transform, 0, 1, 2, seed_of_the_process=process) == first
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2), (0, 2, 1)]
    assert len({draw(transform, *key) for key in keys}) == len(keys)


def test_augmentation_leaves_the_global_generators_alone():
    transform = both_transforms()["timm"]

    def three_numbers():
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = three_numbers()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    for index in range(20):
        transform(photo(), 0, 0, index)
    assert three_numbers() == expected


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"hflip": 1.5}, "hflip"),
        ({"random_erasing": -0.1}, "random_erasing"),
        ({"color_jitter": 2.0}, "color_jitter"),
        ({"auto_augment": "randd-m9"}, "auto_augment: 'randd-m9' was given, a policy of timm"),
        ({"auto_augment": "rand-x9"}, "auto_augment: 'rand-x9' was given"),
    ],
)
def test_impossible_options_of_the_recipe(options, part):
    with pytest.raises(UserError) as error:
        timm_transform(**options)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


# -- albumentations -------------------------------------------------------------------------------------------------


def test_transforms_of_albumentations_by_name():
    image = photo(64, 64)
    transform = AlbumentationsTransform([{"HorizontalFlip": {"p": 1.0}}], 64, MEAN, STD, "bicubic")
    assert torch.equal(transform(image, 0, 0, 0), normalised(image).flip(2))


def test_result_of_another_size_is_resized_to_the_square():
    image = photo()
    transform = AlbumentationsTransform([], 48, MEAN, STD, "bicubic")
    expected = normalised(image.resize((48, 48), Image.Resampling.BICUBIC))
    torch.testing.assert_close(transform(image, 0, 0, 0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("transform", "part"),
    [
        ({"Affin": {}}, "augmentation: 'Affin' was given, an image transform of albumentations"),
        ({"Compose": {}}, "augmentation: 'Compose' was given"),
        ({"random": {}}, "augmentation: 'random' was given"),
        ({"Affine": {"rotat": 3}}, "augmentation.Affine: {'rotat': 3} was given; Argument(s) 'rotat' are not valid"),
        ({"Affine": {"rotate": "far"}}, "augmentation.Affine: {'rotate': 'far'} was given"),
        ({"Affine": {}, "HorizontalFlip": {}}, "one name with its arguments was expected"),
    ],
)
def test_transform_that_does_not_exist(transform, part):
    with pytest.raises(UserError) as error:
        AlbumentationsTransform([transform], 32, MEAN, STD, "bicubic")
    assert part in str(error.value)
    assert "\n" not in str(error.value)
