"""The machine that a measurement runs on: the name of its processor, and time."""

import platform
import time
from pathlib import Path

import torch


def processor_name() -> str:
    """The CPU's name as Linux knows it, else what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def time_now(device: torch.device) -> float:
    """Seconds of wall time once `device` has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
