"""Time and memory of an EcoFormer attention layer beside one of softmax attention (SDPA), by the number of tokens."""

import argparse
import json
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backbones.ecoformer import EcoFormerAttention
from benchmarks.backbones import machine
from benchmarks.timing import Clock, spread, time_in_turns

TOKENS = (784, 1568, 3136, 6272, 12544)
OURS, PEER = "EcoFormer", "softmax (SDPA)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks ecoformer``."""
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens")
    parser.add_argument("--heads", type=int, nargs="+", default=(1, 2), help="numbers of heads")
    parser.add_argument("--dim", type=int, default=64, help="width of a token")
    parser.add_argument("--batch", type=int, default=1, help="sequences per pass")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each layer; their median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Measure forward passes with 16 bits and 25 anchors, print a table and how the costs grow."""
    for name in ("dim", "batch", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if len(set(arguments.tokens)) < 2 or min(arguments.tokens) < 1:
        raise ValueError(f"--tokens {' '.join(map(str, arguments.tokens))}: expected two or more positive numbers")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = Clock(device)
    results: dict[str, Any] = {"machine": machine(device), "clock": str(clock), "rounds": arguments.rounds}
    results |= {"threads": arguments.threads, "batch": arguments.batch, "dim": arguments.dim, "heads": {}}
    for heads in arguments.heads:
        rows = [_measure(arguments, heads, tokens, clock) for tokens in sorted(set(arguments.tokens))]
        results["heads"][heads] = {"rows": rows, "growth": _growth(rows)}
    print(table(results))
    if arguments.output is not None:
        temporary = arguments.output.with_name(arguments.output.name + ".part")
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(temporary, arguments.output)


def _measure(arguments: argparse.Namespace, heads: int, tokens: int, clock: Clock) -> dict[str, Any]:
    """Median milliseconds and peak bytes of both layers, their projections included."""
    layers: dict[str, nn.Module] = {
        OURS: EcoFormerAttention(arguments.dim, heads),
        PEER: timm.layers.Attention(arguments.dim, heads, qkv_bias=True),
    }
    x = torch.randn(arguments.batch, tokens, arguments.dim, device=clock.device)
    candidates = {name: _forward(layer.to(clock.device).eval(), x) for name, layer in layers.items()}
    seconds = time_in_turns(candidates, arguments.rounds, clock)
    times = {name: 1e3 * spread(values)[0] for name, values in seconds.items()}
    memory = {name: peak_bytes(candidate) for name, candidate in candidates.items()}
    return {"tokens": tokens, "ms": times, "bytes": memory, "ratio": times[PEER] / times[OURS]}


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            return layer(x)

    return call


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes of the tensors made in `run` that are alive at once, at most; memory inside an operation does not count."""
    with _LiveBytes() as live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the storages of what operations return, until the last tensor of each is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._tensors: Counter[int] = Counter()  # alive, by the address of their storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what is new."""
        known = {_address(tensor) for tensor in torch.utils._pytree.tree_leaves(args) if isinstance(tensor, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            address = _address(tensor)
            if address in known and address not in self._tensors:
                continue  # a view of what was there before
            size = tensor.untyped_storage().nbytes()
            if not self._tensors[address]:
                self.now += size
                self.peak = max(self.peak, self.now)
            self._tensors[address] += 1
            weakref.finalize(tensor, self._gone, address, size)
        return output

    def _gone(self, address: int, size: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            del self._tensors[address]
            self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of time and memory of both layers: R² of the straight line in the tokens, and the exponent of the power law."""
    tokens = [row["tokens"] for row in rows]
    return {
        what: {
            name: {
                "r_squared": _fit_line(tokens, [row[what][name] for row in rows])[1],
                "exponent": _fit_line(
                    [math.log(count) for count in tokens], [math.log(row[what][name]) for row in rows]
                )[0],
            }
            for name in (OURS, PEER)
        }
        for what in ("ms", "bytes")
    }


def _fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and R² of the straight line through the points by least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread_x, spread_y = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return covariance / spread_x, covariance**2 / (spread_x * spread_y)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['machine']}; float32 inference, batch {results['batch']}, width {results['dim']}, projections "
        f"included, {results['threads']} CPU thread(s), {results['clock']}, median of {results['rounds']} passes in "
        "alternation",
        "",
        f"| heads | tokens | {PEER} ms | {OURS} ms | times faster | {PEER} MB | {OURS} MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for heads, measured in results["heads"].items():
        for row in measured["rows"]:
            ms, size = row["ms"], row["bytes"]
            lines.append(
                f"| {heads} | {row['tokens']} | {ms[PEER]:.2f} | {ms[OURS]:.2f} | {row['ratio']:.1f} | "
                f"{size[PEER] / 1e6:.2f} | {size[OURS] / 1e6:.2f} |"
            )
    lines.append("")
    for heads, measured in results["heads"].items():
        for what, noun in (("ms", "time"), ("bytes", "memory")):
            for name, growth in measured["growth"][what].items():
                lines.append(
                    f"{heads} head(s), {noun} of {name}: line in the tokens with R² {growth['r_squared']:.4f}, "
                    f"power law with exponent {growth['exponent']:.2f}"
                )
    return "\n".join(lines)
