"""Readings of several functions that take turns in one process, on the CPU or with CUDA events."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

READING = 0.02  # seconds: shorter calls are repeated until a reading lasts this long
SLOW = 1.0  # seconds per call from which a peer gets fewer rounds
VERY_SLOW = 5.0  # seconds per call from which everything does
SLOW_ROUNDS = 3


class OutOfTime(Exception):
    """The time that `--minutes` allows does not suffice."""


@dataclass
class Deadline:
    """The moment after which nothing new is begun; `at` None is never."""

    at: float | None = None

    @staticmethod
    def after(minutes: float | None) -> Deadline:
        return Deadline(None if minutes is None else time.monotonic() + 60 * minutes)

    @property
    def left(self) -> float:
        """Seconds left."""
        return math.inf if self.at is None else self.at - time.monotonic()

    def check(self) -> None:
        """Raise OutOfTime where the moment has passed."""
        if self.left <= 0:
            raise OutOfTime("the time given by --minutes was over")


@dataclass
class Reading:
    """Seconds per call, one number per round, each the mean of `calls` calls."""

    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


@dataclass(frozen=True)
class Failure:
    """Why a method has no number."""

    reason: str


def attempt(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or a Failure: somebody else's attention may fail in any way, and the rest goes on."""
    try:
        return work()
    except (OutOfTime, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - the reason is printed and recorded
        lines = str(error).strip().splitlines()
        return Failure(f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}")


class Compiled(NamedTuple):
    """Kernels that torch.compile has made in this process, and the seconds it took."""

    kernels: int = 0
    seconds: float = 0.0

    def since(self, before: Compiled) -> Compiled:
        return Compiled(self.kernels - before.kernels, self.seconds - before.seconds)

    def __str__(self) -> str:
        return f"{self.kernels} kernels compiled in {self.seconds:.0f} s"


def compiled() -> Compiled:
    """Return what has been compiled so far; asking does not load the compiler."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return Compiled()
    seconds = getattr(utils, "compilation_time_metrics", {}).get("_compile.compile_inner", ())
    return Compiled(utils.counters["stats"]["unique_graphs"], sum(seconds))


class Clock:
    """Measures calls on one device. On CUDA the L2 cache is overwritten before every call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
            self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        """Return the mean seconds of `calls` calls."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - started) / calls
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in marks:
            self.flush.zero_()
            start.record()
            function()
            stop.record()
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(stop) for start, stop in marks) / calls / 1e3


def interleaved(
    work: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    deadline: Deadline,
    *,
    full: set[str] | None = None,
) -> dict[str, Reading | Failure]:
    """Return a Reading per function, `repeats` rounds in which all take turns.

    Each function is first called twice without being counted: plans are built and kernels compiled in the first call,
    the second tells how long one takes. Functions that take more than VERY_SLOW seconds a call, and those outside
    `full` (None: all are in it) that take more than SLOW, get SLOW_ROUNDS rounds. Where the deadline comes too soon for
    `repeats` rounds there are fewer, at least SLOW_ROUNDS.

    Raises:
        OutOfTime: not even that fits.
    """
    clock = Clock(device)
    found: dict[str, Reading | Failure] = {}
    each: dict[str, float] = {}
    for name, function in work.items():
        deadline.check()

        def warm(function: Callable[[], object] = function) -> float:
            clock.seconds(function, 1)
            return clock.seconds(function, 1)

        seconds = attempt(warm)
        if isinstance(seconds, Failure):
            found[name] = seconds
            continue
        each[name] = seconds
        found[name] = Reading(calls=min(1000, max(1, math.ceil(READING / max(seconds, 1e-7)))))
    rounds = {}
    for name, seconds in each.items():
        slow = seconds > VERY_SLOW or (seconds > SLOW and full is not None and name not in full)
        rounds[name] = min(repeats, SLOW_ROUNDS) if slow else repeats
    one = sum(max(seconds, READING) for seconds in each.values())
    fit = repeats if math.isinf(deadline.left) else int(deadline.left / max(one, 1e-9))
    if fit < min(repeats, SLOW_ROUNDS):
        raise OutOfTime(
            f"needs about {one * min(repeats, SLOW_ROUNDS):.0f} s, {max(deadline.left, 0):.0f} s were left"
        )
    for turn in range(min(repeats, fit)):
        for name in each:
            reading = found[name]
            if turn >= rounds[name] or not isinstance(reading, Reading):
                continue
            seconds = attempt(partial(clock.seconds, work[name], reading.calls))
            if isinstance(seconds, Failure):
                found[name] = seconds
            else:
                reading.seconds.append(seconds)
    return found
