"""COCO's average precision and recall of boxes and masks, equal to pycocotools for any number of processes.

pycocotools defines the numbers; faster-coco-eval computes the same ones in C++ (the tests compare them to 1e-12).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle_api
from rich.console import Console

from tasks.core.errors import UserError, expect
from tasks.core.evaluation import gather_by_id
from tasks.detection.masks import to_rle

IouType = Literal["box", "mask"]
Record = Mapping[str, Any]  # what was found in one image: see `DetectionMetrics.update`
COCO_NAMES = {"box": "bbox", "mask": "segm"}
MAX_DETECTIONS = (1, 10, 100)  # axis M; per image and class
IOU_50, IOU_75 = 0, 5  # places on axis T: 0.5, 0.55, ..., 0.95
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class DetectionMetrics:
    """Collects what was found in each image and computes COCO's twelve numbers for boxes, masks or both.

    Detections are float32 as networks give them. They become float64 before anything is computed, as when mmdet writes
    them to COCO's JSON: width is x2 - x1 in float64. The area of a detection, which decides whether it counts as small,
    medium or large where it matches nothing, is that of its box among boxes and that of its mask among masks.
    """

    def __init__(self, iou_types: Sequence[IouType] = ("box",)) -> None:
        for iou_type in iou_types:
            expect("iou_types", iou_type, iou_type in COCO_NAMES, "'box' or 'mask'")
        self.iou_types = tuple(iou_types)
        self._records: dict[str, Record] = {}

    def reset(self) -> None:
        """Forget all records."""
        self._records = {}

    def update(self, id: str, record: Record) -> None:
        """Keep what was found in the image `id`, in pixels of the original image.

        `record` has boxes (n, 4) xyxy, scores (n,), labels (n,) train ids and masks: n run-length encodings, or None
        where no masks are evaluated. Raises UserError if its parts do not fit together or are not finite.
        """
        if id in self._records:
            raise UserError(f"image id {id!r}: a second record; expected one per image")
        _check(id, record, "mask" in self.iou_types)
        self._records[id] = record

    def compute(self, ground_truth: Mapping[str, Any], label_to_category: Sequence[int]) -> dict[str, Any]:
        """Evaluate the records of all processes; every process must call it and gets the same result.

        Args:
            ground_truth: Images, annotations and categories as in COCO's annotation files. Images without a record
                count as images in which nothing was found.
            label_to_category: Category id of each train id.

        Returns:
            ``box_AP``, ``box_AP50``, ``box_AP75``, ``box_APs``, ``box_APm``, ``box_APl``, ``box_AR1``, ``box_AR10``,
            ``box_AR100``, ``box_ARs``, ``box_ARm``, ``box_ARl`` and the same for ``mask_``: floats in 0..1, NaN where
            no object is; ``box_class_AP`` and ``mask_class_AP``: (K,), by train id, NaN likewise; ``bbox`` and
            ``segm``: dictionaries of pycocotools' arrays ``precision`` (T, R, K, A, M) and ``recall`` (T, K, A, M),
            with -1 where no object is, K by train id.
        """
        records = gather_by_id(self._records)
        outcome: list[Any] = [None]
        if not _is_distributed() or dist.get_rank() == 0:
            try:
                outcome = [self._evaluate(records, ground_truth, label_to_category)]
            except UserError as error:  # the other processes wait
                outcome = [error]
        if _is_distributed():
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def _evaluate(
        self,
        records: Mapping[str, Record],
        ground_truth: Mapping[str, Any],
        label_to_category: Sequence[int],
    ) -> dict[str, Any]:
        known = {str(image["id"]): image["id"] for image in ground_truth["images"]}
        for id, record in records.items():
            expect("image id", id, id in known, "one of the annotation file")
            labels = record["labels"]
            valid = len(labels) == 0 or (labels.min() >= 0 and labels.max() < len(label_to_category))
            expect(f"labels of image {id}", labels, valid, f"train ids 0..{len(label_to_category) - 1}")
        found = {known[id]: record for id, record in records.items()}  # equal scores will be ranked by image id
        result: dict[str, Any] = {}
        for iou_type in self.iou_types:
            with Console(stderr=True).status(f"Evaluating {iou_type} AP"):
                arrays = average_precision(ground_truth, found, label_to_category, iou_type)
            numbers = dict(zip(NAMES, twelve_numbers(**arrays), strict=True))
            result |= {f"{iou_type}_{name}": value for name, value in numbers.items()}
            result[f"{iou_type}_class_AP"] = class_means(arrays["precision"][..., 0, -1])
            result[COCO_NAMES[iou_type]] = arrays
        return result


def average_precision(
    ground_truth: Mapping[str, Any],
    records: Mapping[int, Record],
    label_to_category: Sequence[int],
    iou_type: IouType,
) -> dict[str, np.ndarray]:
    """Precision (T, R, K, A, M) and recall (T, K, A, M) of records by image id, as `COCOeval.accumulate` has them."""
    is_mask = iou_type == "mask"
    truth, detections = COCO(), COCO()
    fixed = {"images": list(ground_truth["images"]), "categories": list(ground_truth["categories"])}
    truth.dataset = fixed | {"annotations": list(_truths(ground_truth, is_mask))}
    detections.dataset = fixed | {"annotations": list(_detections(records, label_to_category, is_mask))}
    truth.createIndex()
    detections.createIndex()
    evaluation = COCOeval_faster(truth, detections, COCO_NAMES[iou_type])
    evaluation.params.catIds = sorted(label_to_category)
    evaluation.evaluate()
    evaluation.accumulate()
    by_label = np.argsort(np.argsort(label_to_category))
    return {
        "precision": evaluation.eval["precision"][:, :, by_label],
        "recall": evaluation.eval["recall"][:, by_label],
    }


def _truths(ground_truth: Mapping[str, Any], is_mask: bool) -> Iterator[dict[str, Any]]:
    """Copies of the annotations, which evaluation writes to, with what it reads.

    They are numbered from 1: pycocotools takes an object whose id is 0 for one that nothing matched.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        copy = {key: annotation[key] for key in ("image_id", "category_id", "bbox", "area", "iscrowd")} | {"id": number}
        if is_mask:
            copy["segmentation"] = to_rle(annotation["segmentation"], *sizes[annotation["image_id"]])
        yield copy


