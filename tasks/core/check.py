"""What the `check` command of the tasks shares: reading every sample, finding duplicates, printing what was found."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import track

from tasks.core.data import DataError
from tasks.core.splits import Listing

Sample = TypeVar("Sample")
Reading = TypeVar("Reading")
Summary = TypeVar("Summary")
Checked = TypeVar("Checked", bound="CheckedImage")
AT_ONCE = 1024  # samples handed to the threads at a time; millions at once would fill the memory


@dataclass
class Findings:
    """What was found in a data set; `problems` must be repaired, `notes` may be fine."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _first_with: dict[str, tuple[str, str]] = field(default_factory=dict, init=False, repr=False)

    def add_listing(self, listing: Listing[Any]) -> None:
        """Add the messages of a split. Where all splits list the same files, each message is kept once."""
        self.problems += [problem for problem in listing.problems if problem not in self.problems]
        self.notes += [note for note in listing.notes if note not in self.notes]

    def compare(self, digest: str, split: str, origin: str) -> None:
        """Look for an earlier sample with the same content: in another split a problem, in the same one a note."""
        other, first = self._first_with.setdefault(digest, (split, origin))
        if other != split:
            self.problems.append(f"{origin}: the same file as {first}, which is in {other}")
        elif first != origin:
            self.notes.append(f"{origin}: the same file as {first}")

    def check_images(
        self, split: str, samples: Collection[Sample], read: Callable[[Sample], Checked], num_workers: int
    ) -> Iterator[Checked]:
        """Read every image of a split in threads and yield those that can be read.

        What `read` raises as `DataError` becomes a problem; images with the same content are compared.
        """
        attempt = partial(_attempt, read=read)
        for checked in read_all(samples, attempt, len(samples), num_workers, f"Checking {split}"):
            if isinstance(checked, DataError):
                self.problems.append(str(checked))
                continue
            self.compare(checked.digest, split, checked.origin)
            yield checked

    def print_messages(self, console: Console) -> None:
        """Print one line per note and problem."""
        for title, lines in (("note", self.notes), ("problem", self.problems)):
            for line in lines:
                console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)


@dataclass
class CheckResult(Findings, Generic[Summary]):
    """Everything found in a data set, with a summary per split."""

    class_names: list[str] = field(default_factory=list)
    splits: dict[str, Summary] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckedImage:
    """An image that can be read: where it is from, a hash of its content, and its height and width."""

    origin: str
    digest: str
    size: tuple[int, int]


def digest_of(path: Path) -> str:
    """Hash of the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class SizeRange:
    """The smallest and largest image by area, as (height, width); None without images."""

    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def add(self, height: int, width: int) -> None:
        """Take one image into account."""
        area = height * width
        if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
            self.smallest = (height, width)
        if self.largest is None or area > self.largest[0] * self.largest[1]:
            self.largest = (height, width)

    def as_text(self) -> tuple[str, str]:
        """Return both as "width x height"."""
        return _as_text(self.smallest), _as_text(self.largest)


def _as_text(size: tuple[int, int] | None) -> str:
    return "-" if size is None else f"{size[1]} x {size[0]}"


def _attempt(sample: Sample, read: Callable[[Sample], Reading]) -> Reading | DataError:
    try:
        return read(sample)
    except DataError as error:
        return error


def read_all(
    samples: Iterable[Sample], read: Callable[[Sample], Reading], total: int, num_workers: int, title: str
) -> Iterator[Reading]:
    """Read samples in threads (decoding releases the interpreter lock), in order, under a progress bar."""

    def readings() -> Iterator[Reading]:
        remaining = iter(samples)
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            while some := list(itertools.islice(remaining, AT_ONCE)):
                yield from pool.map(read, some)

    yield from track(readings(), title, total, console=Console(stderr=True), transient=True)
