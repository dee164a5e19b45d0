import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pycocotools import mask as rle_api
from pycocotools.coco import COCO as PycocotoolsCOCO

from tasks.core.data import DataError, list_samples
from tasks.core.errors import UserError
from tasks.core.images import read_image
from tasks.detection.annotations import Categories
from tasks.detection.data import COCO, CocoDetection, DigitScenes
from tasks.detection.masks import rasterize
from tasks.detection.sample import CATEGORY_IDS

PLAIN = {"num_workers": 0, "train_short_sides": [36], "max_long_side": 48, "test_short_side": 36, "flip": False}


@pytest.fixture
def scenes(tiny_coco):
    """The scenes at their own size."""
    return lambda **options: DigitScenes(str(tiny_coco), **PLAIN | {"with_masks": True} | options)


def test_training_batches_follow_the_contract(scenes):
    data = scenes(batch_size=4, train_short_sides=[24, 40], max_long_side=64, flip=True)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert {name: len(values) for name, values in batch.items()} == dict.fromkeys(batch, 4)
        assert set(batch) == {"id", "image", "size", "boxes", "labels", "masks", "dropped"}
        for i, image in enumerate(batch["image"]):
            count = len(batch["labels"][i])
            assert isinstance(batch["id"][i], str)
            assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
            assert batch["size"][i] in ((36, 48), (48, 36), (48, 48))
            assert (batch["boxes"][i].dtype, batch["boxes"][i].shape) == (torch.float32, (count, 4))
            assert batch["labels"][i].dtype == torch.int64
            assert (batch["masks"][i].dtype, batch["masks"][i].shape) == (torch.uint8, (count, *image.shape[1:]))
            assert batch["dropped"][i] == 0
            boxes = batch["boxes"][i]
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert (boxes <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
            assert set(batch["labels"][i].tolist()) <= set(range(10))


def test_evaluation_batches_hold_the_same_without_augmentation(scenes):
    data = scenes(test_short_side=72, test_max_long_side=80, eval_batch_size=3)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [id for batch in batches for id in batch["id"]] == [str(500001 + number) for number in range(13)]
    for batch in batches:
        for image, size, boxes, masks in zip(
            batch["image"], batch["size"], batch["boxes"], batch["masks"], strict=True
        ):
            assert max(image.shape[1:]) == (72 if size == (48, 48) else 80)
            assert masks.shape[1:] == image.shape[1:]
            for box, mask in zip(boxes, masks, strict=True):
                rows, columns = mask.nonzero(as_tuple=True)
                around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(box, around, rtol=0, atol=2.5)
    assert set(next(iter(data.predict_dataloader()))) == {"id", "image", "size"}
    without = scenes(with_masks=False)
    assert "masks" not in next(iter(without.val_dataloader()))


def test_objects_are_those_of_pycocotools(scenes, tiny_coco, capsys):
    data = scenes()
    coco = PycocotoolsCOCO(tiny_coco / "annotations/instances_val2017.json")
    crowds = 0
    for sample, item in zip(data.samples("val"), data.val_dataset(), strict=True):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[int(sample.id)], iscrowd=False))
        crowds += len(coco.getAnnIds(imgIds=[int(sample.id)], iscrowd=True))
        assert data.categories.to_official(item["labels"].tolist()) == [a["category_id"] for a in annotations]
        image = read_image(sample.image)
        if image.shape[:2] == tuple(item["image"].shape[1:]):
            np.testing.assert_array_equal(item["image"].permute(1, 2, 0), image)
            expected = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
            np.testing.assert_allclose(item["boxes"][:, :2], expected[:, :2], rtol=1e-6)
            np.testing.assert_allclose(item["boxes"][:, 2:], expected[:, :2] + expected[:, 2:], rtol=1e-6)
            for mask, annotation in zip(item["masks"], annotations, strict=True):
                np.testing.assert_array_equal(mask, coco.annToMask(annotation))
    truth = data.ground_truth("val")
    assert sum(annotation["iscrowd"] for annotation in truth["annotations"]) == crowds
    assert truth == {name: coco.dataset[name] for name in ("images", "annotations", "categories")}
    assert data.ground_truth("test") is truth


def test_files_without_areas_and_crowds_are_completed(damaged, tiny_coco):
    def strip(content):
        for annotation in content["annotations"]:
            del annotation["area"]
            if not annotation["iscrowd"]:
                del annotation["iscrowd"]
        del content["annotations"][0]["segmentation"]

    stripped = DigitScenes(str(damaged(strip)[0]), **PLAIN).ground_truth("val")["annotations"]
    whole = DigitScenes(str(tiny_coco), **PLAIN).ground_truth("val")["annotations"]
    assert stripped[0]["area"] == whole[0]["bbox"][2] * whole[0]["bbox"][3]
    for found, expected in zip(stripped[1:], whole[1:], strict=True):
        assert (found["area"], found["iscrowd"]) == (expected["area"], expected["iscrowd"])


