"""Evaluation, windows and spliced clips of temporal action detection against AFSD and OpenTAD.

A case is told by what it holds: ``ground_truth`` and ``prediction`` with ``expected`` numbers per evaluator; the
compact real set, rows of numbers in three files of one folder; training windows (``details_first25``); spliced clips (a
list with ``new_annos``).
"""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np

from tasks.video.annotations import THUMOS14_CLASSES, read_thumos_split
from tasks.video.evaluation_files import ground_truth_table, predictions_table
from tasks.video.evaluators import evaluate
from tasks.video.recall import top_kx_recall
from tasks.video.segments import SegmentTable
from tasks.video.windows import (
    background_gaps,
    boundary_masks,
    cuts,
    long_instances,
    random_splice,
    splice,
    training_windows,
)


def run(meta, tensors, path):
    """Check a case of this module; None for one of another."""
    if isinstance(meta, dict) and {"ground_truth", "prediction", "expected"} <= meta.keys():
        check_evaluation(meta)
    elif isinstance(meta, dict) and "details_first25" in meta:
        check_windows(meta)
    elif isinstance(meta, list) and meta and "annos" in meta[0]:
        for case in meta:
            check_splice(case)
    elif (compact := compact_files(meta, path)) is not None:
        check_compact(compact)
    else:
        return None
    return {}


# -- evaluation -----------------------------------------------------------------------------------------------------


def check_evaluation(meta):
    ground_truth = ground_truth_table(meta["ground_truth"], meta["subset"])
    predictions = predictions_table(meta["prediction"])
    for name, expected in meta["expected"].items():
        if "error" not in expected:  # OpenTAD takes no times given as strings
            check_result(
                name, expected, ground_truth, predictions, meta["tious"], meta.get("blocked_videos") or (), meta
            )


def check_result(name, expected, ground_truth, predictions, tious, blocked, meta):
    evaluator, _, ties = name.partition("_ties_")
    platform_dependent = not ties and any("_ties_" in other for other in meta["expected"])
    result = evaluate(ground_truth, predictions, tious, evaluator, blocked, ties or "last_first")
    assert len(result.instances) == expected.get("n_gt", len(result.instances))
    assert len(result.detections) == expected.get("n_pred_used", len(result.detections))
    if platform_dependent:
        return
    np.testing.assert_allclose(result.mean_ap, expected["mAP"], atol=1e-9, rtol=0)
    assert abs(result.average - expected["average_mAP"]) < 1e-9
    if "per_class" in expected:
        assert list(result.classes) == list(expected["per_class"])
        np.testing.assert_allclose(result.ap.T, list(expected["per_class"].values()), atol=1e-9, rtol=0)
    if "recall_topkx" in expected:
        recall = top_kx_recall(result, expected["recall_topkx"]["k"]).mean(axis=2)
        np.testing.assert_allclose(recall, expected["recall_topkx"]["mean_over_classes"], atol=1e-9, rtol=0)


# -- the compact real set: rows of numbers in three files -----------------------------------------------------------


def compact_files(meta, path):
    """What the three files hold, one of which is `path`; None if they are not there."""
    kind = compact_kind(meta)
    if kind is None:
        return None
    found = {kind: meta}
    for other in sorted(path.parent.glob("*.json")):
        data = json.loads(other.read_text())
        found.setdefault(compact_kind(data), data)
    return found if {"gt", "pred", "expected"} <= found.keys() else None


def compact_kind(data):
    """Rows of three numbers are instances, rows of four detections; the third file has mean AP and neither."""
    if isinstance(data, dict) and {"ground_truth", "prediction"} & data.keys():
        return None
    rows = next((rows[0] for rows in (find_rows(data) or {}).values() if rows), [])
    if len(rows) in (3, 4) and all(isinstance(value, int | float) for value in rows):
        return {3: "gt", 4: "pred"}[len(rows)]
    return "expected" if find(data, "mAP") else None


