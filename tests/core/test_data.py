import itertools
import random
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tasks.core.data import (
    DataError,
    EvaluationSampler,
    TaskDataModule,
    TrainSampler,
    missing_data_message,
    seed_augmentation,
    seeded_generators,
)
from tasks.core.errors import UserError


class Virtual(Dataset[int]):
    """Returns the virtual index it was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Numbers(TaskDataModule):
    def __init__(self, length: int = 22, **kwargs: Any) -> None:
        super().__init__(root="", **{"batch_size": 4, "num_workers": 0, "seed": 3} | kwargs)
        self.length = length

    def train_dataset(self) -> Virtual:
        return Virtual(self.length)

    def val_dataset(self) -> Virtual:
        return Virtual(3)


class Recorder(LightningModule):
    """Remembers the virtual indices it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, tuple(batch.tolist())))
        return self.weight * 0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    folder: Path,
    workers: int,
    ckpt: Path | None = None,
    callbacks: list | None = None,
    repeats: int = 1,
    **kwargs: Any,
) -> list:
    model = Recorder()
    trainer = Trainer(
        **{"max_epochs": 4} | kwargs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=callbacks or [],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    data = Numbers(num_workers=workers, repeats=repeats)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return model.seen


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


RESUME_CASES = {
    "in the middle of an epoch": {"checkpoint": {"every_n_train_steps": 7}, "trainer": {}},
    "after the last batch of an epoch": {"checkpoint": {"every_n_train_steps": 10}, "trainer": {}},
    "at the end of an epoch": {
        "checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "trainer": {},
    },
    "after validation in the middle of an epoch": {
        "checkpoint": {"save_on_train_epoch_end": False},
        "trainer": {"val_check_interval": 2},
    },
    "after validation at the end of an epoch": {"checkpoint": {"save_on_train_epoch_end": False}, "trainer": {}},
    "with max_steps": {
        "checkpoint": {"every_n_train_steps": 7},
        "trainer": {"max_epochs": None, "max_steps": 18},
    },
    "with max_steps at the end of an epoch": {
        "checkpoint": {"every_n_train_steps": 5},
        "trainer": {"max_epochs": None, "max_steps": 18},
    },
    "with max_steps and validation by steps": {
        "checkpoint": {"save_on_train_epoch_end": False},
        "trainer": {"max_epochs": None, "max_steps": 18, "val_check_interval": 3, "check_val_every_n_epoch": None},
    },
    "with accumulated gradients": {
        "checkpoint": {"every_n_train_steps": 4},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "with repeated augmentation": {"checkpoint": {"every_n_train_steps": 7}, "trainer": {"repeats": 3}},
    "with fewer batches per epoch": {"checkpoint": {"every_n_train_steps": 4}, "trainer": {"limit_train_batches": 3}},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", RESUME_CASES)
def test_resumed_run_sees_what_an_uninterrupted_run_sees(tmp_path, case, workers):
    options = RESUME_CASES[case]
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **options["checkpoint"])
    expected = train(tmp_path, 0, callbacks=[checkpoint], **options["trainer"])
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(saved) > 1
    for path in saved if workers == 0 else saved[:2]:
        resumed = train(tmp_path, workers, path, **options["trainer"])
        batches = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert [batch for _, batch in resumed] == [batch for _, batch in expected[batches["processed"] :]], path


def test_a_run_can_be_resumed_twice_and_without_warning(tmp_path):
    def checkpoint(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)

    expected = train(tmp_path, 0, callbacks=[checkpoint("first")])
    second = tmp_path / "second"
    with warnings.catch_warnings(record=True) as caught:
        train(tmp_path, 0, tmp_path / "first" / "step=3.ckpt", callbacks=[checkpoint("second")], max_epochs=3)
    assert not [warning for warning in caught if "not resumable" in str(warning.message)]
    assert sorted(path.stem for path in second.iterdir()) == ["step=12", "step=15", "step=6", "step=9"]
    for path in second.iterdir():
        resumed = train(tmp_path, 0, path)
        assert resumed == expected[int(path.stem.removeprefix("step=")) :], path


def test_samplers_take_their_process_from_torch_distributed(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    assert list(EvaluationSampler(13, 2)) == [2, 3, 8, 9]
    assert list(TrainSampler(12, 2, 0)) == list(TrainSampler(12, 2, 0, rank=1, world_size=3))


class Failing(Virtual):
    def __getitem__(self, index: int) -> int:
        raise DataError("a/b.png: first line\nsecond line")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_only_its_message(workers):
    module = Numbers(num_workers=workers)
    module.val_dataset = lambda: Failing(2)
    with pytest.raises(UserError) as error:
        next(iter(module.val_dataloader()))
    assert str(error.value) == "a/b.png: first line\nsecond line"


def test_missing_data_message_says_everything():
    message = missing_data_message("x: not found.", "\nroot/a\nroot/b", "https://example.org", "python -m tasks")
    assert message.splitlines() == [
        "x: not found.",
        "Expected layout:",
        "  root/a",
        "  root/b",
        "Where to get it: https://example.org",
        "To try the task without it: python -m tasks",
    ]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}, {"seed": -1}, {"repeats": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Numbers(**options)


class Shard(LightningModule):
    """Writes down which samples each process saw; all of them come to the end, also one without samples."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for index in batch.tolist():
            (self.folder / f"{self.global_rank}-{batch_idx}-{index}").touch()

    def on_validation_epoch_end(self) -> None:
        self.trainer.strategy.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 13])
def test_two_processes_evaluate_each_sample_once(tmp_path, length):
    module = Numbers()
    module.val_dataset = lambda: Virtual(length)
    module.eval_collate = torch.tensor
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(Shard(tmp_path), datamodule=module)
    assert sorted(int(path.name.split("-")[2]) for path in tmp_path.iterdir()) == list(range(length))