def test_crowds_are_kept_for_evaluation_and_not_trained_on(damaged):
    def crowd_everything(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    data = DigitScenes(str(damaged(crowd_everything)[0]), **PLAIN)
    assert all(len(item["labels"]) == 0 for item in data.val_dataset())
    assert all(annotation["iscrowd"] for annotation in data.ground_truth("val")["annotations"])
    assert len(data.ground_truth("val")["annotations"]) > 5


def test_images_without_annotations_are_trained_on_only_when_asked_for(damaged):
    def empty_two(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (1, 2)]

    root, path = damaged(empty_two, "train")
    annotated = {annotation["image_id"] for annotation in json.loads(path.read_text())["annotations"]}
    kept = DigitScenes(str(root), **PLAIN).train_dataset()
    assert {int(sample.id) for sample in kept.samples} == annotated
    data = DigitScenes(str(root), filter_empty=False, with_masks=True, **PLAIN)
    every = data.train_dataset()
    assert {int(sample.id) for sample in every.samples} == set(range(1, 14))
    assert len(data.train_groups()) == 13
    item = every[0]
    assert item["boxes"].shape == (0, 4)
    assert item["labels"].shape == (0,)
    assert item["masks"].shape == (0, *item["image"].shape[1:])
    assert len(DigitScenes(str(root), **PLAIN).val_dataset()) == 13

    root, path = damaged(lambda content: content["annotations"].clear(), "train")
    with pytest.raises(DataError, match=rf"{path}: no image has an annotation"):
        DigitScenes(str(root), **PLAIN).train_dataset()


def test_boxes_that_nothing_can_be_learnt_from_are_left_out_and_noted(damaged):
    def shrink(content):
        first = content["annotations"][0] | {"iscrowd": 0}
        content["annotations"] = [
            first | {"bbox": [3, 4, 10, 10], "id": 1},
            first | {"bbox": [3, 4, 0.9, 10], "id": 2},
            first | {"bbox": [-20, 4, 20, 10], "id": 3},
            first | {"area": 0, "id": 4},
            first | {"ignore": 1, "id": 5},
            first | {"bbox": [-5, -5, 30, 30], "id": 6},
        ]

    root, path = damaged(shrink, "train")
    data = DigitScenes(str(root), **PLAIN)
    listing = data.scan("train")
    assert listing.notes == [
        f"{path}: 3 boxes below 1 pixel, without area or outside of their image are not trained on (annotation 2, 3, 4)"
    ]
    item = data.train_dataset()[0]
    scale = item["image"].shape[1] / item["size"][0]
    np.testing.assert_allclose(item["boxes"] / scale, [[3, 4, 13, 14], [0, 0, 25, 25]])


def test_batches_hold_images_of_one_orientation(damaged):
    data = DigitScenes(str(damaged()[0]), batch_size=2, filter_empty=False, **PLAIN)
    mixed = 0
    for epoch in range(4):
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 6
        mixed += sum(len({width >= height for height, width in batch["size"]}) > 1 for batch in batches)
    assert mixed <= 4  # the last ones
    assert data.train_groups() == [int(sample.size[1] >= sample.size[0]) for sample in data.samples("train")]
    ungrouped = DigitScenes(data.root, group_by_aspect_ratio=False, **PLAIN)
    assert ungrouped.train_groups() is None


def test_training_batches_are_the_same_for_any_number_of_workers(scenes):
    seen = []
    for workers in (0, 2):
        data = scenes(num_workers=workers, batch_size=3, train_short_sides=[24, 30, 36], flip=True)
        loader = data.train_dataloader()
        batches = []
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)
            batches += [(batch["id"], batch["image"], batch["boxes"]) for batch in loader]
        seen.append(batches)
    assert [ids for ids, *_ in seen[0]] == [ids for ids, *_ in seen[1]]
    for (_, *one), (_, *other) in zip(*seen, strict=True):
        for a, b in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
            assert torch.equal(a, b)


def test_a_process_without_images_gets_an_empty_batch():
    batch = list_samples([])
    assert [batch[name] for name in ("id", "image", "size", "boxes", "labels")] == [[]] * 5


