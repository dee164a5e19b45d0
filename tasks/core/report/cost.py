"""What a network costs, and the machine and versions it ran on."""

from __future__ import annotations

import platform
import statistics
from importlib import metadata

import torch
from torch import Tensor, nn

from backbones.machine import processor_name, time_now
from backbones.macs import COUNTED, count_macs, evaluating
from backbones.profiling import peak_memory
from tasks.core.report.document import Cost

TIMED_PASSES = 3
PACKAGES = (
    "frugal-vision",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "timm",
    "triton",
    "albumentations",
    "numpy",
)
MACS_KIND = f"one example; {COUNTED}"


def measure_cost(network: nn.Module, example_input: Tensor, step_time_ms: float | None = None) -> Cost:
    """Parameters, multiply-adds, step time and peak memory of `network` in evaluation mode.

    Args:
        network: Its modules are left in the mode they were in.
        example_input: One input on the network's device, (1, ...).
        step_time_ms: Training step time measured before; None times `TIMED_PASSES` forward passes here (median).

    Returns:
        `params` (trainable and frozen, no buffers), `macs` (of one example), `step_time_ms`,
        `peak_memory_mb`, and what these mean: `macs_kind`, `step_time_kind`, `peak_memory_kind`.
    """
    memory, memory_kind = peak_memory(example_input.device)  # before the passes below add theirs
    macs = count_macs(network, example_input)
    kind = "training step with data loading, median"
    if step_time_ms is None:
        with evaluating(network), torch.inference_mode(False), torch.no_grad():
            step_time_ms = statistics.median(_forward_ms(network, example_input) for _ in range(TIMED_PASSES))
        size = "×".join(str(length) for length in example_input.shape)
        kind = f"forward pass of one example ({size}), median of {TIMED_PASSES}"
    return {
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs,
        "macs_kind": MACS_KIND,
        "step_time_ms": step_time_ms,
        "step_time_kind": kind,
        "peak_memory_mb": memory,
        "peak_memory_kind": memory_kind,
    }


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions, operating system and device. Neither host names nor paths."""
    device = torch.device(device)
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # optional, or run from a checkout
            continue
    found["torch"] = torch.__version__  # with its CUDA build
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"{device.type.upper()}, {processor_name()}, {torch.get_num_threads()} threads"
    return found


def _forward_ms(network: nn.Module, example_input: Tensor) -> float:
    start = time_now(example_input.device)
    network(example_input)
    return (time_now(example_input.device) - start) * 1e3
