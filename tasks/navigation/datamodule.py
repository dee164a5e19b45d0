"""What the datamodules of navigation share: episodes, the world they take place in, evaluators and submissions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset

from tasks.core.data import DataError
from tasks.core.errors import expect
from tasks.core.splits import Listing, SplitDataModule
from tasks.navigation.check import check_dataset, print_result
from tasks.navigation.environment import NavigationEnvironment
from tasks.navigation.episodes import Episode
from tasks.navigation.evaluators import EVALUATORS, Definition, Evaluator
from tasks.navigation.features import Objects, ViewFeatures, open_objects
from tasks.navigation.graph import Graphs
from tasks.navigation.rooms import ROOMS, Rooms, read_rooms
from tasks.navigation.submission import submission
from tasks.navigation.text import WordPieces, read_vocabulary, read_word_pieces
from tasks.navigation.world import World

DatasetName = Literal["r2r", "reverie", "ndh"]


class EpisodeDataset(Dataset[Episode]):
    """Episodes by number; virtual indices of later passes over the data give the same ones again."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, virtual: int) -> Episode:
        return self.episodes[virtual % len(self.episodes)]


def as_list(episodes: list[Episode]) -> list[Episode]:
    """Collate episodes, of which there may be none: a batch is their list."""
    return episodes


