"""Average precision equals that of pycocotools, in one process and in several."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as rle_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.core.errors import UserError
from tasks.detection.metrics import NAMES, DetectionMetrics, class_means

HEIGHT, WIDTH = 120, 160
EXACT = {"rtol": 0, "atol": 1e-12}


def polygon(box: np.ndarray) -> list[float]:
    """A diamond in a box of x1, y1, x2, y2."""
    x1, y1, x2, y2 = box.tolist()
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return [x, y1, x2, y, x, y2, x1, y]


def crowd_rle(box: np.ndarray) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    x1, y1, x2, y2 = box.astype(int).tolist()
    mask[y1:y2, x1:x2] = 1
    runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(runs, prepend=0, append=mask.size).tolist()}


def random_boxes(draw: np.random.Generator, count: int) -> np.ndarray:
    """Boxes on a coarse grid, so that many overlap equally."""
    corner = draw.integers(0, 12, (count, 2)) * np.array([10, 7])
    return np.concatenate([corner, corner + draw.integers(2, 9, (count, 2)) * 5.5], axis=1).clip(0, [160, 120] * 2)


def random_set(seed: int, num_images: int | None = None) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Ground truth, records and category ids: ties, crowds, empty images, images without a record, > 100 detections."""
    draw = np.random.default_rng(seed)
    num_classes = int(draw.integers(1, 5))
    category_ids = sorted(draw.choice(90, num_classes, replace=False).tolist())
    num_images = int(draw.integers(1, 9)) if num_images is None else num_images
    image_ids = draw.choice(2000, num_images, replace=False).tolist()  # as numbers in another order than as text
    images = [{"id": id, "height": HEIGHT, "width": WIDTH, "file_name": f"{id}.jpg"} for id in image_ids]
    annotations: list[dict[str, Any]] = []
    records = {}
    for id in image_ids:
        boxes = random_boxes(draw, int(draw.integers(0, 8)))
        labels = draw.integers(0, num_classes, len(boxes))
        for box, label in zip(boxes, labels, strict=True):
            crowd = bool(draw.random() < 0.15)
            width, height = (box[2:] - box[:2]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": id,
                    "category_id": category_ids[label],
                    "bbox": [*box[:2].tolist(), width, height],
                    "area": width * height * float(draw.uniform(0.3, 1)),
                    "iscrowd": int(crowd),
                    "segmentation": crowd_rle(box) if crowd else [polygon(box)],
                }
            )
        if draw.random() < 0.15:
            continue  # no record
        count = int(draw.choice([0, 3, 20, 130]))
        found = random_boxes(draw, count)
        near = draw.random(count) < 0.6
        if len(boxes) and near.any():
            found[near] = boxes[draw.integers(0, len(boxes), near.sum())] + draw.integers(-2, 3, (near.sum(), 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found = (found + draw.choice([0, 0.1], (count, 1))).astype(np.float32)
        records[str(id)] = {
            "boxes": found,
            "scores": (draw.integers(0, 30, count) / 30).astype(np.float32),
            "labels": draw.integers(0, num_classes, count),
            "masks": [rle_api.frPyObjects([polygon(box.astype(float))], HEIGHT, WIDTH)[0] for box in found],
        }
    categories = [{"id": id, "name": str(id)} for id in category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}, records, category_ids


def reference(truth: dict[str, Any], records: dict[str, Any], category_ids: list[int], kind: str) -> COCOeval:
    """pycocotools as mmdet calls it: results in COCO's JSON, boxes left out of those for masks."""
    results = []
    for id, record in records.items():
        for n, (x1, y1, x2, y2) in enumerate(record["boxes"].tolist()):
            result = {"image_id": int(id), "category_id": category_ids[record["labels"][n]]}
            result["score"] = float(record["scores"][n])
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = record["masks"][n]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        if results:
            found = coco.loadRes(results)
        else:
            found = COCO()
            found.dataset = coco.dataset | {"annotations": []}
            found.createIndex()
        evaluation = COCOeval(coco, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal_to_pycocotools(result, truth, records, category_ids):
    for iou_type, kind in (("box", "bbox"), ("mask", "segm")):
        expected = reference(truth, records, category_ids, kind)
        stats = np.where(expected.stats == -1, np.nan, expected.stats)
        np.testing.assert_allclose([result[f"{iou_type}_{name}"] for name in NAMES], stats, **EXACT)
        for name in ("precision", "recall"):
            np.testing.assert_allclose(result[kind][name], expected.eval[name], **EXACT)
        precision = expected.eval["precision"][..., 0, -1]
        per_class = [np.mean(p[p > -1]) if (p > -1).any() else np.nan for p in np.moveaxis(precision, -1, 0)]
        np.testing.assert_allclose(result[f"{iou_type}_class_AP"], per_class, **EXACT)


def metrics_of(records: dict[str, Any], iou_types=("box", "mask")) -> DetectionMetrics:
    metrics = DetectionMetrics(iou_types)
    for id, record in records.items():
        metrics.update(id, record)
    return metrics


def test_numbers_equal_pycocotools_on_random_sets():
    sizes = set()
    defined = []
    for seed in range(50):
        truth, records, category_ids = random_set(seed)
        result = metrics_of(records).compute(truth, category_ids)
        assert_equal_to_pycocotools(result, truth, records, category_ids)
        sizes |= {len(record["scores"]) for record in records.values()}
        defined.append(result["box_AP"])
    assert {0, 130} <= sizes
    assert np.nanmax(defined) > 0.3


def one_of_several(rank: int, folder: str) -> None:
    """What each of three processes does: 13 images over three and over two processes, two sets of few images."""
    expected = None
    for world_size in (3, 2):
        if rank >= world_size:
            return
        store = f"file://{folder}/{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        truth, records, category_ids = random_set(7, num_images=13)
        mine = dict(list(records.items())[rank::world_size])
        result = metrics_of(mine).compute(truth, category_ids)
        assert_equal_to_pycocotools(result, truth, records, category_ids)
        numbers = [result[name] for name in sorted(result) if isinstance(result[name], float)]
        assert expected is None or np.array_equal(numbers, expected, equal_nan=True)
        expected = numbers
        for seed in range(3):  # also more processes than images
            truth, records, category_ids = random_set(seed, num_images=seed + 1)
            result = metrics_of(dict(list(records.items())[rank::world_size])).compute(truth, category_ids)
            assert_equal_to_pycocotools(result, truth, records, category_ids)
        unknown = metrics_of({"-5": next(iter(records.values()))} if rank == 1 else {})
        with pytest.raises(UserError, match="-5"):  # on every process, none of which waits for another
            unknown.compute(truth, category_ids)
        dist.destroy_process_group()


@pytest.mark.slow
def test_numbers_are_the_same_for_any_number_of_processes(tmp_path):
    mp.spawn(one_of_several, (str(tmp_path),), nprocs=3)


def test_classes_are_in_the_order_of_train_ids():
    truth, records, category_ids = random_set(3, num_images=6)
    assert len(category_ids) > 1
    result = metrics_of(records, ("box",)).compute(truth, category_ids)
    backwards = {id: record | {"labels": len(category_ids) - 1 - record["labels"]} for id, record in records.items()}
    other = metrics_of(backwards, ("box",)).compute(truth, category_ids[::-1])
    np.testing.assert_array_equal(other["box_class_AP"], result["box_class_AP"][::-1])
    np.testing.assert_array_equal(other["bbox"]["precision"], result["bbox"]["precision"][:, :, ::-1])
    assert other["box_AP"] == pytest.approx(result["box_AP"], abs=1e-12)


def test_an_object_with_id_zero_can_be_found():
    annotation = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "height": 20, "width": 20}],
        "annotations": [annotation | {"id": 0}],
        "categories": [{"id": 3, "name": "a"}],
    }
    record = {"boxes": np.float32([[0, 0, 10, 10]]), "scores": np.float32([0.5]), "labels": np.array([0])}
    metrics = metrics_of({"1": record}, ("box",))
    before = json.dumps(truth)
    assert metrics.compute(truth, [3])["box_AP"] == 1
    assert json.dumps(truth) == before
    metrics.reset()
    assert metrics.compute(truth, [3])["box_AP"] == 0
    assert np.isnan(metrics.compute(truth | {"annotations": []}, [3])["box_AP"])


