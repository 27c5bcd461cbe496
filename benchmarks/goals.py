"""What each pattern is meant to reach: ratios to dense attention of the same run."""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """Ratios to dense attention: as scaled_dot_product_attention chooses, and its best backend."""

    default: float
    best: float | None = None


K = 1024
_CPU_LENGTHS = (4 * K, 8 * K, 16 * K, 32 * K)
_CUDA_LENGTHS = (4 * K, 16 * K, 64 * K, 128 * K)


def _cpu(*ratios: float) -> dict[int, Goal]:
    return {n: Goal(ratio) for n, ratio in zip(_CPU_LENGTHS, ratios, strict=True)}


def _cuda(*pairs: tuple[float, float]) -> dict[int, Goal]:
    return {n: Goal(*pair) for n, pair in zip(_CUDA_LENGTHS, pairs, strict=True)}


def _scaled(goals: dict[int, Goal], factor: float) -> dict[int, Goal]:
    scaled = {}
    for n, (default, best) in goals.items():
        scaled[n] = Goal(round(default * factor, 2), None if best is None else round(best * factor, 2))
    return scaled


_CPU_FORWARD = {
    "window-512": _cpu(3.0, 6.0, 13.5, 27),
    "window-128": _cpu(8, 16, 32, 64),
    "streaming-4+508": _cpu(2.8, 5.6, 11, 22),
    "longformer-512+64": _cpu(2.6, 5.2, 10, 20),
    "sparse-strided-128": _cpu(8, 14, 18, 32),
    "sparse-fixed-128/8": _cpu(6, 8, 11.5, 11.5),  # its limit is block / summary
    "bigbird-64": _cpu(2.0, 4.2, 8, 16),
    "dilated-512x4": {16 * K: Goal(10), 32 * K: Goal(20)},
}
_CPU_BACKWARD = {
    "window-512": _cpu(3.0, 6.0, 12.5, 25),
    "streaming-4+508": {16 * K: Goal(10), 32 * K: Goal(20)},
    "longformer-512+64": {16 * K: Goal(9), 32 * K: Goal(18)},
    "sparse-strided-128": {16 * K: Goal(13), 32 * K: Goal(23)},
    "sparse-fixed-128/8": {16 * K: Goal(9), 32 * K: Goal(9)},
    "bigbird-64": {16 * K: Goal(6), 32 * K: Goal(12)},
    "dilated-512x4": {16 * K: Goal(8), 32 * K: Goal(16)},
}
_CUDA_FORWARD = {
    "window-512": _cuda((3.2, 2.0), (13, 8.5), (52, 36), (105, 72)),
    "window-1024": _cuda((2.0, 1.3), (7.4, 4.9), (29, 20), (57, 40)),
    "block-128+3": _cuda((3.9, 2.5), (16, 11), (62, 46), (125, 92)),
    "streaming-4+1020": _cuda((1.8, 1.2), (6.7, 4.4), (26, 18), (52, 36)),
    "longformer-512+64": _cuda((2.8, 1.8), (10.5, 7), (42, 30), (84, 60)),
    "bigbird-64": _cuda((3.0, 1.9), (11, 7), (45, 29), (90, 58)),
    "sparse-strided-128": _cuda((7, 4), (24, 14), (55, 35), (70, 45)),
    "sparse-fixed-128/8": _cuda((7, 4.5), (11, 7), (13, 8.5), (13.5, 9)),
}
_WINDOW_BACKWARD = _cuda((2.6, 1.6), (10, 6.5), (42, 26), (85, 52))
_CUDA_BACKWARD = {
    "window-512": _WINDOW_BACKWARD,
    "streaming-4+1020": _cuda((1.5, 1.0), (5.2, 3.3), (21, 13), (42, 26)),
    "longformer-512+64": _scaled(_WINDOW_BACKWARD, 0.85),
    "bigbird-64": _scaled(_WINDOW_BACKWARD, 0.85),
    "sparse-strided-128": _scaled(_CUDA_FORWARD["sparse-strided-128"], 0.6),
}
# One query over a cache. On CUDA at batch 1 the floor is the launch of a kernel, so both sides run as CUDA graphs.
_CPU_DECODE = {4 * K: Goal(3.6), 8 * K: Goal(7.5), 16 * K: Goal(15), 32 * K: Goal(25)}
_CUDA_DECODE = {16 * K: Goal(4.7, 4.7), 64 * K: Goal(19, 19), 128 * K: Goal(37, 37)}
_DECODED = ("window-1024", "streaming-4+1020")

GOALS: dict[str, dict[str, dict[str, dict[int, Goal]]]] = {
    "cpu": {
        "forward": _CPU_FORWARD,
        "backward": _CPU_BACKWARD,
        "decode": dict.fromkeys(_DECODED, _CPU_DECODE),
    },
    "cuda": {
        "forward": _CUDA_FORWARD,
        "backward": _CUDA_BACKWARD,
        "decode": dict.fromkeys(_DECODED, _CUDA_DECODE),
    },
}
# Most bytes held above query, key and value at the peak of one call, as a multiple of query + key + value + output.
MEMORY_GOAL = 1.2


def goal_for(device: str, measure: str, label: str, length: int) -> Goal | None:
    """Return the goal of one cell, None where there is none; `device` is "cpu" or "cuda"."""
    return GOALS[device].get(measure, {}).get(label, {}).get(length)


def main_labels(device: str) -> set[str]:
    """Return the labels that have any goal on this kind of device, and the both-sided forms that peers compute."""
    found = {label for table in GOALS[device].values() for label in table}
    return found | {"longformer-257+64-both-sides", "bigbird-64-both-sides"}
