"""Seconds that COCO's box AP takes, beside torchmetrics with pycocotools."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.backbones import machine
from benchmarks.files import write_atomically

HEIGHT, WIDTH = 480, 640
OBJECTS = 7  # per image on average, as COCO's validation images have
PEER_NAMES = {"box_AP": "map", "box_AP50": "map_50", "box_APs": "map_small", "box_AR100": "mar_100"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks metrics``."""
    parser.add_argument("--images", type=int, default=5000, help="images, as COCO's validation split has 5000")
    parser.add_argument("--detections", type=int, default=100, help="detections per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Measure both on the same random detections and print a table."""
    for name in ("images", "detections", "classes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    truth, records = random_detections(arguments.images, arguments.detections, arguments.classes)
    rows = {"ours": measure_ours(truth, records, arguments.classes), "torchmetrics": measure_peer(truth, records)}
    for name, peer_name in PEER_NAMES.items():
        ours, peer = rows["ours"]["numbers"][name], rows["torchmetrics"]["numbers"][peer_name]
        if abs(ours - peer) > 1e-5:  # torchmetrics computes the sides of boxes in float32
            raise RuntimeError(f"{name} is {ours}, that of torchmetrics {peer}")
    options = {name: getattr(arguments, name) for name in ("images", "detections", "classes")}
    results = {"machine": machine(torch.device("cpu")), "options": options, "rows": rows}
    print(table(results))
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(results, indent=2) + "\n")


def random_detections(num_images: int, num_detections: int, num_classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ground truth in COCO's form, category ids from 1, and records by image id that find much of it."""
    draw = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    records = {}
    for id in range(1, num_images + 1):
        images.append({"id": id, "height": HEIGHT, "width": WIDTH})
        count = int(draw.integers(1, 2 * OBJECTS))
        corners = draw.uniform(0, (WIDTH / 2, HEIGHT / 2), (count, 2))
        sides = np.exp(draw.uniform(np.log(8), np.log(240), (count, 2)))
        labels = draw.integers(0, num_classes, count)
        for corner, side, label in zip(corners.tolist(), sides.tolist(), labels.tolist(), strict=True):
            box = {"bbox": corner + side, "area": side[0] * side[1], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": id, "category_id": label + 1} | box)
        near = draw.integers(0, count, num_detections)
        found = np.concatenate([corners, corners + sides], axis=1)[near] + draw.normal(0, 5, (num_detections, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        same = draw.random(num_detections) < 0.7
        records[str(id)] = {
            "boxes": found.astype(np.float32),
            "scores": draw.random(num_detections, dtype=np.float32),
            "labels": np.where(same, labels[near], draw.integers(0, num_classes, num_detections)),
            "masks": None,
        }
    categories = [{"id": label + 1, "name": str(label)} for label in range(num_classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, records


def measure_ours(truth: dict[str, Any], records: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Seconds of updates and of compute, and the numbers."""
    from tasks.detection.metrics import DetectionMetrics  # benchmarks of backbones run without what tasks need

    metrics = DetectionMetrics(("box",))
    begin = time.perf_counter()
    for id, record in records.items():
        metrics.update(id, record)
    middle = time.perf_counter()
    numbers = metrics.compute(truth, range(1, num_classes + 1))
    return _row(begin, middle, {name: value for name, value in numbers.items() if isinstance(value, float)})


def measure_peer(truth: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """The same of torchmetrics, which gets the ground truth with each image: making the tensors is not timed.

    It has COCO's thresholds in double precision; by default it rounds them to float32, which moves AP by some 1e-4.
    """
    from torchmetrics.detection import MeanAveragePrecision

    targets: dict[str, dict[str, list[Any]]] = {id: {"boxes": [], "labels": [], "area": []} for id in records}
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        target = targets[str(annotation["image_id"])]
        target["boxes"].append([x, y, x + width, y + height])
        target["labels"].append(annotation["category_id"] - 1)
        target["area"].append(annotation["area"])
    predictions = [
        {name: torch.from_numpy(record[name]) for name in ("boxes", "scores", "labels")} for record in records.values()
    ]
    tensors = [{name: torch.tensor(values) for name, values in targets[id].items()} for id in records]
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    metric = MeanAveragePrecision(backend="pycocotools", **thresholds)
    begin = time.perf_counter()
    for prediction, truth_of_image in zip(predictions, tensors, strict=True):
        metric.update([prediction], [truth_of_image])
    middle = time.perf_counter()
    numbers = metric.compute()
    return _row(begin, middle, {name: float(value) for name, value in numbers.items() if value.numel() == 1})


def _row(begin: float, middle: float, numbers: dict[str, float]) -> dict[str, Any]:
    end = time.perf_counter()
    return {"update": middle - begin, "compute": end - middle, "total": end - begin, "numbers": numbers}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows, options = results["rows"], results["options"]
    lines = [
        f"{results['machine']}; {options['images']} images, {options['detections']} detections each, "
        f"{options['classes']} classes, box AP, wall time, one run",
        "",
        "| evaluation | update, s | compute, s | total, s | of torchmetrics |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        seconds = [f"{row[part]:.2f}" for part in ("update", "compute", "total")]
        lines.append(f"| {name} | {' | '.join(seconds)} | {row['total'] / rows['torchmetrics']['total']:.3f} |")
    return "\n".join(lines)