def test_boxes_become_double_before_their_sides_are_computed():
    """An overlap of exactly one half, which a width rounded to float32 would miss."""
    x1, x2 = np.float32(0.1), np.float32(10.3)
    width = float(x2) - float(x1)
    assert float(x2 - x1) < width
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [float(x1), 0, 2 * width, 8], "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "height": 200, "width": 200}],
        "annotations": [annotation | {"area": 16 * width}],
        "categories": [{"id": 1, "name": "a"}],
    }
    record = {"boxes": np.float32([[x1, 0, x2, 8]]), "scores": np.float32([1]), "labels": np.array([0])}
    result = metrics_of({"1": record}, ("box",)).compute(truth, [1])
    expected = reference(truth, {"1": record}, [1], "bbox").stats[1]
    np.testing.assert_allclose([result["box_AP50"], expected], 1, **EXACT)


def test_class_means_leave_out_what_is_undefined():
    values = np.array([[0.5, -1.0, -1.0], [1.0, 0.2, -1.0]])
    np.testing.assert_array_equal(class_means(values), [0.75, 0.2, np.nan])


GOOD = {"boxes": np.zeros((1, 4)), "scores": np.ones(1), "labels": np.zeros(1, dtype=int), "masks": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((2, 4))}, r"record of image 5: .*boxes \(n, 4\)"),
        ({"scores": np.ones((1, 1))}, r"record of image 5: .*scores \(n,\)"),
        ({"scores": np.array([np.nan])}, "NaN or infinite"),
        ({"boxes": np.array([[0, 0, np.inf, 1]])}, "NaN or infinite"),
        ({"masks": []}, "masks of image 5: 0 was given, one for each of 1 boxes"),
        ({}, "masks of image 5: None"),
    ],
)
def test_records_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DetectionMetrics(("box", "mask")).update("5", GOOD | change)


def test_unknown_ids_and_labels_are_refused():
    truth, _, category_ids = random_set(0)
    id = str(truth["images"][0]["id"])
    metrics = metrics_of({id: GOOD}, ("box",))
    with pytest.raises(UserError, match="second record"):
        metrics.update(id, GOOD)
    with pytest.raises(UserError, match="image id"):
        metrics_of({"nowhere": GOOD}, ("box",)).compute(truth, category_ids)
    with pytest.raises(UserError, match=f"labels of image {id}: .*train ids 0"):
        metrics_of({id: GOOD | {"labels": np.array([80])}}, ("box",)).compute(truth, category_ids)
    with pytest.raises(UserError, match="iou_types: 'keypoints'"):
        DetectionMetrics(("keypoints",))