def _detections(
    records: Mapping[int, Record], label_to_category: Sequence[int], is_mask: bool
) -> Iterator[dict[str, Any]]:
    number = 0
    for image_id, record in records.items():
        boxes = np.asarray(record["boxes"]).astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        areas = boxes[:, 2] * boxes[:, 3]
        masks = record["masks"] if is_mask else [None] * len(boxes)
        if is_mask:
            areas = rle_api.area(masks) if masks else areas
        scores, labels = np.asarray(record["scores"]).tolist(), np.asarray(record["labels"]).tolist()
        for box, area, score, label, mask in zip(boxes.tolist(), areas.tolist(), scores, labels, masks, strict=True):
            number += 1
            detection = {"id": number, "image_id": image_id, "category_id": label_to_category[label], "bbox": box}
            detection |= {"area": area, "score": score, "iscrowd": 0}
            yield detection | {"segmentation": mask} if is_mask else detection


def twelve_numbers(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """COCO's numbers in the order of `NAMES`: means over what is defined, NaN where nothing is."""
    all_areas = [precision[..., 0, -1], precision[IOU_50, ..., 0, -1], precision[IOU_75, ..., 0, -1]]
    by_area = [precision[..., area, -1] for area in (1, 2, 3)]
    by_count = [recall[..., 0, count] for count in range(len(MAX_DETECTIONS))]
    return [_mean(part) for part in (*all_areas, *by_area, *by_count, *(recall[..., area, -1] for area in (1, 2, 3)))]


def class_means(values: np.ndarray) -> np.ndarray:
    """Means (K,) of (..., K) over what is defined; NaN for a class without objects."""
    return np.array([_mean(values[..., k]) for k in range(values.shape[-1])])


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")


def _check(id: str, record: Record, with_masks: bool) -> None:
    boxes, scores, labels = (np.asarray(record[name]) for name in ("boxes", "scores", "labels"))
    shapes = boxes.shape, scores.shape, labels.shape
    fits = shapes == ((len(labels), 4), (len(labels),), (len(labels),))
    expect(f"record of image {id}", shapes, fits, "boxes (n, 4), scores (n,) and labels (n,)")
    finite = bool(np.isfinite(boxes).all() and np.isfinite(scores).all())
    expect(f"record of image {id}", "boxes or scores that are NaN or infinite", finite, "finite numbers")
    if with_masks:
        masks = record["masks"]
        found = None if masks is None else len(masks)
        expect(f"masks of image {id}", found, found == len(labels), f"one for each of {len(labels)} boxes")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
