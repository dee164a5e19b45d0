"""Samplers divide and shuffle the data; seeding makes each sample's augmentation depend on its place alone."""

import itertools
import random
from contextlib import suppress
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tasks.core.data import EvaluationSampler, GroupedBatches, TrainSampler, seed_augmentation, seeded_generators


def test_train_sampler_shuffles_each_epoch_differently_and_covers_it():
    sampler = TrainSampler(20, batch_size=4, seed=0, rank=0, world_size=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        virtual = list(sampler)
        assert sorted(virtual) == list(range(20 * epoch, 20 * epoch + 20))
        epochs.append([index % 20 for index in virtual])
    assert epochs[0] != epochs[1] != epochs[2]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    assert list(TrainSampler(20, 4, seed=1)) != epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_train_sampler_gives_each_process_as_many_samples_and_none_twice(world_size):
    samplers = [TrainSampler(23, 2, 0, rank=rank, world_size=world_size) for rank in range(world_size)]
    drawn = [list(sampler) for sampler in samplers]
    global_batch = 2 * world_size
    assert [len(indices) for indices in drawn] == [23 // global_batch * 2] * world_size
    assert [len(sampler) for sampler in samplers] == [len(indices) for indices in drawn]
    together = [index for indices in drawn for index in indices]
    assert len(set(together)) == len(together)


def test_train_sampler_fills_a_batch_larger_than_the_set_with_distinct_virtual_indices():
    samplers = [TrainSampler(3, 4, 0, rank=rank, world_size=2) for rank in range(2)]
    virtual = [*samplers[0], *samplers[1]]
    assert len(virtual) == 8
    assert len(set(virtual)) == 8  # repeated samples are augmented differently
    assert {index % 3 for index in virtual} == {0, 1, 2}
    first = set(virtual)
    for sampler in samplers:
        sampler.set_epoch(1)
    assert first.isdisjoint([*samplers[0], *samplers[1]])


def test_train_sampler_without_shuffling_keeps_the_order():
    assert list(TrainSampler(6, 3, 0, shuffle=False)) == list(range(6))


def test_train_sampler_skips_consumed_batches_only_in_the_resumed_epoch():
    whole = list(TrainSampler(20, 4, seed=0))
    resumed = TrainSampler(20, 4, seed=0, start=2)
    assert list(resumed) == whole[8:]
    assert len(resumed) == 20
    resumed.set_epoch(1)
    assert len(list(resumed)) == 20


@pytest.mark.parametrize(("length", "world_size"), [(13, 2), (1, 2), (4, 4), (7, 3)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_of_an_evaluation_are_the_same_for_any_number_of_processes(length, world_size, batch_size):
    def batches(rank, world_size):
        sampler = EvaluationSampler(length, batch_size, rank=rank, world_size=world_size)
        assert len(sampler) == len(list(sampler))
        return list(BatchSampler(sampler, batch_size, drop_last=False))

    one = batches(0, 1)
    assert [index for batch in one for index in batch] == list(range(length))
    several = [batches(rank, world_size) for rank in range(world_size)]
    assert sorted(itertools.chain(*several)) == one
    counts = [len(part) for part in several]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeats_follow_each_other_and_are_divided_as_in_deit(world_size):
    length, batch_size, repeats = 50, 4, 3
    drawn = [
        list(TrainSampler(length, batch_size, 7, repeats=repeats, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    shuffled = list(TrainSampler(length, 1, 7, rank=0, world_size=1))
    repeated = np.repeat(shuffled, repeats)
    number = length // (batch_size * world_size) * batch_size  # the epoch keeps its length
    for rank, virtual in enumerate(drawn):
        assert [index % length for index in virtual] == repeated[rank::world_size][:number].tolist()
    together = [index for virtual in drawn for index in virtual]
    assert len(set(together)) == len(together)  # each repeat is augmented differently


def test_repeats_of_different_epochs_share_no_virtual_index():
    sampler = TrainSampler(20, 4, seed=0, repeats=3, rank=0, world_size=1)
    seen: list[int] = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 20
        seen += list(sampler)
    assert len(set(seen)) == 60
    assert max(seen) < 3 * 3 * 20


def test_repeats_fill_a_batch_larger_than_the_set():
    virtual = list(TrainSampler(3, 8, seed=0, repeats=2, rank=0, world_size=1))
    assert len(set(virtual)) == 8
    assert {index % 3 for index in virtual} == {0, 1, 2}


def test_seeded_generators_depend_on_seed_epoch_and_index_and_leave_no_trace():
    def numbers() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    def draw(*key: int) -> tuple[float, float, float]:
        with seeded_generators(*key):
            return numbers()

    def set_global_state() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    set_global_state()
    untouched = [numbers() for _ in range(3)]
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2), (0, 2, 1)]
    for values in zip(*(draw(*key) for key in keys), strict=True):
        assert len(set(values)) == len(keys)
    assert draw(0, 1, 2) == draw(0, 1, 2)
    set_global_state()
    assert numbers() == untouched[0]
    with suppress(ZeroDivisionError), seeded_generators(0, 0, 0):
        _ = numbers()[0] / 0
    assert [numbers() for _ in range(2)] == untouched[1:]


class Augmented(Dataset[Any]):
    """Returns which of two transforms with p = 0.5 were applied, and a random number."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.transform = A.Compose([A.InvertImg(p=0.5), A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=1)])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, virtual: int) -> np.ndarray:
        epoch, index = divmod(virtual, self.length)
        seed_augmentation(self.transform, 0, epoch, index)
        ramp = np.arange(64, dtype=np.uint8).reshape(1, 64).repeat(8, 0)
        return self.transform(image=ramp)["image"]


def augmented_epochs(workers: int) -> list[np.ndarray]:
    data = Augmented(24)
    sampler = TrainSampler(24, 4, seed=0)
    loader = DataLoader(data, 4, sampler=sampler, num_workers=workers, drop_last=True)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)).numpy())
    return epochs


def test_augmentation_is_the_same_for_any_number_of_workers_and_new_in_each_epoch():
    expected = augmented_epochs(0)
    for workers in (2, 4):
        for one, other in zip(expected, augmented_epochs(workers), strict=True):
            np.testing.assert_array_equal(one, other)
    everything = {image.tobytes() for epoch in expected for image in epoch}
    assert len(everything) == 48  # no stream is drawn twice, neither by two workers nor in two epochs


def test_augmentation_depends_on_seed_epoch_and_index():
    def draw(seed: int, epoch: int, index: int) -> float:
        transform = A.Compose([A.NoOp()])
        seed_augmentation(transform, seed, epoch, index)
        return transform.py_random.random()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1), draw(0, 1, 2), draw(0, 2, 1)}) == 6


def test_transforms_decide_independently():
    # Compose.set_random_seed would apply both together or neither.
    transform = A.Compose([A.InvertImg(p=0.5), A.HorizontalFlip(p=0.5)])
    ramp = np.array([[10, 200]], dtype=np.uint8)
    outcomes = []
    for index in range(400):
        seed_augmentation(transform, 0, 0, index)
        left, right = transform(image=ramp)["image"][0].tolist()
        inverted = left + right == 300
        outcomes.append((inverted, (left > right) != inverted))
    for inverted in (False, True):
        for flipped in (False, True):
            assert 70 < outcomes.count((inverted, flipped)) < 130


def test_augmentation_ignores_the_global_random_state():
    transform = A.Compose([A.RandomBrightnessContrast(p=1)])
    image = np.full((4, 4), 100, dtype=np.uint8)
    results = []
    for global_seed in (1, 2):
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        torch.manual_seed(global_seed)
        seed_augmentation(transform, 0, 0, 0)
        results.append(transform(image=image)["image"])
    np.testing.assert_array_equal(*results)


def test_samplers_take_their_process_from_torch_distributed(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    assert list(EvaluationSampler(13, 2)) == [2, 3, 8, 9]
    assert list(TrainSampler(12, 2, 0)) == list(TrainSampler(12, 2, 0, rank=1, world_size=3))


def grouped(groups, batch_size, *, start=0, epoch=0, rank=0, world_size=1):
    sampler = TrainSampler(len(groups), batch_size, seed=0, epoch=epoch, rank=rank, world_size=world_size)
    return GroupedBatches(sampler, groups, start)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_hold_one_group_but_for_the_last_ones(batch_size, world_size):
    groups = (np.random.default_rng(0).random(61) < 0.3).astype(int).tolist()
    for epoch in range(3):
        seen = []
        for rank in range(world_size):
            batches = grouped(groups, batch_size, epoch=epoch, rank=rank, world_size=world_size)
            drawn = list(batches)
            assert len(drawn) == len(batches) == 61 // (batch_size * world_size)
            assert [len(batch) for batch in drawn] == [batch_size] * len(drawn)
            mixed = [len({groups[virtual % 61] for virtual in batch}) > 1 for batch in drawn]
            assert not any(mixed[:-1])
            # the very samples that this process has without groups
            plain = TrainSampler(61, batch_size, seed=0, epoch=epoch, rank=rank, world_size=world_size)
            assert sorted(itertools.chain(*drawn)) == sorted(plain)
            seen += itertools.chain(*drawn)
        assert len(set(seen)) == len(seen)


def test_grouped_batches_resume_behind_those_already_trained_on():
    groups = [0, 1, 1] * 12
    whole = list(grouped(groups, 4, epoch=2))
    resumed = grouped(groups, 4, epoch=2, start=3)
    assert list(resumed) == whole[3:]
    assert len(resumed) == len(whole)  # that of an epoch, as Lightning expects
    resumed.sampler.set_epoch(3)  # what Lightning calls
    assert list(resumed) == list(grouped(groups, 4, epoch=3)) != whole
    assert len(list(resumed)) == len(whole)


def test_groups_of_a_set_smaller_than_a_batch():
    (batch,) = grouped([0, 1, 0], 4)
    assert len(set(batch)) == 4  # two variations of one
    assert {virtual % 3 for virtual in batch} == {0, 1, 2}
