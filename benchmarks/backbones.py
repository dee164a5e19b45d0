"""Images per second of LITv2-S beside the same network composed plainly and beside its peers of timm."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.machine import processor_name
from benchmarks.files import write_atomically
from benchmarks.plain import make_plain
from benchmarks.timing import Clock, spread, time_in_turns

OURS = "litv2_s"
PLAIN = "litv2_s, plain composition"
PEERS = ("pvt_v2_b2", "swin_tiny_patch4_window7_224", "twins_svt_small", "deit_small_patch16_224")
BASELINE = "pvt_v2_b2"
PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks backbones``."""
    parser.add_argument("--batch", type=int, default=8, help="images per pass")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each network; their median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="autocast to it unless float32")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table; higher is better, ratios are to PVTv2-B2 in the same pass."""
    for name in ("batch", "size", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = Clock(device)
    networks = {name: _create(name, arguments.size).to(device) for name in (OURS, *PEERS)}
    networks[PLAIN] = make_plain(_create(OURS, arguments.size)).to(device)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
    results: dict[str, Any] = {"machine": machine(device), "clock": str(clock), "options": _plain(arguments)}
    for what in PASSES:
        step = _forward if what == "forward" else _training
        candidates = {
            name: _candidate(step, network.train(what != "forward"), images, DTYPES[arguments.dtype])
            for name, network in networks.items()
        }
        seconds = time_in_turns(candidates, arguments.rounds, clock)
        results[what] = {name: _row(times, arguments.batch, seconds[BASELINE]) for name, times in seconds.items()}
        if device.type == "cuda":
            for name, candidate in candidates.items():
                results[what][name]["peak_memory_mb"] = _peak_memory(candidate, device)
    print(table(results))
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(results, indent=2) + "\n")


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    options = results["options"]
    memory = ["MB"] if "peak_memory_mb" in results[PASSES[0]][OURS] else []
    columns = [text for what in PASSES for text in (f"{what} img/s", "min–max", "ratio", *memory)]
    lines = [
        f"{results['machine']}; {options['dtype']}, batch {options['batch']}, {options['size']} px, "
        f"{options['threads']} CPU thread(s), {results['clock']}, median of {options['rounds']} passes in alternation; "
        f"ratio to {BASELINE}",
        "",
        "| network | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in (OURS, PLAIN, *PEERS):
        cells = []
        for what in PASSES:
            row = results[what][name]
            cells += [f"{row['images_per_second']:.2f}", f"{row['slowest']:.2f}–{row['fastest']:.2f}"]
            cells.append(f"{row['ratio']:.2f}")
            cells += [f"{row['peak_memory_mb']:.0f}"] if memory else []
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Device, processor and versions, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{name}, torch {torch.__version__}, timm {timm.__version__}"


def _create(name: str, size: int) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    return backbones.create(name, **({"img_size": size} if fixed else {}))


def _candidate(
    step: Callable[[nn.Module, Tensor], None], network: nn.Module, images: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            step(network, images)

    return call


@torch.inference_mode()
def _forward(network: nn.Module, images: Tensor) -> None:
    network(images)


def _training(network: nn.Module, images: Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(images).float().sum().backward()


def _row(seconds: list[float], batch: int, baseline: list[float]) -> dict[str, float]:
    median, shortest, longest = spread(seconds)
    return {
        "images_per_second": batch / median,
        "slowest": batch / longest,
        "fastest": batch / shortest,
        "ratio": spread(baseline)[0] / median,
    }


def _peak_memory(candidate: Callable[[], None], device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    candidate()
    return torch.cuda.max_memory_allocated(device) / 1e6


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("batch", "size", "rounds", "threads", "dtype", "device")}
