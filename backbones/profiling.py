"""What a network costs on this machine: multiply-adds, speed, peak memory, and each of its stages."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backbones.machine import time_now
from backbones.macs import counting, evaluating, macs_so_far

WARM_UP = 2
PASSES = 10
LONGEST_S = 30.0  # of timing, once there are three passes
REST = "(elsewhere)"


@dataclass(frozen=True)
class StageCost:
    """A part of a network: multiply-adds of one image, forward time of a batch in ms, shape of its last output."""

    name: str
    params: int
    macs: int
    time_ms: float
    output: tuple[int, ...]


@dataclass(frozen=True)
class NetworkCost:
    """A network: multiply-adds of one image, median speed of `passes` passes, peak memory in MB (10⁶ bytes)."""

    params: int
    macs: int
    images_per_second: float
    passes: int
    peak_memory_mb: float | None
    peak_memory_kind: str
    stages: list[StageCost]


def profile(
    model: nn.Module, images: Tensor, train: bool = False, say: Callable[[str], None] = lambda text: None
) -> NetworkCost:
    """Measure `model` on a batch of `images` (B, C, H, W) on its device.

    Speed and memory are those of a forward pass in evaluation mode or, with `train`, of a forward and backward pass in
    training mode; times of stages are of the forward pass in evaluation mode. `say` is told what is being done.
    """
    rows = stage_names(model)
    say("counting multiply-adds")
    with evaluating(model), counting() as counter:
        macs = _meter(model, images[:1].clone(), rows, lambda: macs_so_far(counter))
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
    seconds = _time_passes(model, images, train, say)
    memory, memory_kind = peak_memory(images.device)
    say("timing the stages")
    with evaluating(model), torch.inference_mode():
        passes = [_meter(model, images, rows, partial(time_now, images.device)) for _ in range(3)]
    params = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in rows}
    total_params = sum(p.numel() for p in model.parameters())
    params[REST] = total_params - sum(params.values())
    stages = [
        StageCost(
            name,
            params[name],
            int(macs.amount[name]),
            1e3 * statistics.median(run.amount[name] for run in passes),
            passes[0].output.get(name, ()),
        )
        for name in [*rows, REST]
    ]
    return NetworkCost(
        params=total_params,
        macs=int(sum(macs.amount.values())),
        images_per_second=len(images) / statistics.median(seconds),
        passes=len(seconds),
        peak_memory_mb=memory,
        peak_memory_kind=memory_kind,
        stages=[stage for stage in stages if stage.params or stage.macs or stage.name == REST],
    )


def stage_names(model: nn.Module) -> list[str]:
    """Names of the submodules that are the stages of a timm model: what ``feature_info`` names, and what is beside."""
    features = {level["module"] for level in getattr(model, "feature_info", [])}

    def below(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            name = f"{path}{name}"
            holds_stages = any(feature.startswith(f"{name}.") for feature in features)
            if name not in features and (holds_stages or isinstance(child, nn.ModuleList)):
                yield from below(child, f"{name}.")
            else:
                yield name

    return list(below(model, ""))


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Peak memory in MB (10⁶ bytes) and its kind: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6, "largest allocation of tensors on the GPU"
    if sys.platform == "win32":
        return None, "not measured on Windows without a GPU"
    import resource  # not part of Python on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss * unit / 1e6, "resident memory of the process, data loading not included"


@dataclass
class _Metered:
    amount: dict[str, float]
    output: dict[str, tuple[int, ...]]


def _meter(model: nn.Module, images: Tensor, rows: list[str], read: Callable[[], float]) -> _Metered:
    """Run `model` once and say by how much the meter `read` went up within each of the submodules `rows`."""
    metered = _Metered(dict.fromkeys([*rows, REST], 0), {})
    begin = read()
    with _watched(model, rows, read, metered):
        model(images)
    metered.amount[REST] = read() - begin - sum(metered.amount.values())
    return metered


@contextmanager
def _watched(model: nn.Module, rows: list[str], read: Callable[[], float], metered: _Metered) -> Iterator[None]:
    """Hook every module of the rows, as a stage may be called block by block; of nested calls the outermost counts."""
    running: list[tuple[nn.Module, float]] = []
    handles: list[Any] = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        if not running:
            running.append((module, read()))

    def leave(module: nn.Module, row: str, output: Any) -> None:
        if running and running[-1][0] is module:
            metered.amount[row] += read() - running.pop()[1]
            while isinstance(output, tuple | list) and output:
                output = output[0]
            metered.output[row] = tuple(getattr(output, "shape", ()))

    try:
        for row in rows:
            for module in model.get_submodule(row).modules():
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(lambda m, _i, out, row=row: leave(m, row, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _time_passes(model: nn.Module, images: Tensor, train: bool, say: Callable[[str], None]) -> list[float]:
    """Seconds of each timed pass."""
    read, seconds, start = partial(time_now, images.device), [], time.monotonic()
    step = _training_step if train else _forward_step
    with evaluating(model):
        model.train(train)
        for index in range(-WARM_UP, PASSES):
            if index >= 3 and time.monotonic() - start > LONGEST_S:
                break
            say(f"timing pass {index + 1} of {PASSES}" if index >= 0 else "warming up")
            begin = read()
            step(model, images)
            if index >= 0:
                seconds.append(read() - begin)
    return seconds


@torch.inference_mode()
def _forward_step(model: nn.Module, images: Tensor) -> None:
    model(images)


def _training_step(model: nn.Module, images: Tensor) -> None:
    output = model(images)
    outputs = output if isinstance(output, tuple | list) else [output]
    torch.stack([x.float().mean() for x in outputs]).sum().backward()
    model.zero_grad(set_to_none=True)
