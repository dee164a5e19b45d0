"""Why detections are wrong: the kinds of false positives of DETAD (Alwassel et al., ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.video.evaluators import Evaluation
from tasks.video.matching import overlapping_pairs
from tasks.video.segments import Integers

BACKGROUND_IOU = 0.1  # below it a detection shows nothing of an instance
KINDS = ("true positive", "double detection", "wrong label", "localization", "confusion", "background")


@dataclass(frozen=True)
class FalsePositives:
    """`kind` (D,) of every detection, as an index into `KINDS`, and `counts` (M, 6) of the best 1 G, 2 G, ... M G.

    G is the number of instances: per class, the G_c best, 2 G_c best, ... detections are counted.
    """

    tiou: float
    kind: Integers
    counts: Integers


def false_positives(result: Evaluation, tiou: float = 0.5, multiples: int = 10) -> FalsePositives:
    """Sort the detections of `result` into kinds at the threshold of `result.tious` nearest to `tiou`.

    By the overlap with its best instance a wrong detection is: at least the threshold: *double detection* of an
    instance of its class that a better detection found, else *wrong label*; at least 0.1: *localization* error with
    its own class, else *confusion* of classes too; below: *background*.
    """
    row = int(np.abs(result.tious - tiou).argmin())
    tiou = float(result.tious[row])
    instances, detections = result.instances, result.detections
    own, any_class = np.zeros((2, len(detections)))
    for best, same_class in ((own, True), (any_class, False)):
        pairs = overlapping_pairs(
            instances, detections, BACKGROUND_IOU, result.rules.smallest_union, same_class=same_class
        )
        np.maximum.at(best, pairs.detection, pairs.iou)
    kind = np.select(
        [result.found[row], own >= tiou, any_class >= tiou, own >= BACKGROUND_IOU, any_class >= BACKGROUND_IOU],
        [0, 1, 2, 3, 4],
        default=5,
    )
    counts = np.zeros((multiples, len(KINDS)), dtype=np.int64)
    for c, number in enumerate(result.num_instances):
        kinds = kind[detections.label == c]
        for multiple in range(multiples):
            counts[multiple] += np.bincount(kinds[: (multiple + 1) * number], minlength=len(KINDS))
    return FalsePositives(tiou, kind, counts)
