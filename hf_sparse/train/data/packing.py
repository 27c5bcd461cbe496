"""Which pieces share a row: best fit decreasing leaves almost nothing to fill (Ding et al. 2024, arXiv:2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

SHORT = ("pack", "pad", "drop")  # what becomes of pieces shorter than a sample
WINDOW = 4096  # short pieces that are sorted and packed together


def check_short(short: str) -> None:
    """Raise ValueError unless `short` is one of SHORT."""
    if short not in SHORT:
        raise ValueError(f"short must be one of {', '.join(SHORT)}, got {short!r}.")


def rows_of(pieces: Sequence[np.ndarray], length: int, short: str) -> Iterator[list[np.ndarray]]:
    """Yield the pieces as rows of at most `length` tokens: those of `length` alone, shorter ones as `short` says.

    Packed rows come after the WINDOW short pieces they are made of; everything else keeps its order.
    """
    waiting: list[np.ndarray] = []
    for piece in pieces:
        if len(piece) == length or short == "pad":
            yield [piece]
        elif short == "pack":
            waiting.append(piece)
            if len(waiting) == WINDOW:
                yield from _packed(waiting, length)
                waiting = []
    yield from _packed(waiting, length)


def _packed(pieces: Sequence[np.ndarray], length: int) -> Iterator[list[np.ndarray]]:
    for row in best_fit([len(piece) for piece in pieces], length):
        yield [pieces[number] for number in row]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Return rows of numbers of pieces whose sizes, none above `length`, add up to at most `length`.

    The largest go first, each into the row that it leaves the least room in.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        fitting = bisect_left(open_rows, (sizes[piece], 0))
        if fitting == len(open_rows):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(fitting)
        rows[row].append(piece)
        insort(open_rows, (room - sizes[piece], row))
    return rows
