"""Merged records and extremes are the same for any number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tasks.core.errors import UserError
from tasks.core.evaluation import Extremes, Sample, gather_by_id


def record(index):
    return {"iou": index / 7, "counts": np.full((2, 2), index), "loss": torch.tensor(float(index)), "nan": float("nan")}


def evaluate(indices, k=3):
    """What one process does with its samples."""
    records = {f"image_{index:03d}": record(index) for index in indices}
    extremes = Extremes(k)
    for index in indices:
        # many equal scores: ids must decide
        extremes.add(f"image_{index:03d}", index // 4, lambda index=index: np.full((4, 4, 3), index, np.uint8))
    best, worst = extremes.gather()
    return gather_by_id(records), best, worst


def plain(result):
    records, best, worst = result
    shown = [
        [(sample.id, sample.score, int(sample.payload[0, 0, 0])) for sample in samples] for samples in (best, worst)
    ]
    return [
        (key, value["iou"], value["counts"].tolist(), float(value["loss"])) for key, value in records.items()
    ], *shown


def run_process(rank, folder, count):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = plain(evaluate(range(rank, count, 2)))
    expected = plain(evaluate_alone(count))
    assert result == expected, f"rank {rank}: {result} != {expected}"
    try:
        gather_by_id({"same": rank})
    except UserError as error:
        (Path(folder) / f"error_{rank}").write_text(str(error))
    assert gather_by_id({"same": record(1)}).keys() == {"same"}
    dist.destroy_process_group()


def evaluate_alone(count, k=3):
    """The definition: sort everything, best first and ties by id, and take both ends."""
    samples = [Sample(f"image_{index:03d}", index // 4, np.full((4, 4, 3), index, np.uint8)) for index in range(count)]
    ranked = sorted(samples, key=lambda sample: (-sample.score, sample.id))
    return {f"image_{index:03d}": record(index) for index in range(count)}, ranked[:k], ranked[k:][::-1][:k]


@pytest.mark.slow
@pytest.mark.parametrize("count", [13, 1])  # with one sample the second process has none
def test_two_processes_equal_one(tmp_path, count):
    mp.spawn(run_process, (str(tmp_path), count), nprocs=2)
    for rank in range(2):
        assert "'same' occurs twice" in (tmp_path / f"error_{rank}").read_text()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 13, 40])
def test_extremes_equal_sorting_everything(count):
    order = np.random.default_rng(count).permutation(count).tolist()
    assert plain(evaluate(order)) == plain(evaluate_alone(count))


def test_records_are_sorted_by_id():
    assert list(gather_by_id({"b": 1, "a": 2})) == ["a", "b"]


def test_extremes_draw_only_what_they_keep():
    drawn = []
    extremes = Extremes(2)
    for index in range(100):
        score = (1.0, 0.9, 0.1, 0.0)[index] if index < 4 else 0.5
        extremes.add(f"{index:03d}", score, lambda index=index: drawn.append(index))
    assert drawn == [0, 1, 2, 3]


def test_extremes_stay_small():
    extremes = Extremes(2)
    for index in range(1000):
        extremes.add(f"{index:03d}", float(index), lambda: None)
    assert len(extremes._kept) == 4


def test_samples_without_a_score_are_left_out_and_repeated_ids_count_once():
    extremes = Extremes(2)
    for id, score in [("a", 0.1), ("b", float("nan")), ("a", 0.1), ("c", 0.2), ("d", 0.3)]:
        extremes.add(id, score, lambda: None)
    best, worst = extremes.gather()
    assert [sample.id for sample in best] == ["d", "c"]
    assert [sample.id for sample in worst] == ["a"]
