"""What an agent sees: features of objects and of whole views, from HDF5 or NumPy files.

Objects of a view come, best first, with boxes as x1, y1, x2, y2 in fractions of the image. Two layouts are read:

* HDF5, as ORIST's release: groups ``<scan>_<viewpoint>_<view:02d>`` with `region_feat` (n, F), `region_loc` (n, 5: box
  and area) and optionally `region_label` (names joined by ``#``); all in one file ``objects.h5``, or a file per view in
  a folder ``objects``.
* NumPy: ``objects/features.npy`` (M, F), ``objects/boxes.npy`` (M, 4 or more) and ``objects/index.json``, which maps
  the key of a view to [first row, number of rows]; optionally the M names in ``objects/labels.json``.

Features of whole views: ``views.h5`` with an array (36, F or more) per ``<scan>_<viewpoint>``, or a folder ``views``
with ``<scan>_<viewpoint>.npy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.episodes import read_json
from tasks.navigation.sightlines import NUM_VIEWS

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


class ViewObjects(NamedTuple):
    """Objects of one view: features (n, F), boxes (n, 7: x1, y1, x2, y2, w, h, area) and names (n or none)."""

    features: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: Sequence[str]


class Objects(Protocol):
    """Features of the objects of every view."""

    feature_dim: int

    def view(self, scan: str, viewpoint: str, view: int) -> ViewObjects | None:
        """The objects of a view, best first; None if nothing is known of it."""

    def close(self) -> None:
        """Close files."""


def view_key(scan: str, viewpoint: str, view: int) -> str:
    """The name of a view in feature files."""
    return f"{scan}_{viewpoint}_{view:02d}"


def boxes_of(corners: NDArray[np.floating], origin: str) -> NDArray[np.float32]:
    """(n, 7) boxes with width, height and area from (n, 4 or more) that begin with x1, y1, x2, y2."""
    if corners.ndim != 2 or corners.shape[1] < 4:
        raise DataError(f"{origin}: boxes of shape {corners.shape}; expected (n, 4 or more), x1, y1, x2, y2 first")
    x1, y1, x2, y2 = corners[:, :4].astype(np.float32).T
    width, height = x2 - x1, y2 - y1
    area = corners[:, -1].astype(np.float32) if corners.shape[1] > 4 else width * height
    return np.stack([x1, y1, x2, y2, width, height, area], axis=1)


def import_h5py() -> Any:
    """The package h5py; raises `UserError` naming the extra that installs it."""
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 features need the package h5py: pip install 'frugal-vision[navigation]'") from None
    return h5py


def open_hdf5(path: Path) -> Any:
    """An HDF5 file, open for reading."""
    try:
        return import_h5py().File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error})") from None


def load_array(path: Path, dimensions: int) -> NDArray[Any]:
    """A NumPy array of numbers, mapped into memory; raises `DataError` for anything else (pickles are never loaded)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a NumPy array ({error})") from None
    if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype.kind not in "fiu":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{path}: {found}; expected an array of numbers with {dimensions} dimensions")
    return array


class HDF5Objects:
    """Objects in one HDF5 file with a group per view, or in a folder with a file per view."""

    def __init__(self, path: Path) -> None:
        self.path = path
        first = path if path.is_file() else next(iter(sorted([*path.glob("*.h5"), *path.glob("*.hdf5")])), None)
        if first is None:
            raise DataError(f"{path}: holds no HDF5 file; expected one per view")
        self._suffix = first.suffix
        with open_hdf5(first) as file:
            name = next(iter(file), None)
            if name is None or "region_feat" not in file[name]:
                raise DataError(f"{first}: expected groups <scan>_<viewpoint>_<view> with region_feat and region_loc")
            self.feature_dim = int(file[name]["region_feat"].shape[1])

    @cached_property
    def _file(self) -> Any:
        return open_hdf5(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}  # each process opens its own

    def view(self, scan: str, viewpoint: str, view: int) -> ViewObjects | None:
        """The objects of a view, best first; None if nothing is known of it."""
        key = view_key(scan, viewpoint, view)
        if self.path.is_file():
            return self._read(self._file[key], key) if key in self._file else None
        path = self.path / f"{key}{self._suffix}"
        if not path.is_file():
            return None
        with open_hdf5(path) as file:
            return self._read(file[key], key) if key in file else None

    def close(self) -> None:
        """Close the file."""
        if "_file" in vars(self):
            self._file.close()
            del self._file

    def _read(self, group: Any, key: str) -> ViewObjects:
        origin = f"{self.path}: {key}"
        for name in ("region_feat", "region_loc"):
            if name not in group:
                raise DataError(f"{origin}: {name} is missing; expected region_feat and region_loc")
        features = np.asarray(group["region_feat"], dtype=np.float32)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise DataError(f"{origin}: region_feat of shape {features.shape}; expected (n, {self.feature_dim})")
        boxes = boxes_of(np.asarray(group["region_loc"]), origin)
        if len(boxes) != len(features):
            raise DataError(f"{origin}: {len(features)} features and {len(boxes)} boxes; expected as many")
        labels: list[str] = []
        if "region_label" in group:
            text = group["region_label"][()]
            labels = (text.decode() if isinstance(text, bytes) else str(text)).split("#")
        return ViewObjects(features, boxes, labels if len(labels) == len(features) else [])


