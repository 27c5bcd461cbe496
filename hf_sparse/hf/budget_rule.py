"""How far a budget is raised or lowered for the attention mass that was lost under it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..selectors.block_selector import BlockSelector

_FURTHEST = math.log(2)  # one change at most about doubles a budget, or halves it
_GAIN = 0.1  # at least, of a change; the gain falls with every turn, 1, 1/2, 1/3 and so on
_LEAST = 1e-6  # a smaller loss is as good as none


@dataclass(frozen=True)
class Range:
    """Within which numbers of blocks a budget says anything, for queries that see up to `seen` blocks.

    floor: what is read whatever the budget is.
    top: what is read at most, everything but where the selector limits itself.
    """

    floor: int
    top: int
    seen: int


def range_of(selector: BlockSelector, seen: int) -> Range:
    """Return the range of a selector's budget for queries that see up to `seen` blocks, their own included."""
    top = replace(selector, keep=1.0 if isinstance(selector.keep, float) else seen).wanted(seen)
    least = replace(selector, keep=1 / seen if isinstance(selector.keep, float) else 1).wanted(seen)
    always = min(seen, selector.sinks + selector.before + 1)
    return Range(min(max(least, always), top), top, seen)


def changed(blocks: float, lost: float, goal: float, limits: Range, turns: int) -> float:
    """Return the number of blocks to be read after one that lost so much mass.

    What is lost falls about as a power of the blocks where these are few, and with what is left out where they are
    nearly all: so the step is taken in the logarithm of the odds, ``blocks : top - blocks``, in proportion to the share
    by which too much is lost. It is the whole of that on the way to the goal and less with every turn, so that the
    noise of the measurements averages out (Kesten, 1958). It goes to the floor and the top themselves.

    Args:
        goal: how much may be lost.
        turns: how often the budget was lowered after it was raised, or raised after it was lowered.
    """
    error = max(lost, _LEAST) / max(goal, _LEAST) - 1
    gain = max(_GAIN, 1 / (1 + turns))
    step = min(max(gain * error, -_FURTHEST), _FURTHEST)
    highest = limits.top - 0.5  # beyond it is everything
    share = min(max(blocks, limits.floor), highest) / limits.top
    made = limits.top / (1 + (1 - share) / share * math.exp(-step))
    made = limits.top if made > highest else max(made, limits.floor)
    if blocks > limits.top:  # of texts that were longer
        made = blocks if step >= 0 else max(made, blocks * math.exp(step))
    return made
