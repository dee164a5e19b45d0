"""``python -m tasks.video evaluate``: scores a file of predictions against one of ground truth; no network."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tasks.core.errors import UserError
from tasks.core.files import write_atomically
from tasks.video.evaluation_files import read_ground_truth, read_json, read_predictions
from tasks.video.evaluators import ACTIVITYNET_TIOUS, RULES, THUMOS14_TIOUS, Evaluation, evaluate, metrics_by_name
from tasks.video.false_positives import KINDS, false_positives
from tasks.video.recall import average_recall

PROPOSALS = (1, 5, 10, 50, 100)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and stop with exit code 2."""
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 2 and one line on stderr for files or options that cannot be used."""
    options = make_parser().parse_args(arguments)
    try:
        result = _evaluated(options)
        errors = false_positives(result)
        content = _as_dict(options, result)
        if options.output is not None:
            _write(options.output, json.dumps(content, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _print(options, result)
    print(f"\nBest G to 10 G detections (G instances), tIoU {errors.tiou:.2f}:  {'  '.join(KINDS)}")
    for multiple in (1, 10):
        counts = errors.counts[multiple - 1]
        print(f"{multiple:>3} G  " + "  ".join(f"{c:>{len(kind)}}" for c, kind in zip(counts, KINDS, strict=True)))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = _Parser(prog="python -m tasks.video evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ground-truth", type=Path, required=True, help="json file with 'database'")
    parser.add_argument("--predictions", type=Path, required=True, help="json file with 'results'")
    parser.add_argument("--evaluator", choices=tuple(RULES), default="afsd", help="whose rules count (default: afsd)")
    parser.add_argument("--subset", help="default: test, or validation for the evaluator activitynet")
    parser.add_argument("--tious", type=float, nargs="+", help="thresholds; default: those of the data set")
    parser.add_argument("--blocked", type=Path, help="json list of videos that do not count")
    parser.add_argument("--output", type=Path, help="also write the numbers to this json file")
    return parser


def _evaluated(options: argparse.Namespace) -> Evaluation:
    activitynet = options.evaluator == "activitynet"
    options.subset = options.subset or ("validation" if activitynet else "test")
    options.tious = options.tious or list(ACTIVITYNET_TIOUS if activitynet else THUMOS14_TIOUS)
    blocked = read_json(options.blocked) if options.blocked else []
    if not isinstance(blocked, list) or not all(isinstance(id, str) for id in blocked):
        raise UserError(f"{options.blocked}: expected a list of the names of videos")
    ground_truth = read_ground_truth(options.ground_truth, options.subset)
    predictions = read_predictions(options.predictions)
    return evaluate(ground_truth, predictions, options.tious, options.evaluator, blocked)


def _as_dict(options: argparse.Namespace, result: Evaluation) -> dict[str, Any]:
    recall, errors = average_recall(result), false_positives(result)
    return {
        "evaluator": options.evaluator,
        "subset": options.subset,
        "videos": len(result.instances.videos),
        "instances": len(result.instances),
        "predictions": len(result.detections),
        "metrics": metrics_by_name(result) | {f"AR@{number}": recall.at(number) for number in PROPOSALS},
        "classes": {name: result.ap[:, c].tolist() for c, name in enumerate(result.classes)},
        "false_positives": {
            "tiou": errors.tiou,
            "kinds": list(KINDS),
            "best_g_to_10_g": errors.counts.tolist(),
        },
        "warnings": result.warnings,
    }


def _print(options: argparse.Namespace, result: Evaluation) -> None:
    print(
        f"{options.evaluator}, subset {options.subset}: {len(result.instances)} instances of {len(result.classes)}"
        f" classes in {len(result.instances.videos)} videos, {len(result.detections)} predictions"
    )
    width = max(len(name) for name in (*result.classes, "average"))
    print(f"{'AP %':{width}}" + "".join(f"{tiou:>8.2f}" for tiou in result.tious) + f"{'mean':>8}")
    by_name = sorted(range(len(result.classes)), key=lambda c: result.classes[c])
    for c in by_name:
        print(_line(result.classes[c], result.ap[:, c], width))
    print(_line("mAP", result.mean_ap, width))
    recall = average_recall(result)
    print("  ".join(f"AR@{number} {100 * recall.at(number):.2f}" for number in PROPOSALS))


def _line(name: str, values: Any, width: int) -> str:
    return f"{name:{width}}" + "".join(f"{100 * value:>8.2f}" for value in (*values, np.mean(values)))


def _write(path: Path, text: str) -> None:
    """Put `text` into `path`, complete or not at all."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or os.strerror(error.errno or 0)})") from error