class NumpyObjects:
    """Objects in NumPy files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.features = load_array(folder / "features.npy", 2)
        self.boxes = boxes_of(load_array(folder / "boxes.npy", 2), str(folder / "boxes.npy"))
        self.feature_dim = int(self.features.shape[1])
        path = folder / "index.json"
        index = read_json(path, "a dictionary of views")
        if len(self.boxes) != len(self.features) or not isinstance(index, dict):
            raise DataError(
                f"{folder}: {len(self.features)} features, {len(self.boxes)} boxes and an index of type"
                f" {type(index).__name__}; expected as many features as boxes and a dictionary of views"
            )
        for key, span in index.items():
            valid = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
            if not valid or not 0 <= span[0] <= span[0] + span[1] <= len(self.features):
                raise DataError(
                    f"{path}: {key}: {span}; expected [first row, number of rows] of {len(self.features)} rows"
                )
        self._index: dict[str, list[int]] = index
        labels = folder / "labels.json"
        self._labels: list[str] = read_json(labels, "a list of names") if labels.is_file() else []
        if self._labels and len(self._labels) != len(self.features):
            raise DataError(f"{labels}: {len(self._labels)} names; expected {len(self.features)}, one per object")

    def view(self, scan: str, viewpoint: str, view: int) -> ViewObjects | None:
        """The objects of a view, best first; None if nothing is known of it."""
        span = self._index.get(view_key(scan, viewpoint, view))
        if span is None:
            return None
        rows = slice(span[0], span[0] + span[1])
        return ViewObjects(np.asarray(self.features[rows], dtype=np.float32), self.boxes[rows], self._labels[rows])

    def close(self) -> None:
        """Nothing is open."""


class NoObjects:
    """Stands in where there are no features: views without objects. For agents that follow rules."""

    feature_dim = 1

    def view(self, scan: str, viewpoint: str, view: int) -> ViewObjects | None:
        """No object."""
        empty = np.zeros((0, 1), dtype=np.float32)
        return ViewObjects(empty, np.zeros((0, 7), dtype=np.float32), [])

    def close(self) -> None:
        """Nothing is open."""


class ViewFeatures:
    """Features of whole views, (36, F) per viewpoint, of which the first `size` numbers are used."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self.size = size

    @cached_property
    def _file(self) -> Any:
        return open_hdf5(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def viewpoint(self, scan: str, viewpoint: str) -> NDArray[np.float32] | None:
        """Features (36, F) of a viewpoint's views; None if it has none."""
        key = f"{scan}_{viewpoint}"
        if self.path.is_dir():
            path = self.path / f"{key}.npy"
            array: Any = load_array(path, 2) if path.is_file() else None
        else:
            array = self._file.get(key)
        if array is None:
            return None
        if array.ndim != 2 or array.shape[0] != NUM_VIEWS or array.shape[1] < (self.size or 1):
            raise DataError(
                f"{self.path}: {key}: shape {tuple(array.shape)}; expected ({NUM_VIEWS}, {self.size or 'F'} or more)"
            )
        return np.asarray(array[:, : self.size], dtype=np.float32)


def open_objects(path: Path) -> Objects:
    """The objects at `path`: an HDF5 file, a folder of HDF5 files or a folder of NumPy files."""
    if (path / "features.npy").is_file():
        return NumpyObjects(path)
    if path.exists():
        return HDF5Objects(path)
    raise DataError(f"{path}: not found; expected object features")
