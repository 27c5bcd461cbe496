"""How large a pattern is made so that it reads a wanted share of the pairs: the one table of what sets its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..patterns import Pattern, get_pattern
from ..selectors import Selector

SHARES = 1000  # steps that a share is divided into
LEAST_BLOCK = 8  # tokens; blocks of selectors are not made smaller
_HALF = 0.5  # of the density, at most, goes to what is read whatever is selected


def _nothing(tokens: int, density: float) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Size:
    """What sets the size of a pattern.

    option: the one that is fitted.
    value: writes a size, a whole number, as the option has it.
    sizes: the smallest and the largest size at N tokens beside its other options; between them a larger one never reads
        less, or never more.
    grows: larger sizes read more.
    beside: further options at N tokens and a density, where the user gives none.
    usual: analysed where no pattern is named.
    """

    option: str
    value: Callable[[int], Any] = int
    sizes: Callable[[int, Mapping[str, Any]], tuple[int, int]] = lambda tokens, options: (1, tokens)
    grows: bool = True
    beside: Callable[[int, float], dict[str, Any]] = _nothing
    usual: bool = True


@dataclass(frozen=True)
class Scaled:
    """A pattern of which the option that sets its size is fitted to a density; `options` are its others."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_pattern(self.name, **self.options)  # refuses what is unknown
        if self.name not in SIZES:
            raise ValueError(f"no option sets the size of {self.name}; these have one: {', '.join(SIZES)}")
        if (option := SIZES[self.name].option) in self.options:
            raise ValueError(
                f"{option} of {self.name} is what is fitted, got {self.options[option]!r}; leave it out, or give the "
                f"pattern itself, which is then analysed at its own density"
            )

    def fitted(self, tokens: int, density: float, density_of: Callable[[Pattern], float]) -> Pattern:
        """Return the pattern of the size whose density comes nearest; of two as near, the sparser."""
        size = SIZES[self.name]
        options = {**size.beside(tokens, density), **self.options}
        low, high = size.sizes(tokens, options)
        seen: dict[int, tuple[Pattern, float]] = {}
        while low <= high:
            middle = (low + high) // 2
            pattern = get_pattern(self.name, **options, **{size.option: size.value(middle)})
            seen[middle] = pattern, density_of(pattern)
            if (seen[middle][1] > density) == size.grows:
                high = middle - 1
            else:
                low = middle + 1
        return min(seen.values(), key=lambda one: (abs(one[1] - density), one[1]))[0]


def scaled_where_possible(pattern: str | Pattern | Scaled) -> Pattern | Scaled:
    """Return a name as what is fitted to a density, where an option sets its size; a pattern stays what it is."""
    return Scaled(pattern) if isinstance(pattern, str) and pattern in SIZES else _itself(pattern)


def _itself(pattern: str | Pattern | Scaled) -> Pattern | Scaled:
    return pattern if isinstance(pattern, Scaled) else get_pattern(pattern)


def _wide(tokens: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the strides that read the more the longer they are, as their windows outweigh their columns."""
    return max(1, round(math.sqrt(tokens / 2))), tokens


def _within_block(tokens: int, options: Mapping[str, Any]) -> tuple[int, int]:
    return 1, options["block"]


def _half_in_blocks(tokens: int, density: float) -> dict[str, Any]:
    """Return blocks that read half of the density; the summaries are fitted to the rest."""
    return {"block": max(1, round(tokens * density * _HALF))}


def _no_bounds(tokens: int, density: float) -> dict[str, Any]:
    """Return limits of the share within which all shares lie."""
    return {"least": 1, "most": tokens}


def _few_columns(tokens: int, density: float) -> dict[str, Any]:
    """Return the share that goes to columns: published are 1,000 tokens in columns beside 6,096 on diagonals."""
    return {"vertical": round(density * 1000 / 7096, 4)}


def _selected(
    name: str, option: str = "keep", further: Callable[[int, float], dict[str, Any]] = _nothing
) -> Size:
    """Return the size of a selector: a share of the blocks, in blocks small enough to leave something to select."""

    def beside(tokens: int, density: float) -> dict[str, Any]:
        selector = get_pattern(name)
        assert isinstance(selector, Selector)
        always = selector.sinks + selector.local + _HALF  # of its own block a query sees half
        block = selector.block
        while block > LEAST_BLOCK and always * block > tokens / 2 * density * _HALF:
            block //= 2
        return {"block": block, **further(tokens, density)}

    return Size(option, lambda size: size / SHARES, lambda tokens, options: (1, SHARES), beside=beside)


# A row per pattern; what stands first wins where a head keeps as much under several.
SIZES: dict[str, Size] = {
    "sliding_window": Size("window"),
    "streaming_llm": Size("window"),
    "longformer": Size("window"),
    "block_local": Size("block"),
    "shifted": Size("group", lambda size: 2 * size),
    "dilated_window": Size("window"),
    "multi_scale": Size("window"),
    "strided": Size("stride", grows=False),
    "atrous": Size("stride", grows=False, usual=False),  # strided under another name
    "sparse_transformer_strided": Size("stride", sizes=_wide),
    "atrous_local": Size("stride", sizes=_wide, usual=False),  # the same again
    "sparse_transformer_fixed": Size("summary", sizes=_within_block, beside=_half_in_blocks),
    "bigbird": Size("block"),
    "topk_blocks": _selected("topk_blocks"),
    "quest": _selected("quest"),
    "esa": _selected("esa"),
    "gsa": _selected("gsa", further=_no_bounds),
    "gsa_on_device": _selected("gsa_on_device"),
    "kvstar": _selected("kvstar"),
    "vertical_slash": _selected("vertical_slash", "slash", further=_few_columns),
    "lsh": Size("block"),
}