def check_compact(files):
    truth, predicted, expected = (files[kind] for kind in ("gt", "pred", "expected"))
    tables = [compact_table(data) for data in (truth, predicted)]
    expected = expected.get("expected", expected)
    tious = find(expected, "tious") or find(truth, "tious") or find(predicted, "tious") or [0.3, 0.4, 0.5, 0.6, 0.7]
    named = {name: value for name, value in expected.items() if name.partition("_ties_")[0] in ("afsd", "opentad")}
    for name, numbers in (named or {"afsd": expected}).items():
        numbers = {
            k: v for k, v in numbers.items() if k in ("mAP", "average_mAP", "n_gt", "n_pred_used", "recall_topkx")
        }
        assert numbers
        check_result(name, numbers, *tables, tious, (), {"expected": named})


def compact_table(data):
    """Rows [label index, start, end(, score)] by video; where they are nested is found by their form."""
    rows_of = find_rows(data)
    rows = [
        (video, str(int(row[0])), float(row[1]), float(row[2]), float(row[3]) if len(row) > 3 else 1.0)
        for video, rows in rows_of.items()
        for row in rows
    ]
    return SegmentTable.from_rows(rows, videos=tuple(rows_of))


def find_rows(data):
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        if lists and len(lists) == len(data) and all(isinstance(row, list) for rows in lists for row in rows):
            return data
        for value in data.values():
            if (found := find_rows(value)) is not None:
                return found
    return None


def find(data, name):
    if isinstance(data, dict):
        return data.get(name) or next((found for value in data.values() if (found := find(value, name))), None)
    return None


# -- windows and spliced clips --------------------------------------------------------------------------------------


def check_windows(meta):
    """Masks of the official windows and, where FRUGAL_DATA has the real annotations, the windows themselves."""
    for window in itertools.chain.from_iterable(meta["details_first25"].values()):
        segments = np.array([anno[:2] for anno in window["annos"]])
        for mask, name in zip(boundary_masks(segments, meta["clip_length"]), ("start_runs", "end_runs"), strict=True):
            assert runs(mask) == window[name]
    if "FRUGAL_DATA" in os.environ:
        check_real_windows(meta, Path(os.environ["FRUGAL_DATA"], "thumos14"))


def check_real_windows(meta, root):
    videos = read_thumos_split(root, "train", THUMOS14_CLASSES, frame_columns=True).samples
    length, stride = meta["clip_length"], meta["stride"]
    cut = {v.id: training_windows(v.frames(), v.labels, v.num_frames, length, stride) for v in videos}
    assert sum(len(video.labels) for video in videos) == meta["annos_total"]
    assert {id: math.ceil(shortest) for id, (_, shortest) in cut.items()} == meta["min_anno_ceil"]
    assert {id: len(windows) for id, (windows, _) in cut.items() if windows} == meta["clips_per_video"]
    assert sum(len(windows) for windows, _ in cut.values()) == meta["n_clips"]
    assert sum(len(window.labels) for windows, _ in cut.values() for window in windows) == meta["n_annos_in_clips"]
    assert sorted(id for id, (windows, _) in cut.items() if not windows) == sorted(meta["videos_without_clip"])
    for id, details in meta["details_first25"].items():
        for window, expected in zip(cut[id][0], details, strict=False):
            assert window.offset == expected["offset"]
            instances = np.column_stack([window.segments, window.labels + 1])
            np.testing.assert_allclose(instances, expected["annos"], atol=1e-4, rtol=0)


def runs(mask):
    """Where each run of ones begins, and the index behind it."""
    edges = np.diff(np.concatenate([[0], mask, [0]]))
    return [[int(a), int(b)] for a, b in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True)]


def check_splice(case):
    segments, piece = np.array([anno[:2] for anno in case["annos"]]), case["th"]
    length = len(case.get("source_frame_index", range(256)))
    if not case["flag"]:
        assert random_splice(segments, piece, length, np.random.default_rng(0)) is None
        return
    instance, cut, gap, begin = case["choices"]
    instance = instance[:2]
    assert instance in long_instances(segments, piece).tolist()
    cut += math.ceil(instance[0])
    assert cut in cuts(instance, piece)
    first, last = math.ceil(gap[0]), math.floor(gap[1])
    assert (first, last) in background_gaps(segments, piece, length)
    spliced = splice(instance, cut, first + begin, piece, length)
    np.testing.assert_array_equal(spliced.frames, case["source_frame_index"])
    np.testing.assert_allclose(spliced.segments, case["new_annos"], atol=1e-12, rtol=0)
