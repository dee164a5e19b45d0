"""Times of several candidates in alternation, so that a busy machine slows all of them alike."""

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from backbones.machine import time_now


class Clock:
    """Seconds that the work of one process takes on `device`.

    On one CPU thread it is the processor time of the process, which other processes on the machine disturb least;
    else it is wall time, on a GPU once the device has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts_processor_time = device.type == "cpu" and torch.get_num_threads() == 1

    def __call__(self) -> float:
        """The time now."""
        if self.counts_processor_time:
            return time.process_time()
        return time_now(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """How long `run` takes."""
        begin = self()
        run()
        return self() - begin

    def __str__(self) -> str:
        """What is measured."""
        return "processor time" if self.counts_processor_time else "wall time"


class EventClock(Clock):
    """Seconds that a CUDA device works, by its events: not the time that launching takes.

    Before each call, zeros are written over the L2 cache again and again, which takes about a millisecond; meanwhile
    the work to be timed is queued.
    """

    WRITES = 16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._overwritten = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        """How long the device works on what `run` launches."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.WRITES):
            self._overwritten.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def __str__(self) -> str:
        """What is measured."""
        return "time of the device between CUDA events, its L2 cache overwritten before every call"


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each of `rounds` calls of every candidate, after `warm_up` calls; progress goes to stderr."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warm_up, rounds):
        for name, run in candidates.items():
            _progress(f"round {turn + 1} of {rounds}: {name}" if turn >= 0 else f"warming up: {name}")
            taken = clock.seconds(run)
            if turn >= 0:
                seconds[name].append(taken)
    _progress("")
    return seconds


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return median(seconds), min(seconds), max(seconds)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
