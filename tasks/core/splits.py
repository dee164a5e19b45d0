"""Data sets made of splits on disk: finding their files, and stopping before a run starts when some are missing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

from tasks.core.data import DataError, TaskDataModule, missing_data_message

Samples = TypeVar("Samples")


@dataclass(frozen=True)
class Listing(Generic[Samples]):
    """The files of a split: its samples in order, what is wrong with the files, and what may be fine but is unusual."""

    samples: Samples
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class SplitDataModule(TaskDataModule, Generic[Samples]):
    """Base of datamodules whose splits are files on disk; a task adds `scan` and its data sets.

    `layout` shows the files expected, `source` says where to get them and `sample_command` what runs without them.
    """

    layout: ClassVar[str]
    source: ClassVar[str]
    sample_command: ClassVar[str]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the annotated splits; `test` evaluates the last one."""
        return ("train", "val")

    def scan(self, split: str) -> Listing[Samples]:
        """List the files of a split; their contents are not read."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Find the files that `stage` needs, so that missing data stops a run before it starts."""
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": self.splits[-1:]}.get(stage, ()):
            self.samples(split)
        if stage == "predict":
            self.predict_dataset()

    def samples(self, split: str) -> Samples:
        """Return the samples of a split; raises `DataError` if files are missing or not laid out as expected."""
        if split not in self._samples:
            listing = self.scan(split)
            if listing.problems:
                first, others = listing.problems[0], len(listing.problems) - 1
                raise DataError(f"{first} (and {others} more problems; `check` lists them all)" if others else first)
            self._samples[split] = listing.samples
        return self._samples[split]

    def missing(self, what: str) -> str:
        """Say what is missing, what was expected and how to go on."""
        return missing_data_message(what, self.layout, self.source, self.sample_command)

    @cached_property
    def _samples(self) -> dict[str, Samples]:
        return {}


def fraction_by_name(ids: Sequence[str], fraction: float) -> set[str]:
    """Choose a fixed share of names, at least one, by their hashes: adding names moves few of the others."""
    ranked = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    return set(ranked[: max(1, round(fraction * len(ids)))])
