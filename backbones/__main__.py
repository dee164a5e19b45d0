"""``python -m backbones {list,profile,convert}``: the networks registered here, what they cost, their released weights.

python -m backbones list 'lit*'
python -m backbones profile litv2_s --size 224 --batch 8
python -m backbones convert litv2_s.pth --to litv2_s.safetensors
"""

import argparse
import difflib
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.checkpoint import CheckpointError
from backbones.convert import convert
from backbones.features import create
from backbones.profiling import NetworkCost, profile
from backbones.published import PUBLISHED
from backbones.video_features import VIDEO_BACKBONES


class CommandError(Exception):
    """What the user asked for cannot be done: one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 and one line on stderr when it cannot do what was asked."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (CommandError, CheckpointError, ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"python -m backbones: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m backbones", description="Networks: list, measure, convert weights."
    )
    commands = parser.add_subparsers(required=True, metavar="{list,profile,convert}")

    listing = commands.add_parser("list", help="the networks registered here and what is published about them")
    listing.add_argument("pattern", nargs="?", default="*", help="names, e.g. 'litv2*' (all)")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)

    measuring = commands.add_parser("profile", help="parameters, multiply-adds, speed and memory of any timm model")
    measuring.add_argument("name", help="a model of timm or of `list`")
    measuring.add_argument(
        "--size", type=_size, help="224, height x width as 224x320, or 64x224x320 for 64 frames (the model's own)"
    )
    measuring.add_argument("--batch", type=_positive, default=8, help="images per pass (8)")
    measuring.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")
    measuring.add_argument("--train", action="store_true", help="time forward and backward passes in training mode")
    measuring.add_argument("--json", action="store_true", help="print JSON")
    measuring.set_defaults(run=_profile)

    converting = commands.add_parser("convert", help="write a released weight file under our names")
    converting.add_argument("source", type=Path, help="a weight file of any release (.pth, .pkl, .safetensors)")
    converting.add_argument("--to", type=Path, required=True, help="the file to write (.safetensors or .pth)")
    converting.add_argument("--model", help="the network it belongs to (found by its tensors)")
    converting.add_argument("--force", action="store_true", help="replace the file --to")
    converting.set_defaults(run=_convert)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, ...]:
    sides = text.lower().split("x")
    if len(sides) > 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected pixels as 224, or height x width as 224x320, of clips 64x224x320"
        )
    return tuple(int(side) for side in sides) if len(sides) > 1 else (int(text), int(text))


# -- list -------------------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    found = [facts for name, facts in PUBLISHED.items() if fnmatch.fnmatch(name, options.pattern)]
    if not found:
        nearest = difflib.get_close_matches(options.pattern.strip("*"), PUBLISHED, n=4, cutoff=0.4)
        hint = f"; nearest names: {', '.join(nearest)}" if nearest else f"; there are: {', '.join(PUBLISHED)}"
        raise CommandError(f"no network matches {options.pattern!r}{hint}")
    if options.json:
        print(json.dumps([asdict(facts) for facts in found], indent=2))
        return
    rows = [
        (f.name, f"{f.params / 1e6:.2f}", f"{f.gmacs:.3f}", f"{f.size}", _percent(f.top1), ", ".join(f.layouts))
        for f in found
    ]
    _print_table(("name", "M params", "GMACs", "px", "top-1 %", "released weights read"), rows, text=(0, 5))
    print("\nGMACs (10⁹ multiply-adds of one image) and top-1 (ImageNet-1k) as the authors publish them.")


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{accuracy:.2f}"


# -- profile ----------------------------------------------------------------------------------------------------------


def _profile(options: argparse.Namespace) -> None:
    device = _device(options.device)
    model, size = _model_for(options.name, options.size)
    images = torch.randn(options.batch, 3, *size)
    cost = profile(model.to(device).eval(), images.to(device), options.train, _Progress())
    setting = {
        "model": options.name,
        "size": list(size),
        "batch": options.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pass": "forward and backward" if options.train else "forward",
    }
    if options.json:
        print(json.dumps({**setting, **asdict(cost)}, indent=2))
    else:
        _print_cost(setting, cost)


def _print_cost(setting: dict[str, Any], cost: NetworkCost) -> None:
    what, each = ("images", "image") if len(setting["size"]) == 2 else ("clips", "clip")
    where = setting["device"] + (f", {setting['threads']} threads" if setting["device"] == "cpu" else "")
    memory = "not measured" if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:.0f} MB"
    print(f"{setting['model']}, {setting['batch']} {what} of {' x '.join(map(str, setting['size']))}, {where}")
    print(f"  parameters     {cost.params:,}")
    print(f"  multiply-adds  {cost.macs / 1e9:.3f} G per {each}")
    print(f"  speed          {cost.images_per_second:.1f} {what}/s ({setting['pass']}, median of {cost.passes})")
    print(f"  peak memory    {memory} ({cost.peak_memory_kind})\n")
    rows = [
        (s.name, f"{s.params / 1e6:.3f}", f"{s.macs / 1e9:.3f}", f"{s.time_ms:.2f}", " x ".join(map(str, s.output)))
        for s in cost.stages
    ]
    _print_table(("stage", "M params", "GMACs", "ms", "output"), rows, text=(0, 4))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    return device


def _model_for(name: str, size: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    """The model made for images or clips of that size where it takes one, and the size (its own where None)."""
    if name in VIDEO_BACKBONES:
        model: Any = create(name)
        size = size or model.pretrained_cfg["input_size"][1:]
        return model, (model.num_frames, *size) if len(size) == 2 else tuple(size)
    if size is None:
        model = create(name)
        return model, tuple(model.pretrained_cfg["input_size"][1:])
    if len(size) == 3:
        raise CommandError(f"--size {'x'.join(map(str, size))}: {name} takes images, height x width")
    try:
        return create(name, img_size=size), size
    except TypeError:  # a model without such an option
        return create(name), size


class _Progress:
    """Says on stderr what is being done, once it takes longer than two seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.last > 2:
            print(f"{text} ...", file=sys.stderr, flush=True)
            self.last = time.monotonic()


# -- convert ----------------------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> None:
    if options.to.exists() and not options.force:
        raise CommandError(f"{options.to} exists; --force replaces it")
    if options.model is None:
        print("comparing with every network ...", file=sys.stderr, flush=True)
    print(convert(options.source, options.to, options.model))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> None:
    """Print aligned columns: the columns `text` to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
