"""Loaders, samplers and seeding that all tasks share.

Training samplers hand out *virtual* indices `index + pass * length`, so a data set knows in which pass over the data
it is asked for a sample and can seed that sample's augmentation from (seed, pass, index) alone. Batches are therefore
the same for any number of workers and after resuming in mid-epoch, and no two workers draw the same random stream.
"""

import itertools
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Protocol, cast

import cv2
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from tasks.core.errors import UserError


class DataError(UserError):
    """A data set that cannot be used.

    A loader worker re-raises with its traceback inside the message; only the message itself is kept.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught DataError in DataLoader worker"):
            message = message.split("DataError: ", 1)[1].rstrip()
        super().__init__(message)


def missing_data_message(what: str, layout: str, source: str, sample_command: str) -> str:
    """Say what is missing, the layout expected, where to get the data and which command runs without it."""
    indented = "\n".join(f"  {line}" for line in layout.strip("\n").splitlines())
    return (
        f"{what}\nExpected layout:\n{indented}\nWhere to get it: {source}\nTo try the task without it: {sample_command}"
    )


def _process() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class TrainSampler(Sampler[int]):
    """Shuffled virtual indices of one process, the same number on every process.

    An epoch is one pass over the `length` samples, or as many passes as fill one global batch when the set is smaller;
    the remainder that does not fill a global batch is dropped. The order depends on (seed, pass) only.
    With `repeats` R each sample comes R times in a row, under R virtual indices and so on different processes, and the
    epoch is cut to the length it has without: repeated augmentation (arXiv 1901.09335) with DeiT's sampling.
    `batch_size` counts samples per process. A resumed run starts with `epoch` and skips its first `start` batches;
    `len()` stays that of a whole epoch. `rank` and `world_size` come from `torch.distributed` unless given.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        *,
        repeats: int = 1,
        epoch: int = 0,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        default_rank, default_world_size = _process()
        self.rank = default_rank if rank is None else rank
        self.world_size = default_world_size if world_size is None else world_size
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.repeats = repeats
        global_batch = batch_size * self.world_size
        self.passes = -(-global_batch // length)  # 1 unless the set is smaller than a global batch
        self.num_batches = self.passes * length // global_batch
        self.epoch = epoch
        self._resumed_epoch, self._skip = epoch, start * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (called by Lightning)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.passes
        order = np.concatenate([self._order(first + i) for i in range(self.passes)])
        mine = order[self.rank :: self.world_size][: len(self)]
        yield from mine[self._skip if self.epoch == self._resumed_epoch else 0 :].tolist()

    def _order(self, number: int) -> np.ndarray:
        """Virtual indices of one pass over the data: those of its repeats are numbered like passes of their own."""
        generator = np.random.default_rng((self.seed, number))
        order = generator.permutation(self.length) if self.shuffle else np.arange(self.length)
        virtual_passes = number * self.repeats + np.arange(self.repeats)
        return (order[:, None] + virtual_passes * self.length).ravel()


class GroupedBatches(BatchSampler):
    """Batches of a `TrainSampler` that hold samples of one group each, e.g. images of one orientation.

    `groups` names the group of each sample. Within an epoch nothing is lost and every process has the number of batches
    it has without groups: what fills no batch of its group, at the end, is put together in the order it was drawn in.
    A resumed run skips the first `start` batches of its first epoch.
    """

    def __init__(self, sampler: TrainSampler, groups: Sequence[int], start: int = 0) -> None:
        super().__init__(sampler, sampler.batch_size, drop_last=True)
        self.groups = groups
        self._resumed_epoch, self._skip = sampler.epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        assert isinstance(self.sampler, TrainSampler)
        skip = self._skip if self.sampler.epoch == self._resumed_epoch else 0
        yield from itertools.islice(self._batches(), skip, None)

    def _batches(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        order: dict[int, int] = {}  # of what waits: its position
        for position, virtual in enumerate(self.sampler):
            group = waiting[self.groups[virtual % len(self.groups)]]
            group.append(virtual)
            order[virtual] = position
            if len(group) == self.batch_size:
                yield list(group)
                group.clear()
        rest = sorted(itertools.chain(*waiting.values()), key=order.__getitem__)
        yield from (rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size))


class EvaluationSampler(Sampler[int]):
    """The samples of every `world_size`-th batch starting with `rank`: over all processes each is seen exactly once.

    Whole batches are divided, not samples, because a network's output for a sample depends, in its last bit, on the
    other samples of the batch (matrix products of other sizes are summed in another order). Batches, and with them
    every output, are so the same for any number of processes with equal devices and numbers of threads.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        default_rank, default_world_size = _process()
        rank = default_rank if rank is None else rank
        step = batch_size * (default_world_size if world_size is None else world_size)
        starts = range(rank * batch_size, length, step)
        self.indices = [index for start in starts for index in range(start, min(start + batch_size, length))]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class EvaluationBatches(BatchSampler):
    """Batches of an `EvaluationSampler`; a process without samples gets one batch of none.

    Lightning skips an evaluation, and with it the gathering at its end, on a process without batches, while the
    others wait for it.
    """

    def __len__(self) -> int:
        return max(super().__len__(), 1)

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        yield next(batches, [])
        yield from batches


class Augmentation(Protocol):
    """An albumentations transform or composition."""

    def set_random_state(self, random_generator: np.random.Generator, py_random: random.Random) -> None:
        """Use these generators from now on."""


def seed_augmentation(augmentation: Augmentation, seed: int, epoch: int, index: int) -> None:
    """Make the next call of an albumentations composition depend on (seed, epoch, index) only.

    All its transforms draw from one stream. `Compose.set_random_seed` would give each transform a copy of the same
    stream, which couples their decisions: two transforms with p = 0.5 would always be applied together.
    """
    sequence = np.random.SeedSequence((seed, epoch, index))
    words = sequence.generate_state(4, np.uint64)
    generator = np.random.Generator(np.random.PCG64(sequence))
    augmentation.set_random_state(generator, random.Random(int(words[0])))


@contextmanager
def seeded_generators(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Make what is drawn inside from `random`, `numpy.random` and torch (CPU) depend on (seed, epoch, index) only.

    For transforms that draw from these global generators, which continue afterwards as if nothing had been drawn.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence((seed, epoch, index)).generate_state(6, np.uint32)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])  # noqa: NPY002
    # Not torch.manual_seed, which would seed GPUs too.
    torch.default_generator.manual_seed(int(words[4]) << 32 | int(words[5]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _start_worker(worker: int) -> None:
    # One process per worker is the parallelism; OpenCV's own threads would only compete with it.
    cv2.setNumThreads(0)


def list_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate any number of samples of different sizes: every value becomes a list, empty without samples."""
    batch: dict[str, Any] = defaultdict(list)
    for sample in samples:
        for name, value in sample.items():
            batch[name].append(value)
    return batch


class TaskDataModule(LightningDataModule):
    """Owns loaders, workers and samplers; a task adds its data sets and how to collate their samples.

    `batch_size` and `eval_batch_size` count samples per process. Create the Trainer with
    `use_distributed_sampler=False`: the samplers here already divide the data between processes, and those for
    evaluation never repeat or drop a sample. The position inside an epoch is part of every checkpoint.
    `repeats` is the number of differently augmented copies of each training sample in a row (see `TrainSampler`).

    Subclasses implement `train_dataset`, `val_dataset`, `test_dataset`, `predict_dataset` (map-style; the one for
    training is indexed by virtual indices) and may override `train_collate` and `eval_collate`. The latter, and the
    evaluation and prediction steps, must take a batch of no samples: there may be fewer of them than processes.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        pin_memory: bool = True,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size), ("repeats", repeats)):
            if value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if num_workers < 0 or seed < 0:
            raise UserError(f"num_workers is {num_workers} and seed {seed}; expected values of at least 0")
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.repeats = repeats
        self._resume = {"epoch": 0, "batches": 0}

    train_collate: Callable[[list[Any]], Any] | None = None
    eval_collate: Callable[[list[Any]], Any] | None = None

    def train_dataset(self) -> Dataset[Any]:
        """Return the training set, which is indexed by virtual indices."""
        raise NotImplementedError

    def val_dataset(self) -> Dataset[Any]:
        """Return the validation set."""
        raise NotImplementedError

    def test_dataset(self) -> Dataset[Any]:
        """Return the test set."""
        raise NotImplementedError

    def predict_dataset(self) -> Dataset[Any]:
        """Return the inputs to predict."""
        raise NotImplementedError

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        raise NotImplementedError

    def train_groups(self) -> Sequence[int] | None:
        """Return the group of each training sample where batches are to hold one group each (see `GroupedBatches`)."""
        return None

    def train_dataloader(self) -> DataLoader[Any]:
        """Load training batches; a resumed run continues behind the last batch of its checkpoint."""
        dataset = self.train_dataset()
        groups = self.train_groups()
        epoch, start = self._resume["epoch"], self._resume["batches"]
        sampler = TrainSampler(
            len(cast(Sized, dataset)),
            self.batch_size,
            self.seed,
            repeats=self.repeats,
            epoch=epoch,
            start=start if groups is None else 0,
        )
        self._resume = {"epoch": 0, "batches": 0}
        if groups is not None:
            batches = GroupedBatches(sampler, groups, start)
            return self._loader(dataset, self.train_collate, batch_sampler=batches)
        return self._loader(dataset, self.train_collate, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load validation batches."""
        return self._evaluation_loader(self.val_dataset())

    def test_dataloader(self) -> DataLoader[Any]:
        """Load test batches."""
        return self._evaluation_loader(self.test_dataset())

    def predict_dataloader(self) -> DataLoader[Any]:
        """Load the inputs to predict."""
        return self._evaluation_loader(self.predict_dataset())

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch in progress and the number of its batches already trained on (Lightning checkpoints)."""
        if self.trainer is None:
            return {}
        loop = self.trainer.fit_loop
        batch_progress: Any = loop.epoch_loop.batch_progress.current
        # `processed` counts a batch after its optimizer step and before the hooks that save checkpoints;
        # `ready` counts epochs from 1 when they begin.
        epoch = max(loop.epoch_progress.current.ready - 1, 0)
        batches = batch_progress.processed
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position that `state_dict` saved."""
        self._resume = dict(state_dict)
        # Lightning looks for this state in the loader and warns when it is not there.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        sampler = EvaluationSampler(len(cast(Sized, dataset)), self.eval_batch_size)
        batches = EvaluationBatches(sampler, self.eval_batch_size, drop_last=False)
        return self._loader(dataset, self.eval_collate, batch_sampler=batches)

    def _loader(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None, **batching: Any
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            **batching,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            persistent_workers=self.num_workers > 0,
        )
