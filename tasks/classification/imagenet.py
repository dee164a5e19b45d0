"""Classes of ILSVRC 2012, and the ground truth of its validation images in the development kit."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from timm.data import ImageNetInfo

from tasks.classification.reading import ImageFiles
from tasks.core.data import DataError

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


@cache
def imagenet_classes() -> tuple[list[str], list[str]]:
    """Return WordNet ids ("n01440764") and words ("tench, Tinca tinca") of the 1000 classes, by label.

    Labels follow the sorted WordNet ids, in all published models.
    """
    info = ImageNetInfo("imagenet-1k")
    return info.label_names(), list(info.label_descriptions())


def list_flat_validation(folder: Path, names: Sequence[str], devkit: Path) -> tuple[ImageFiles, list[str]]:
    """Label the validation images `names` (``ILSVRC2012_val_<8 digits>.JPEG`` in one folder); also what is wrong."""
    truth = read_ground_truth(devkit)
    problems, chosen, labels = [], [], []
    for name in names:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.jpe?g", name, re.IGNORECASE)
        if match is None or not 1 <= int(match[1]) <= len(truth):
            problems.append(f"{folder / name}: expected ILSVRC2012_val_00000001.JPEG to {len(truth):08d}.JPEG")
        else:
            chosen.append(name)
            labels.append(int(truth[int(match[1]) - 1]))
    if len(chosen) < len(truth) and not problems:
        problems.append(f"{folder}: {len(chosen)} images; expected {len(truth)}, as {devkit / GROUND_TRUTH} has lines")
    return ImageFiles.of(folder, chosen, labels, upright=False), problems


def read_ground_truth(devkit: Path) -> np.ndarray:
    """Return the labels (N,) of the validation images by number; the kit has its own numbering of the classes."""
    label_of = {wnid: label for label, wnid in enumerate(imagenet_classes()[0])}
    try:
        synsets = loadmat(devkit / META, squeeze_me=True)["synsets"]
        label_by_id = {
            int(id): label_of[str(wnid)]
            for id, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
            if str(wnid) in label_of
        }
    except Exception as error:  # scipy raises any kind for a damaged file
        raise DataError(f"{devkit / META}: cannot be read as the class list of ILSVRC 2012 ({error})") from error
    path = devkit / GROUND_TRUTH
    try:
        return np.array([label_by_id[int(line)] for line in path.read_text().split()], dtype=np.int64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: {error.args[0]!r} in it; expected one ILSVRC2012_ID of 1 to 1000 per line") from error
