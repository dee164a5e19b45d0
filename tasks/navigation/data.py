"""The data sets of navigation; each docstring shows the layout on disk.

All need ``connectivity/`` of the Matterport3D simulator, object features (`tasks.navigation.features`), word pieces
of a BERT in ``vocab.txt`` and, for the room heads, ``house_panos_gt.json``.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.core.data import DataError
from tasks.core.sample import cache_folder, write_folder_once
from tasks.navigation import sample
from tasks.navigation.datamodule import NavigationDataModule
from tasks.navigation.episodes import (
    Episode,
    History,
    PathType,
    read_json,
    read_ndh,
    read_r2r,
    read_reverie,
    visible_objects,
)

SHARED_LAYOUT = """
root/connectivity/<scan>_connectivity.json      graphs of the Matterport3D simulator
root/objects/                                   object features, HDF5 or NumPy (docs/navigation.md)
root/vocab.txt                                  word pieces of a BERT, one per line
root/train_vocab.txt                            the data set's words                        (optional)
root/house_panos_gt.json                        room classes {scan: {viewpoint: 0-30}}      (optional)"""


class R2R(NavigationDataModule):
    """Room-to-Room: 14,039 training instructions, 1,021 and 2,349 for validation, 4,173 for the leaderboard.

    ::

        root/R2R_train.json
        root/R2R_val_seen.json
        root/R2R_val_unseen.json
        root/R2R_test.json
        root/connectivity/<scan>_connectivity.json
        root/objects/                     object features, HDF5 or NumPy
        root/vocab.txt                    word pieces of a BERT
        root/train_vocab.txt              (optional)
        root/house_panos_gt.json          (optional)

    `name` is the beginning of the annotation files, for data sets of the same format such as R4R.
    """

    dataset = "r2r"
    layout = f"root/R2R_<split>.json                           train, val_seen, val_unseen, test{SHARED_LAYOUT}"
    source = "https://github.com/peteanderson80/Matterport3DSimulator (connectivity/, tasks/R2R/data/download.sh)"

    def __init__(self, root: str, name: str = "R2R", max_objects: int = 10, **kwargs: Any) -> None:
        super().__init__(root, max_objects=max_objects, **kwargs)
        self.name = name

    def annotation(self, split: str) -> Path:
        """The annotation file of a split."""
        return self.file("name", f"{self.name}_{split}.json")

    def read(self, path: Path, split: str) -> list[Episode]:
        """The episodes of an annotation file, without word pieces."""
        return read_r2r(path, split)


class SampleHouses(R2R):
    """The sample data set: generated houses in the layout of R2R.

    It is written to `root` if that folder does not exist; by default to a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_objects: int = 4,
        max_text: int = 32,
        predict_split: str = "val_unseen",
        num_train: int = 48,
        num_unseen: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder(f"navigation-v1-{num_train}-{num_unseen}")),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_objects=max_objects,
            max_text=max_text,
            predict_split=predict_split,
            **kwargs,
        )
        self.num_train = num_train
        self.num_unseen = num_unseen

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), lambda folder: sample.write_sample(folder, self.num_train, self.num_unseen))

    @property
    def vocab_size(self) -> int:
        """Number of word pieces; the command line asks for it before it prepares the data."""
        self.prepare_data()
        return super().vocab_size

    @property
    def feature_dim(self) -> int:
        """Size F of an object's feature; asked for as early."""
        self.prepare_data()
        return super().feature_dim


class REVERIE(NavigationDataModule):
    """REVERIE, version 1 or 2: go to where an object is visible and name it.

    ::

        root/REVERIE_train.json           (val_seen, val_unseen, test)
        root/BBoxes.json                  or root/BBox/<scan>_<viewpoint>.json
        root/connectivity/<scan>_connectivity.json
        root/objects/                     object features, HDF5 or NumPy
        root/vocab.txt                    word pieces of a BERT
        root/train_vocab.txt              (optional)
        root/house_panos_gt.json          (optional)
    """

    dataset = "reverie"
    layout = (
        "root/REVERIE_<split>.json                       train, val_seen, val_unseen, test\n"
        f"root/BBoxes.json or root/BBox/*.json            boxes and visibility of the objects{SHARED_LAYOUT}"
    )
    source = "https://github.com/YuankaiQi/REVERIE (tasks/REVERIE/data or data_v2)"

    def annotation(self, split: str) -> Path:
        """The annotation file of a split."""
        return Path(self.root, f"REVERIE_{split}.json")

    def read(self, path: Path, split: str) -> list[Episode]:
        """The episodes of an annotation file, without word pieces."""
        return read_reverie(path, split, self.visible)

    @cached_property
    def visible(self) -> dict[str, dict[str, set[str]]]:
        """Viewpoints from which each object is visible, by scan and object."""
        merged, folder = Path(self.root, "BBoxes.json"), Path(self.root, "BBox")
        if merged.is_file():
            boxes = read_json(merged, "objects by <scan>_<viewpoint>")
            if not isinstance(boxes, dict):
                raise DataError(f"{merged}: expected objects by <scan>_<viewpoint>")
            return visible_objects(boxes, merged)
        if folder.is_dir():
            files = {path.stem: read_json(path, "the objects of a viewpoint") for path in sorted(folder.glob("*.json"))}
            return visible_objects(files, folder)
        raise DataError(self.missing(f"{merged}: file not found."))


class NDH(NavigationDataModule):
    """Navigation from Dialog History (CVDN), in its own format or in ORIST's.

    ::

        root/train.json                   (val_seen, val_unseen, test)      or root/NDH_train.json
        root/connectivity/<scan>_connectivity.json
        root/objects/                     object features, HDF5 or NumPy
        root/vocab.txt                    word pieces of a BERT
        root/train_vocab.txt              (optional)
        root/house_panos_gt.json          (optional)

    Args:
        root: Folder of the data set.
        supervision: Follow the planner's path (`oracle`), the player's (`navigator`), or the player's where it reaches
            the end of the planner's (`mixed`).
        history: What of the dialogue an agent reads: `all`, the last question and answer (`nav_q_oracle_ans`), the last
            answer (`oracle_ans`) or no more than the name of the target (`target`).
        kwargs: Options of all datamodules.
    """

    dataset = "ndh"
    layout = f"root/<split>.json or root/NDH_<split>.json      train, val_seen, val_unseen, test{SHARED_LAYOUT}"
    source = "https://github.com/mmurray/cvdn (tasks/NDH/data/download.sh)"

    def __init__(self, root: str, supervision: PathType = "mixed", history: History = "all", **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.supervision: PathType = supervision
        self.history: History = history

    def annotation(self, split: str) -> Path:
        """The annotation file of a split."""
        own = Path(self.root, f"NDH_{split}.json")
        return own if own.is_file() else Path(self.root, f"{split}.json")

    def read(self, path: Path, split: str) -> list[Episode]:
        """The episodes of an annotation file, without word pieces."""
        return read_ndh(path, split, self.supervision, self.history)
