"""Time of the evaluator of temporal action detection beside a loop written like the official programs."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.backbones import machine
from benchmarks.files import write_atomically
from benchmarks.timing import Clock

if TYPE_CHECKING:
    from tasks.video.segments import SegmentTable

TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks temporal``."""
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=200, help="detections per video")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--instances", type=int, default=15, help="instances per video")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of the evaluator; their median counts")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate random detections both ways, compare the results, print the times and their ratio."""
    from tasks.video.evaluators import evaluate

    sizes = {name: getattr(arguments, name) for name in ("videos", "detections", "classes", "instances")}
    for name, value in (sizes | {"rounds": arguments.rounds}).items():
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    torch.set_num_threads(1)
    clock = Clock(torch.device("cpu"))
    tables = random_tables(**sizes)
    results: list[Any] = []
    call: Callable[[], object] = partial(lambda: results.append(evaluate(*tables, TIOUS).ap))
    call()  # the first call asks the system for memory
    ours = sorted(clock.seconds(call) for _ in range(arguments.rounds))[arguments.rounds // 2]
    loop = clock.seconds(lambda: results.append(loop_average_precision(*tables, TIOUS)))
    difference = float(np.abs(results[0] - results[-1]).max())
    measured = {"machine": machine(clock.device), **sizes, "tious": TIOUS, "seconds": ours, "loop_seconds": loop}
    measured |= {"times_faster": loop / ours, "largest_difference_of_ap": difference}
    print(f"{measured['machine']}; {clock}, one thread; {sizes}")
    print(f"loop {loop:.2f} s, evaluator {ours:.3f} s: {loop / ours:.0f} times faster; AP differ by {difference:.1e}")
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(measured, indent=2) + "\n")


def random_tables(
    videos: int, detections: int, classes: int, instances: int, seed: int = 0
) -> tuple[SegmentTable, SegmentTable]:
    """Ground truth and detections, three quarters of which are near an instance; scores are distinct."""
    from tasks.video.segments import SegmentTable

    generator = np.random.default_rng(seed)
    names = tuple(f"video_{v:06d}" for v in range(videos)), tuple(f"class_{c}" for c in range(classes))
    total = videos * instances
    video = np.repeat(np.arange(videos), instances)
    label = generator.integers(0, classes, total)
    start = generator.uniform(0, 200, total)
    end = start + generator.gamma(2, 4, total) + 0.2
    truth = SegmentTable(*names, video, label, start, end, np.ones(total))
    number = videos * detections
    source = np.repeat(np.arange(videos), detections) * instances + generator.integers(0, instances, number)
    near = generator.random(number) < 0.75
    length = end[source] - start[source]
    begin = np.where(near, start[source] + generator.normal(0, 0.2, number) * length, generator.uniform(0, 200, number))
    stop = begin + length * generator.lognormal(0, 0.3, number)
    found = np.where(near | (generator.random(number) < 0.5), label[source], generator.integers(0, classes, number))
    score = (generator.permutation(number) + 0.5) / number
    return truth, SegmentTable(*names, video[source], found, begin, stop, score)


def loop_average_precision(truth: SegmentTable, detections: SegmentTable, tious: Sequence[float]) -> Any:
    """AP (T, K) as the official programs find it: class by class, detection by detection, threshold by threshold."""
    classes = sorted(set(truth.label.tolist()), key=truth.label.tolist().index)
    return np.stack([_loop_class(truth, detections, c, tious) for c in classes], axis=1)


def _loop_class(truth: SegmentTable, detections: SegmentTable, label: int, tious: Sequence[float]) -> Any:
    members = np.flatnonzero(truth.label == label)
    of_video: dict[int, list[int]] = defaultdict(list)
    for position, row in enumerate(members):
        of_video[int(truth.video[row])].append(position)
    rows = np.flatnonzero(detections.label == label)
    rows = rows[np.argsort(detections.score[rows], kind="stable")[::-1]]
    free = np.ones((len(tious), len(members)), dtype=bool)
    hits = np.zeros((len(tious), len(rows)))
    for rank, row in enumerate(rows):
        candidates = of_video.get(int(detections.video[row]))
        if candidates is None:
            continue
        starts, ends = truth.start[members[candidates]], truth.end[members[candidates]]
        start, end = detections.start[row], detections.end[row]
        shared = (np.minimum(end, ends) - np.maximum(start, starts)).clip(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = shared / ((ends - starts) + (end - start) - shared)
        for t, tiou in enumerate(tious):
            for best in iou.argsort(kind="stable")[::-1]:
                if iou[best] < tiou:
                    break
                if free[t, candidates[best]]:
                    free[t, candidates[best]] = False
                    hits[t, rank] = 1
                    break
    return np.array([_interpolated(hit, len(members)) for hit in hits])


def _interpolated(hits: Any, number: int) -> float:
    true, false = np.cumsum(hits), np.cumsum(1 - hits)
    precision = np.concatenate([[0], true / np.maximum(true + false, 1), [0]])
    recall = np.concatenate([[0], true / number, [1]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())
