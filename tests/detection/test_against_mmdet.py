"""Images, boxes, labels and masks equal those of mmdet's data set and pipeline, mirrored and not."""

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")

from tasks.detection.data import COCO, DigitScenes
from tasks.detection.sample import categories

SHORT, LONG = 101, 131  # sides become whole pixels in another ratio


@pytest.fixture(scope="module")
def mmdet_items(tiny_coco):
    """The training items of mmdet by image id, always mirrored or never."""
    from tasks.core.openmmlab import install

    install()
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()

    def items(mirrored, test_mode=False):
        pipeline = [
            {"type": "LoadImageFromFile", "imdecode_backend": "pillow"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "Resize", "scale": (LONG, SHORT), "keep_ratio": True},
            {"type": "RandomFlip", "prob": float(mirrored)},
            {"type": "PackDetInputs"},
        ]
        split = "val" if test_mode else "train"
        dataset = CocoDataset(
            ann_file=str(tiny_coco / f"annotations/instances_{split}2017.json"),
            data_prefix={"img": str(tiny_coco / f"{split}2017")},
            metainfo={"classes": tuple(category["name"] for category in categories())},
            filter_cfg={"filter_empty_gt": True},
            pipeline=pipeline,
            test_mode=test_mode,
        )
        found = [dataset[i] for i in range(len(dataset))]
        return {str(item["data_samples"].img_id): item for item in found}

    return items


@pytest.mark.parametrize("mirrored", [False, True])
def test_training_items_are_those_of_mmdet(mmdet_items, tiny_coco, mirrored):
    data = DigitScenes(str(tiny_coco), train_short_sides=[SHORT], max_long_side=LONG, flip=mirrored, with_masks=True)
    dataset = data.train_dataset()
    if mirrored:
        dataset.transform.transforms[-1].p = 1.0
    expected = mmdet_items(mirrored)
    assert {sample.id for sample in dataset.samples} == set(expected)
    objects = 0
    for index, sample in enumerate(dataset.samples):
        item, other = dataset[index], expected[sample.id]
        np.testing.assert_array_equal(item["image"], other["inputs"].flip(0))  # mmdet has BGR
        truth = other["data_samples"].gt_instances
        # mmdet scales and mirrors boxes in float32
        np.testing.assert_allclose(item["boxes"], truth.bboxes.tensor, rtol=1e-6, atol=2e-5)
        np.testing.assert_array_equal(item["labels"], truth.labels)
        np.testing.assert_array_equal(item["masks"], truth.masks.masks.reshape(item["masks"].shape))
        objects += len(item["labels"])
    assert objects > 10


def test_evaluation_items_are_those_of_mmdet(mmdet_items, tiny_coco):
    data = DigitScenes(str(tiny_coco), test_short_side=SHORT, test_max_long_side=LONG)
    expected = mmdet_items(mirrored=False, test_mode=True)
    items = list(data.val_dataset())
    assert [item["id"] for item in items] == list(expected)
    for item in items:
        other = expected[item["id"]]
        np.testing.assert_array_equal(item["image"], other["inputs"].flip(0))
        assert item["size"] == other["data_samples"].ori_shape


def test_classes_and_colours_of_coco_are_those_of_mmdet(mmdet_items):
    from mmdet.datasets import CocoDataset

    assert tuple(COCO("nowhere").class_names) == CocoDataset.METAINFO["classes"]
    assert COCO("nowhere").palette == CocoDataset.METAINFO["palette"]