class NavigationDataModule(SplitDataModule[list[Episode]]):
    """Base of the datamodules for navigation. The defaults are ORIST's.

    `objects`, `views`, `rooms`, `vocabulary` and `words` name files and folders below `root`. Without the file of
    `rooms` nothing is labelled, without that of `words` nothing is added to the word pieces.
    `predict_split` is what `predict` follows and `test_split` what `test` evaluates; validation evaluates `val_splits`.

    Args:
        root: Folder of the data set.
        objects: Object features: an HDF5 file or a folder of HDF5 or NumPy files (see `tasks.navigation.features`).
        views: Features of whole views, for views without objects.
        rooms: Room classes, as ORIST's `house_panos_gt.json`.
        vocabulary: Word pieces of a BERT, one per line.
        words: Vocabulary of the data set, whose words are added to the word pieces.
        max_objects: Objects used per view.
        max_text: Word pieces used per instruction, ``[CLS]`` and ``[SEP]`` included.
        min_path_nodes: Shortest path, in viewpoints, to train on.
        definition: Which evaluation script to equal where they differ.
    """

    dataset: ClassVar[DatasetName]
    sample_command = "python -m tasks.navigation fit -c configs/sample/orist.yaml"
    train_collate = staticmethod(as_list)
    eval_collate = staticmethod(as_list)

    def __init__(
        self,
        root: str,
        batch_size: int = 4,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
        objects: str = "objects",
        views: str | None = None,
        rooms: str = "house_panos_gt.json",
        vocabulary: str = "vocab.txt",
        words: str | None = "train_vocab.txt",
        max_objects: int = 25,
        max_text: int = 80,
        min_path_nodes: int = 3,
        val_splits: Sequence[str] = ("val_seen", "val_unseen"),
        test_split: str = "val_unseen",
        predict_split: str = "test",
        definition: Definition = "official",
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, num_workers, seed, pin_memory)
        expect("data.max_objects", max_objects, max_objects >= 1, "at least 1")
        expect("data.max_text", max_text, max_text >= 3, "at least 3")
        expect("data.val_splits", list(val_splits), len(val_splits) > 0, "at least one split")
        self.objects = objects
        self.views = views
        self.rooms = rooms
        self.vocabulary = vocabulary
        self.words = words
        self.max_objects = max_objects
        self.max_text = max_text
        self.min_path_nodes = min_path_nodes
        self.val_splits = tuple(val_splits)
        self.test_split = test_split
        self.predict_split = predict_split
        self.definition: Definition = definition

    # -- episodes ---------------------------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the annotated splits."""
        return ("train", *self.val_splits)

    def annotation(self, split: str) -> Path:
        """The annotation file of a split."""
        raise NotImplementedError

    def read(self, path: Path, split: str) -> list[Episode]:
        """The episodes of an annotation file, without word pieces."""
        raise NotImplementedError

    def listing(self, split: str) -> Listing[list[Episode]]:
        """The episodes of a split, without word pieces."""
        path = self.annotation(split)
        if not path.is_file():
            return Listing([], [self.missing(f"{path}: file not found.")])
        try:
            return Listing(self.read(path, split))
        except DataError as error:
            return Listing([], [str(error)])

    def scan(self, split: str) -> Listing[list[Episode]]:
        """The episodes of a split, with word pieces."""
        listing = self.listing(split)
        encoded = [dataclasses.replace(e, tokens=self.tokenizer.encode(e.instruction)) for e in listing.samples]
        return dataclasses.replace(listing, samples=encoded)

    def setup(self, stage: str) -> None:
        """Read what `stage` needs, so that missing data stops a run before it starts."""
        by_stage = {
            "fit": ("train", *self.val_splits),
            "validate": self.val_splits,
            "test": (self.test_split,),
            "predict": (self.predict_split,),
        }
        for split in by_stage.get(stage, ()):
            for scan in dict.fromkeys(episode.scan for episode in self.samples(split)):
                _ = self.graphs[scan]
        if stage in by_stage:
            _ = self.world

    def train_dataset(self) -> EpisodeDataset:
        """The training episodes whose paths are long enough."""
        long = [episode for episode in self.samples("train") if len(episode.path) >= self.min_path_nodes]
        if not long:
            raise DataError(
                f"{self.annotation('train')}: no path of {self.min_path_nodes} viewpoints or more; lower min_path_nodes"
            )
        return EpisodeDataset(long)

    def val_dataset(self) -> EpisodeDataset:
        """All validation splits, one after the other."""
        return EpisodeDataset([episode for split in self.val_splits for episode in self.samples(split)])

    def test_dataset(self) -> EpisodeDataset:
        """The episodes of `test_split`."""
        return EpisodeDataset(self.samples(self.test_split))

    def predict_dataset(self) -> EpisodeDataset:
        """The episodes of `predict_split`."""
        return EpisodeDataset(self.samples(self.predict_split))

    def transfer_batch_to_device(
        self, batch: list[Episode], device: torch.device, dataloader_idx: int
    ) -> list[Episode]:
        """Episodes stay where they are: agents move what their networks read."""
        return batch

    # -- world ------------------------------------------------------------------------------------------------------

    def file(self, option: str, name: str) -> Path:
        """The path of a file or folder below `root`; raises `DataError` if `name` leads out of it."""
        root = Path(self.root)
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise DataError(f"data.{option}: {name!r} leads out of {root}; expected a path inside it")
        return root / name

    @cached_property
    def graphs(self) -> Graphs:
        """Graphs by scan."""
        folder = Path(self.root, "connectivity")
        if not folder.is_dir():
            raise DataError(self.missing(f"{folder}: folder not found."))
        return Graphs(folder)

    @cached_property
    def tokenizer(self) -> WordPieces:
        """Word pieces, with the words of the data set added."""
        path = self.file("vocabulary", self.vocabulary)
        if not path.is_file():
            raise DataError(self.missing(f"{path}: file not found."))
        words = self.file("words", self.words) if self.words else None
        extra = read_vocabulary(words) if words and words.is_file() else []
        extra = [word.lower() for word in extra if not (word.startswith("<") and word.endswith(">"))]
        return WordPieces(read_word_pieces(path), self.max_text, extra)

    @cached_property
    def object_store(self) -> Objects:
        """Features of the objects of every view."""
        path = self.file("objects", self.objects)
        if not path.exists():
            raise DataError(self.missing(f"{path}: not found."))
        return open_objects(path)

    @cached_property
    def room_labels(self) -> Rooms:
        """Room classes of the viewpoints."""
        return read_rooms(self.file("rooms", self.rooms))

    @cached_property
    def world(self) -> World:
        """Graphs, features and rooms."""
        views = None
        if self.views:
            path = self.file("views", self.views)
            if not path.exists():
                raise DataError(self.missing(f"{path}: not found."))
            views = ViewFeatures(path, self.feature_dim)
        return World(self.graphs, self.object_store, views, self.room_labels, self.max_objects)

    def environment(self, **options: Any) -> NavigationEnvironment:
        """A new environment in the world of this data."""
        return NavigationEnvironment(self.world, self.max_text, **options)

    @property
    def vocab_size(self) -> int:
        """Number of word pieces."""
        return len(self.tokenizer)

    @property
    def feature_dim(self) -> int:
        """Size F of an object's feature."""
        return self.object_store.feature_dim

    @property
    def num_rooms(self) -> int:
        """Number of room classes."""
        return len(ROOMS)

    # -- results ----------------------------------------------------------------------------------------------------

    def evaluator(self, split: str) -> Evaluator:
        """What scores trajectories of a split."""
        return EVALUATORS[self.dataset](self.samples(split), self.graphs, self.definition)

    def submission_file(self, split: str, records: Mapping[str, Any]) -> tuple[str, bytes]:
        """The file for the leaderboard: name and content. Keys of records are those of the episodes."""
        plain = {key.partition("/")[2]: record for key, record in records.items()}
        return submission(self.dataset, split, plain)

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        result = check_dataset(self)
        print_result(result)
        return not result.problems
