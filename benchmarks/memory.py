"""Bytes kept for the backward pass and step time: plain, with Mesa, with gradient checkpointing; the largest batch."""

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from benchmarks.backbones import machine
from benchmarks.timing import Clock, spread, time_in_turns
from efficiency import checkpointing, mesa
from efficiency.saved_bytes import autocast, count_saved_bytes

METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda network: network,
    "Mesa": mesa.convert,
    "checkpointing": checkpointing.convert,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_BATCH = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks memory``."""
    parser.add_argument("--backbone", default="deit_small_patch16_224", help="any model of timm or of ours")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each; their median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch of each instead")
    parser.add_argument("--limit-gb", type=float, help="memory for --largest-batch (default: all of the GPU's)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table."""
    for name in ("batch", "size", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    network = backbones.create(arguments.backbone).to(device).train()
    networks = {name: convert(copy.deepcopy(network)) for name, convert in METHODS.items()}
    results: dict[str, Any] = {"machine": machine(device), "backbone": arguments.backbone, "size": arguments.size}
    if arguments.largest_batch:
        results |= _largest_batches(networks, arguments, device)
        text = largest_batch_table(results)
    else:
        results |= _bytes_and_times(networks, arguments, device)
        text = table(results)
    print(text)
    if arguments.output is not None:
        temporary = arguments.output.with_name(arguments.output.name + ".part")
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(temporary, arguments.output)


# -- bytes and times ------------------------------------------------------------------------------------------------


def _bytes_and_times(
    networks: dict[str, nn.Module], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    clock = Clock(device)
    rows: dict[str, Any] = {}
    for dtype_name, dtype in DTYPES.items():
        steps = {name: _step(network, images, dtype) for name, network in networks.items()}
        seconds = time_in_turns(steps, arguments.rounds, clock, warm_up=1)
        for name, network in networks.items():
            row = {"bytes": _kept(network, images, dtype), "seconds": spread(seconds[name])[0]}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                steps[name]()
                row["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
            rows[f"{name}, {dtype_name}"] = row
    options = {name: getattr(arguments, name) for name in ("batch", "rounds", "threads", "device")}
    return {"clock": str(clock), "options": options, "rows": rows}


def _step(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        network.zero_grad(set_to_none=True)
        _loss(network, images, dtype).backward()

    return step


def _loss(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    with autocast(images.device, dtype):
        logits = network(images).float()
    return F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1])


def _kept(network: nn.Module, images: Tensor, dtype: torch.dtype) -> int:
    with autocast(images.device, dtype), count_saved_bytes(network) as saved:
        network(images)
    return saved.total


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows, options = results["rows"], results["options"]
    peak = "peak_memory_mb" in rows["plain, float32"]
    columns = ["kept for backward, MB", *(f"of plain {dtype}" for dtype in DTYPES)]
    columns += ["step, s", "of plain in its precision", *(["peak memory, MB"] if peak else [])]
    lines = [
        f"{results['machine']}; {results['backbone']}, batch {options['batch']}, {results['size']} px, "
        f"{options['threads']} CPU thread(s), {results['clock']}, median of {options['rounds']} steps in alternation",
        "",
        "| training | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, row in rows.items():
        cells = [f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{row['bytes'] / rows[f'plain, {dtype}']['bytes']:.3f}" for dtype in DTYPES]
        plain = rows[f"plain, {name.rpartition(', ')[2]}"]
        cells += [f"{row['seconds']:.3f}", f"{row['seconds'] / plain['seconds']:.2f}"]
        cells += [f"{row['peak_memory_mb']:.0f}"] if peak else []
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- largest batch --------------------------------------------------------------------------------------------------


def _largest_batches(
    networks: dict[str, nn.Module], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    limit = arguments.limit_gb
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        limit = whole / 1e9 if limit is None else limit
        torch.cuda.set_per_process_memory_fraction(min(limit * 1e9 / whole, 1.0), device)
    if limit is None or limit <= 0:
        raise ValueError(f"--limit-gb {limit}: expected the memory in GB, above 0")
    found = {}
    for name, network in networks.items():
        for dtype_name, dtype in DTYPES.items():
            fits = _fits_gpu if device.type == "cuda" else _fits_by_bytes
            found[f"{name}, {dtype_name}"] = bisect(fits(network, arguments.size, dtype, device, limit * 1e9))
    how = "steps tried" if device.type == "cuda" else "computed from the bytes that 2 and 4 images keep, not tried"
    return {"limit_gb": limit, "how": how, "batches": found}


def bisect(fits: Callable[[int], bool], at_most: int = MAX_BATCH) -> int:
    """The largest number up to `at_most` that fits, 0 when 1 does not; what is above one that does not, does not."""
    low, high = 0, 1
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits_gpu(
    network: nn.Module, size: int, dtype: torch.dtype, device: torch.device, limit: float
) -> Callable[[int], bool]:
    """Whether a training step of a batch runs without running out of memory."""

    def fits(batch: int) -> bool:
        try:
            images = torch.randn(batch, 3, size, size, device=device)
            network.zero_grad(set_to_none=True)
            _loss(network, images, dtype).backward()
        except torch.OutOfMemoryError:
            return False
        finally:
            network.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    return fits


def _fits_by_bytes(
    network: nn.Module, size: int, dtype: torch.dtype, device: torch.device, limit: float
) -> Callable[[int], bool]:
    """Whether what a batch keeps, weights, their gradients and Adam's two averages stay within `limit` bytes."""
    few, many = (_kept(network, torch.randn(batch, 3, size, size), dtype) for batch in (2, 4))
    per_image = (many - few) / 2
    fixed = few - 2 * per_image + 4 * sum(p.nbytes for p in network.parameters())
    return lambda batch: fixed + batch * per_image <= limit


def largest_batch_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    batches = results["batches"]
    lines = [
        f"{results['machine']}; {results['backbone']}, {results['size']} px, largest batch within "
        f"{results['limit_gb']:.1f} GB, {results['how']}",
        "",
        "| training | images | of plain |",
        "|---|---:|---:|",
    ]
    for name, batch in batches.items():
        plain = batches[f"plain, {name.rpartition(', ')[2]}"]
        lines.append(f"| {name} | {batch} | {f'{batch / plain:.2f}' if plain else '–'} |")
    return "\n".join(lines)
