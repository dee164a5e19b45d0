"""Mesa as a Lightning callback."""

from __future__ import annotations

from statistics import median
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from backbones.machine import time_now
from efficiency import mesa
from efficiency.callback import EfficiencyCallback
from efficiency.mesa_policy import Policy
from efficiency.saved_bytes import SavedBytes, megabytes

SKIPPED_STEPS = 3  # not measured: caches, kernels and workers warm up
MEASURED_STEPS = 20
NAMES = {
    "fc": "linear layers",
    "conv": "convolutions",
    "gelu": "GELU",
    "relu": "ReLU",
    "bn": "batch norm",
    "layernorm": "layer norm",
    "softmax": "softmax",
    "matmul": "attention (products, softmax)",
    "other": "other layers",
    "functional": "code between layers",
}


class Mesa(EfficiencyCallback):
    """Keeps the activations of a training in 8 bits (arXiv 2111.11124); see `efficiency.mesa.convert`.

    Running ranges are part of the run's checkpoints; those of rank 0 where there are several processes. Some steps at
    the start are timed for the report, which on a GPU makes them a little slower.

    Args:
        policy: Settings by kind of layer, or the path of an official policy file.
        num_groups: Groups in every layer; None has the number of heads of the nearest attention.
        group_size: Channels per group where that does not divide the channels.
    """

    last = True  # hooks belong to the modules that are there in the end

    def __init__(self, policy: Policy | str | None = None, num_groups: int | None = None, group_size: int = 32) -> None:
        super().__init__()
        self.policy, self.num_groups, self.group_size = policy, num_groups, group_size
        self._compressor: mesa.Compressor | None = None
        self._saved: SavedBytes | None = None
        self._steps = 0
        self._begin = 0.0
        self._seconds: list[tuple[float, float]] = []  # of a step, and in it of Mesa

    def convert(self, module: LightningModule) -> None:
        """Attach Mesa to the network."""
        mesa.convert(module.network, self.policy, num_groups=self.num_groups, group_size=self.group_size)  # type: ignore[arg-type]
        self._compressor = mesa.find(module.network)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The running ranges."""
        return {} if self._compressor is None else self._compressor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the running ranges of a checkpoint."""
        if self._compressor is not None and state_dict:
            self._compressor.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure some steps."""
        assert self._compressor is not None
        self._compressor.timed = SKIPPED_STEPS <= self._steps < SKIPPED_STEPS + MEASURED_STEPS
        if self._compressor.timed:
            self._compressor.seconds = 0.0
            self._begin = time_now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step took, and what the largest batch kept."""
        assert self._compressor is not None
        self._steps += 1
        if self._compressor.timed:
            self._seconds.append((time_now(pl_module.device) - self._begin, self._compressor.seconds))
            self._compressor.timed = False
        saved = self._compressor.saved
        if saved is not None and (self._saved is None or saved.plain_total > self._saved.plain_total):
            self._saved = saved

    def report_rows(self) -> list[tuple[str, str | int | float]]:
        """Bytes kept for the backward pass by kind of layer, plain and with Mesa, and the time that it takes."""
        if self._saved is None:
            return []
        rows: list[tuple[str, str | int | float]] = [
            (f"{NAMES.get(kind, kind)}, kept for backward", _change(plain, self._saved.kept[kind]))
            for kind, plain in sorted(self._saved.plain.items(), key=lambda item: -item[1])
        ]
        rows.append(("all, kept for backward", _change(self._saved.plain_total, self._saved.total)))
        if self._seconds:
            steps, mesas = ([seconds[i] for seconds in self._seconds] for i in (0, 1))
            rest = median(step - part for step, part in zip(steps, mesas, strict=True))
            rows += [
                (f"training step, median of {len(steps)}", f"{median(steps) * 1e3:.1f} ms"),
                ("of it compressing and restoring", f"{median(mesas) * 1e3:.1f} ms"),
                ("step time over that of the rest", f"{median(steps) / rest - 1:+.0%}"),
            ]
        return rows


def _change(plain: int, kept: int) -> str:
    return f"{megabytes(plain)} → {megabytes(kept)} ({kept / plain:.0%})"
