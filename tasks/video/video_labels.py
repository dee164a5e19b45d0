"""Class probabilities of whole videos, by which detections without a class are labelled (ActivityNet-1.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.core.errors import UserError


class VideoLabels:
    """Probabilities of the classes `names` for each video of `scores`."""

    def __init__(self, path: Path, names: Sequence[str], scores: Mapping[str, Sequence[float]]) -> None:
        self.path, self.names, self._scores = path, list(names), scores
        self._order = np.arange(len(self.names))

    @classmethod
    def read(cls, path: Path) -> VideoLabels:
        """Read a file in the layout of the CUHK scores, ``{"class": [...], "results": {"<video>": [...]}}``.

        Raises:
            UserError: The file cannot be read, is no such file, or has another number of scores than of classes.
        """
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"model.class_scores: {path} cannot be read ({error})") from error
        if not isinstance(content, dict) or not {"class", "results"} <= content.keys():
            raise UserError(f"model.class_scores: {path} has no 'class' and 'results'; expected class scores of videos")
        names, scores = content["class"], content["results"]
        for id, values in scores.items():
            if len(values) != len(names):
                raise UserError(f"model.class_scores: {path}: {len(values)} scores of {id!r}; expected {len(names)}")
        return cls(path, names, scores)

    def arrange(self, class_names: Sequence[str]) -> None:
        """Give probabilities in the order of `class_names` from now on; raises UserError for a class without them."""
        places = {name: place for place, name in enumerate(self.names)}
        missing = [name for name in class_names if name not in places]
        if missing:
            raise UserError(f"model.class_scores: {self.path} has no class {missing[0]!r}; expected all of the data")
        self._order = np.array([places[name] for name in class_names])

    def __getitem__(self, id: str) -> np.ndarray:
        """Probabilities (K,) for the video `id`; raises UserError if there are none."""
        if id not in self._scores:
            raise UserError(f"model.class_scores: {self.path} has no video {id!r}")
        return np.asarray(self._scores[id], dtype=np.float64)[self._order]
