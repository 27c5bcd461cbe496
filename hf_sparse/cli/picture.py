"""The mask of a pattern: which heads see the same, and their picture as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..patterns import Pattern

WIDTH = 120  # characters; pictures of several heads stand beside each other as far as this goes
_GAP = 4


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Query heads with the same mask: allowed is bool [N, N], True = may attend."""

    heads: tuple[int, ...]
    allowed: Tensor

    @property
    def title(self) -> str:
        """The heads by number: "head 5", "heads 0-4", "heads 0-2, 7"."""
        runs: list[list[int]] = []
        for head in self.heads:
            if runs and head == runs[-1][-1] + 1:
                runs[-1][1:] = [head]
            else:
                runs.append([head])
        numbers = ", ".join("-".join(map(str, run)) for run in runs)
        return f"{'heads' if len(self.heads) > 1 else 'head'} {numbers}"

    @property
    def pairs(self) -> int:
        return int(self.allowed.sum())


def head_groups(
    pattern: Pattern, length: int, *, heads: int, causal: bool, layer: int = 0
) -> list[HeadGroup]:
    """Return the heads grouped by what they see at `length` tokens, in the order of their first heads."""
    groups: dict[bytes, tuple[list[int], Tensor]] = {}
    for head, allowed in enumerate(pattern.mask(length, heads=heads, causal=causal, layer=layer)):
        groups.setdefault(allowed.numpy().tobytes(), ([], allowed))[0].append(head)
    return [HeadGroup(tuple(members), allowed) for members, allowed in groups.values()]


def picture(groups: Sequence[HeadGroup], length: int, causal: bool) -> str:
    """Return the masks as text, a row per query; where heads differ, each group under its heads and its density."""
    if len(groups) == 1:
        return "\n".join(_rows(groups[0].allowed, length))
    blocks = []
    for group in groups:
        kept = f"{group.pairs / dense_pairs(length, causal):.1%}"
        blocks.append([f"{group.title}: density {kept}", *_rows(group.allowed, length)])
    width = max(len(line) for block in blocks for line in block)
    beside = max(1, (WIDTH + _GAP) // (width + _GAP))
    bands = []
    for first in range(0, len(blocks), beside):
        lines = zip(*blocks[first : first + beside], strict=True)
        bands.append(
            "\n".join((" " * _GAP).join(part.ljust(width) for part in line).rstrip() for line in lines)
        )
    return "\n\n".join(bands)


def dense_pairs(length: int, causal: bool) -> int:
    return length * (length + 1) // 2 if causal else length * length


def _rows(allowed: Tensor, length: int) -> list[str]:
    margin = len(str(length - 1)) + 5
    lines = []
    if length > 10:
        tens = " ".join(str(key // 10)[-1] if key and key % 10 == 0 else " " for key in range(length))
        lines.append(f"{'':{margin}}{tens}".rstrip())
    lines.append(f"{'key':<{margin}}" + " ".join(str(key % 10) for key in range(length)))
    for query, row in enumerate(allowed.tolist()):
        lines.append(f"{query:<{margin}}" + " ".join("x" if seen else "." for seen in row))
    return lines
