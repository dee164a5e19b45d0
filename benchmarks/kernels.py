"""Every operation of `kernels` beside every alternative a user has, at the shapes of real models."""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from backbones.machine import processor_name
from benchmarks.files import write_atomically
from benchmarks.kernel_cases import OPS
from benchmarks.kernel_cases.base import BOTH, FORWARD, Candidate, Case, Draw, Function, Inputs, as_tuple
from benchmarks.kernel_tables import report
from benchmarks.timing import Clock, EventClock, time_in_turns

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Largest ‖output - truth‖ / ‖truth‖ of a right result, the truth in float64.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
MAX_REASON = 90  # characters of the reason why a candidate has no numbers
LIMIT_ROUNDS, HOST_ROUNDS = 10, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks kernels``."""
    parser.add_argument("--op", nargs="+", metavar="NAME", help=f"operations to measure, of {', '.join(OPS)}")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each candidate; their median counts")
    parser.add_argument("--batch", type=float, default=1.0, help="factor on the batches of all cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--output", type=Path, help="write the numbers to this .json file and a table to the .md beside"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the table; files are written after every operation, complete each time."""
    names = arguments.op or list(OPS)
    _check(arguments, names)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    bench = Bench(device, dtype, arguments.rounds, arguments.batch)
    results = {"machine": machine(device), "options": bench.options(), "limits": bench.limits, "ops": {}}
    with _kernels_required(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            results["ops"][name] = [bench.measure(case) for case in OPS[name]]
            if arguments.output is not None:
                write_atomically(arguments.output, json.dumps(results, indent=2) + "\n")
                write_atomically(arguments.output.with_suffix(".md"), report(results))
    print(report(results), end="")


def _check(arguments: argparse.Namespace, names: list[str]) -> None:
    for name in names:
        if name not in OPS:
            raise ValueError(f"--op {name}: expected one of {', '.join(OPS)}")
    for name in ("rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if arguments.batch <= 0:
        raise ValueError(f"--batch {arguments.batch}: expected a factor above 0")
    if arguments.output is not None and arguments.output.suffix != ".json":
        raise ValueError(f"--output {arguments.output}: expected a file that ends in .json")


class Bench:
    """Measures cases on one device in one dtype; `limits` are what a copy and a matrix product reach there."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int, batch: float) -> None:
        self.device, self.dtype, self.rounds, self.batch = device, dtype, rounds, batch
        self.clock = EventClock(device) if device.type == "cuda" else Clock(device)
        self.on_cpu = device.type != "cuda"
        self.limits = self._limits()

    def options(self) -> dict[str, Any]:
        """What was asked for, as it is written down."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."), "rounds": self.rounds, "batch_factor": self.batch,
            "device": str(self.device), "clock": str(self.clock), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def measure(self, case: Case) -> dict[str, Any]:
        """Check and time every candidate of a case; what cannot be measured has a reason instead of numbers."""
        batch = 1 if self.on_cpu else max(1, round(case.batch * self.batch))
        found: dict[str, Any] = {"case": case.name, "batch": batch}
        if self.on_cpu and case.large:
            return found | {"left_out": "too large for a CPU"}
        torch.compiler.reset()  # a new case must not count as one more shape of the last
        try:
            resized = replace(case, batch=batch)
            generator = torch.Generator(self.device).manual_seed(0)
            inputs = resized.inputs(Draw(self.device, self.dtype, generator))
            found["passes"] = {what: self._measure_pass(resized, what, inputs) for what in case.passes}
        except Exception as error:  # an operation that fails does not end the run
            found["left_out"] = reason(error)
        self._collect()
        return found

    def _measure_pass(self, case: Case, what: str, inputs: Inputs) -> dict[str, Any]:
        print(f"{case.op}: {case.name}, {what}", file=sys.stderr, flush=True)
        truth, upstream = self._truth(case, what, inputs)
        if what == FORWARD:  # some refuse what they could not differentiate
            inputs = {name: tensor.detach() for name, tensor in inputs.items()}
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, candidate in case.candidates().items():
            if self.on_cpu and not candidate.on_cpu:
                continue
            if what == BOTH:
                call = partial(differentiate, candidate.run, inputs, upstream)
            else:
                call = partial(evaluate, candidate.run, inputs)
            rows[name] = self._checked(candidate, call, truth)
            if not rows[name].keys() & {"failed", "wrong"}:
                calls[name] = call
        least = self._least(case, what, inputs, truth)
        for name, seconds in time_in_turns(calls, self.rounds, self.clock).items():
            rows[name] |= summary(seconds) | {"fraction": least["least_seconds"] / median(seconds)}
            if not self.on_cpu:
                rows[name] |= self._cost(calls[name])
        return {**least, "candidates": rows}

    def _truth(self, case: Case, what: str, inputs: Inputs) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Numbers of the reference in float64 or, where memory is short, float32; random gradients of its outputs."""
        for dtype in (torch.float64, torch.float32):
            try:
                read = {name: tensor for name, tensor in inputs.items() if name not in case.yardstick_inputs}
                wide = {name: _widened(tensor, dtype) for name, tensor in read.items()}
                numbers = evaluate(case.reference, wide)
                if what == FORWARD:
                    return numbers, ()
                generator = torch.Generator(self.device).manual_seed(1)
                upstream = tuple(
                    torch.randn(output.shape, generator=generator, device=self.device).to(self.dtype)
                    for output in numbers.values()
                )
                return differentiate(case.reference, wide, tuple(tensor.to(dtype) for tensor in upstream)), upstream
            except torch.OutOfMemoryError:
                self._collect()
        raise torch.OutOfMemoryError

    def _checked(
        self, candidate: Candidate, call: Callable[[], dict[str, Tensor]], truth: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The largest relative error of a candidate, or why it is not measured."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = call()
                    if not self.on_cpu:
                        torch.cuda.synchronize(self.device)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise RuntimeError(refusal(error, [str(warning.message) for warning in caught])) from None
        except Exception as error:  # whatever it raises is its result
            self._collect()
            return {"failed": reason(error)}
        if not candidate.comparable:
            return {}
        worst = 0.0
        for name, expected in truth.items():
            distance = relative_error(found[name], expected) if name in found else float("inf")
            if not distance <= TOLERANCES[self.dtype]:
                return {"wrong": f"{name}: relative error {distance:.2g}"}
            worst = max(worst, distance)
        return {"error": worst}

    def _least(self, case: Case, what: str, inputs: Inputs, truth: Mapping[str, Tensor]) -> dict[str, Any]:
        """Bytes that a pass must move, operations of its matrix products, and the seconds that these take at least."""
        read = [tensor for name, tensor in inputs.items() if name not in case.yardstick_inputs]
        outputs = [tensor for name, tensor in truth.items() if name.startswith("output")]
        written = sum(
            tensor.numel() * (self.dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
            for tensor in outputs
        )
        moved = sum(tensor.nbytes for tensor in read) + written
        if what == BOTH:  # inputs and gradients of outputs are read, gradients of inputs written
            moved += moved + sum(tensor.nbytes for tensor in read if tensor.requires_grad)
        flops = case.flops(what)
        seconds = max(moved / self.limits["bytes_per_second"], flops / self.limits["flops_per_second"])
        return {"bytes": moved, "flops": flops, "least_seconds": seconds}

    def _cost(self, call: Callable[[], object]) -> dict[str, float]:
        """Memory that a call takes beside its inputs, in bytes, and how long the processor launches it, in seconds."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        launch = []
        for _ in range(HOST_ROUNDS):
            begin = time.perf_counter()
            call()
            launch.append(time.perf_counter() - begin)
            torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return {"peak_bytes": peak, "launch_seconds": median(launch)}

    def _limits(self) -> dict[str, float]:
        """Bytes per second of a copy, read and written, and operations per second of a matrix product."""
        numbers, side = (2**22, 512) if self.on_cpu else (2**29, 8192)
        source = torch.randn(numbers, device=self.device)
        destination = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        seconds = time_in_turns(
            {"copy": lambda: destination.copy_(source), "product": lambda: a @ b}, LIMIT_ROUNDS, self.clock
        )
        return {
            "bytes_per_second": 2 * source.nbytes / median(seconds["copy"]),
            "flops_per_second": 2 * side**3 / median(seconds["product"]),
        }

    def _collect(self) -> None:
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()


def evaluate(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Call `function` without a graph: {"output 0": ...}."""
    with torch.no_grad():
        return _numbered(as_tuple(function(inputs)))


def differentiate(function: Function, inputs: Inputs, upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Call `function` and backward, given gradients of its outputs: {"output 0": ..., "gradient of q": ...}."""
    outputs = as_tuple(function(inputs))
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    named = {f"gradient of {name}": tensor for name, tensor in zip(leaves, gradients, strict=True)}
    return _numbered(outputs) | {name: tensor for name, tensor in named.items() if tensor is not None}


def _numbered(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"output {number}": output.detach() for number, output in enumerate(outputs)}


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Distance of `found` from `expected` over the length of `expected`; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    distance = torch.linalg.vector_norm(found.double() - expected)
    return float(distance / torch.linalg.vector_norm(expected).clamp(min=torch.finfo(torch.float64).tiny))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and quartiles of some times."""
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"seconds": median(seconds), "fastest": min(seconds), "quartile_1": low, "quartile_3": high}


def reason(error: Exception) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1 if len(lines) > 1 and lines[0].endswith(":") else 0] if lines else type(error).__name__
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def refusal(error: RuntimeError, messages: list[str]) -> str:
    """What PyTorch's attention warned of before it found no kernel to run; else what was raised."""
    said = [message.partition(" (Triggered internally")[0] for message in messages]
    said = [message for message in said if "not used because" not in message and "runtime disabled" not in message]
    return said[0] if said and str(error).startswith(("No available kernel", "No viable backend")) else str(error)


@contextlib.contextmanager
def _kernels_required(device: torch.device) -> Iterator[None]:
    """Let our operations take their kernels on a GPU or fail, and never time the interpreter on a CPU."""
    before = os.environ.get("FRUGAL_KERNELS")
    os.environ["FRUGAL_KERNELS"] = "triton" if device.type == "cuda" else "reference"
    try:
        yield
    finally:
        del os.environ["FRUGAL_KERNELS"]
        if before is not None:
            os.environ["FRUGAL_KERNELS"] = before


def machine(device: torch.device) -> dict[str, str]:
    """Device, driver, clocks and versions."""
    versions = {"torch": torch.__version__, "triton": "none"}
    with contextlib.suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    if device.type != "cuda":
        return {"device": processor_name(), **versions}
    return {
        "device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), **versions,
        "cudnn": str(torch.backends.cudnn.version()), **_driver(device),
    }  # fmt: skip


def _driver(device: torch.device) -> dict[str, str]:
    """Driver and clocks as nvidia-smi tells them; nothing without it."""
    fields = {"driver": "driver_version", "sm_clock": "clocks.sm", "max_sm_clock": "clocks.max.sm",
              "memory_clock": "clocks.mem"}  # fmt: skip
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader", f"--id={index}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=False))