def test_coco_has_80_categories_of_ids_1_to_90(tmp_path):
    data = COCO(str(tmp_path))
    ids = data.categories.ids
    assert data.num_classes == len(set(data.class_names)) == len(set(data.palette)) == len(set(ids)) == 80
    assert (ids[0], ids[-1]) == (1, 90)
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [data.class_names[k] for k in (0, 11, 24, 60, 79)] == [
        "person", "stop sign", "backpack", "dining table", "toothbrush",
    ]  # fmt: skip
    assert data.palette[0] == (220, 20, 60)
    labels = list(range(80))
    assert data.categories.to_train(data.categories.to_official(labels)) == labels
    assert data.categories.to_official([79, 11]) == [90, 13]


def test_categories_are_in_the_order_of_their_ids():
    found = Categories.of([{"id": 9, "name": "b"}, {"id": 2, "name": "c"}, {"id": 4, "name": "a"}])
    assert found == Categories((2, 4, 9), ("c", "a", "b"))
    assert found.to_train([9, 2]) == [2, 0]


@pytest.mark.parametrize("module", [COCO, CocoDetection])
def test_missing_data_says_layout_source_and_sample(module, tmp_path):
    with pytest.raises(DataError) as error:
        module(str(tmp_path / "nowhere")).setup("fit")
    message = str(error.value)
    assert "file not found" in message
    assert "nowhere" in message
    assert "Expected layout" in message
    assert "python -m tasks.detection fit -c configs/sample/" in message


def own_data(tiny_coco: Path, root: Path) -> Path:
    root.mkdir()
    for split, name in (("train", "train"), ("val", "val"), ("val", "test")):
        (root / name).symlink_to(tiny_coco / f"{split}2017")  # the folder of images itself may be a link
        (root / f"{name}.json").write_bytes((tiny_coco / f"annotations/instances_{split}2017.json").read_bytes())
    return root


def test_own_data_in_cocos_format(tiny_coco, tmp_path):
    root = own_data(tiny_coco, tmp_path / "own")
    data = CocoDetection(str(root), **PLAIN)
    data.setup("fit")
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.categories.ids == CATEGORY_IDS
    assert len(set(data.palette)) == 10
    assert len(data.val_dataset()) == 13
    assert data.ground_truth("test") is data.ground_truth("val")
    tested = CocoDetection(str(root), test_annotations="test.json", **PLAIN)
    assert tested.splits == ("train", "val", "test")
    tested.setup("test")
    assert tested.ground_truth("test") is not tested.ground_truth("val")
    assert tested.files("test") == (root / "test.json", root / "test")


def test_splits_with_other_categories_are_refused(tiny_coco, tmp_path):
    root = own_data(tiny_coco, tmp_path / "own")
    content = json.loads((root / "train.json").read_text())
    content["categories"][3]["name"] = "drei"
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train.json: other categories .* 7 '3', 7 'drei'"):
        CocoDetection(str(root)).setup("fit")
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(root / split)
        (root / f"annotations/instances_{split}2017.json").write_bytes((root / "val.json").read_bytes())
    with pytest.raises(DataError, match=r"other categories than expected: .* 1 '0', 1 'person'"):
        COCO(str(root)).setup("validate")


def test_predict_reads_images_without_annotations(tiny_coco):
    data = COCO("nowhere", images=str(tiny_coco / "val2017"), **PLAIN)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert len(batches) == 13
    assert batches[0]["id"] == ["000000500001"]
    assert set(batches[0]) == {"id", "image", "size"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_short_sides": []}, "train_short_sides"),
        ({"test_short_side": 0}, "test_short_side: 0"),
        ({"max_long_side": -1}, "max_long_side: -1"),
        ({"jitter": (2.0, 1.0)}, "jitter: "),
        ({"jitter": (0.1, 1.0), "crop": True}, "crop: True was given, false beside jitter"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        COCO("root", **options)


def test_run_lengths_of_both_kinds_become_masks():
    mask = np.zeros((3, 4), dtype=np.uint8)
    mask[1:, 2] = 1
    plain = {"size": [3, 4], "counts": [7, 2, 3]}
    np.testing.assert_array_equal(rasterize([plain], 3, 4)[0], mask)
    packed = {"size": [3, 4], "counts": rle_api.frPyObjects(plain, 3, 4)["counts"].decode()}
    np.testing.assert_array_equal(rasterize([packed], 3, 4)[0], mask)


class Recorder(LightningModule):
    """Learns nothing and keeps the ids of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["id"])
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_resumed_training_goes_on_behind_the_last_batch_of_its_checkpoint(scenes, tmp_path):
    def train(**options):
        module = Recorder()
        checkpoints = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=9)
        trainer = Trainer(
            max_steps=14, accelerator="cpu", callbacks=[checkpoints], logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=scenes(batch_size=2, filter_empty=False), **options)
        return module.seen

    whole = train()  # 6 batches an epoch
    assert len(set(map(tuple, whole))) == 14
    assert train(ckpt_path=tmp_path / "mid.ckpt", weights_only=True) == whole[9:]
