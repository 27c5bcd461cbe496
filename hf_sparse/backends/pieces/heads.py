"""Sets of heads as slices: what a group of query heads and the key heads they read look like in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


@dataclass(frozen=True)
class HeadBlock:
    """Query heads `query`, and key heads `key` of which each serves the same number of them, in order.

    first: place of the first query head in its group; the block's heads follow it there without a gap.
    """

    query: slice
    key: slice
    first: int

    @property
    def count(self) -> int:
        return len(range(self.query.start, self.query.stop, self.query.step))


@lru_cache(maxsize=256)
def head_blocks(heads: tuple[int, ...], per_key_head: int) -> tuple[HeadBlock, ...]:
    """Return `heads`, ascending, as few blocks.

    per_key_head: query heads of the model that share a key head.
    """
    by_key: dict[int, list[int]] = {}
    for head in heads:
        by_key.setdefault(head // per_key_head, []).append(head)
    runs: list[list[list[int]]] = []  # blocks, each a list of the query heads of successive key heads
    for own in by_key.values():
        for part in _progressions(own):
            if runs and _continues(runs[-1], part, per_key_head):
                runs[-1].append(part)
            else:
                runs.append([part])
    blocks, first = [], 0
    for run in runs:
        flat = [head for part in run for head in part]
        keys = [part[0] // per_key_head for part in run]
        blocks.append(HeadBlock(_slice(flat), _slice(keys), first))
        first += len(flat)
    return tuple(blocks)


def _progressions(numbers: list[int]) -> list[list[int]]:
    """Cut an ascending list into arithmetic progressions."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and (len(parts[-1]) == 1 or number - parts[-1][-1] == parts[-1][1] - parts[-1][0]):
            parts[-1].append(number)
        else:
            parts.append([number])
    return parts


def _continues(run: list[list[int]], part: list[int], per_key_head: int) -> bool:
    """True when the heads of `run` and `part` are one progression, and so are their key heads."""
    flat = [head for own in run for head in own] + part
    keys = [own[0] // per_key_head for own in run] + [part[0] // per_key_head]
    if len(part) != len(run[0]) or len(set(keys)) != len(keys):
        return False
    return all(len({b - a for a, b in pairwise(x)}) <= 1 for x in (flat, keys))


def _slice(numbers: list[int]) -> slice:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return slice(numbers[0], numbers[-1] + 1, step)
