"""Random key blocks that depend on nothing but the seed, the layer, the head and the query block.

Every number comes from a hash of these (SplitMix64: Steele, Lea and Flood, 2014) in whole-number arithmetic, never from
a generator with a state: any slice of heads and blocks, on any device and in any process, draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parts import Drawn

MOST_DRAWN = 4096  # blocks per query block; a draw costs the square of their number


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift right as unsigned: the sign that int64 drags along is masked away."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def mix(bits: Tensor) -> Tensor:
    """Return the SplitMix64 hash of 64 bits; int64 multiplication wraps around, as it should here."""
    bits = bits + _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def sample(state: Tensor, count: Tensor, most: int) -> Tensor:
    """Draw `most` distinct numbers below `count`, each set of them equally likely; all of them where they are fewer.

    Floyd's algorithm (Bentley and Floyd, 1987): the i-th number is drawn below an end that grows by one each time, and
    replaced by that end where it is taken.

    Args:
        state: int64 [H, n], what the draw depends on.
        count: int64 [n], how many numbers there are to draw from; negative is none.
    Returns:
        int64 [H, n, most], -1 at the end of a list that is shorter.
    """
    drawn = count.clamp(0, most)
    longest = int(drawn.max()) if drawn.numel() else 0
    turn = torch.arange(longest, device=state.device)[:, None, None]
    ends = (count - drawn + turn).clamp_(min=0)
    picks = state.new_full((most, *state.shape), -1)
    picks[:longest] = torch.where(turn < drawn, _shifted(mix(state + turn), 1) % (ends + 1), -1)
    for i in range(1, longest):
        taken = (picks[:i] == picks[i]).any(0) & (drawn > i)
        picks[i] = torch.where(taken, ends[i], picks[i])
    return picks.permute(1, 2, 0)


@dataclass(frozen=True)
class BlockDraw:
    """Draws `most` key blocks for each head and query block b, among `first` up to, not including, `stop`.

    stop: None draws up to the query's own block, which causal attention needs.
    before, after: blocks b - before up to, not including, b + after are not drawn.
    """

    seed: int
    layer: int
    most: int
    first: int = 0
    stop: int | None = None
    before: int = 0
    after: int = 0

    def __call__(self, head: Tensor, block: Tensor) -> Tensor:
        state = mix(mix(torch.tensor(self.seed, device=head.device)) ^ self.layer)
        state = mix(mix(state ^ head)[:, None] ^ block)
        stop = block + 1 if self.stop is None else torch.full_like(block, self.stop)
        stop = stop.clamp(min=self.first)
        low = torch.minimum((block - self.before).clamp(min=self.first), stop)
        gap = (torch.minimum(block + self.after, stop) - low).clamp(min=0)
        picks = sample(state, stop - self.first - gap, self.most)
        numbers = picks + self.first
        numbers = torch.where(numbers >= low[:, None], numbers + gap[:, None], numbers)
        return torch.where(picks < 0, -1, numbers)


def is_drawn(drawn: Drawn, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Tell which pairs lie in drawn blocks; draws for the heads and query blocks asked for, once each.

    Args:
        head, query, key: int64, broadcastable with one another, as in `Pattern.allows`.
    """
    key_block = key // drawn.key_block
    heads, h = head.unique(return_inverse=True)
    blocks, b = (query // drawn.query_block).unique(return_inverse=True)
    picks = drawn.draw(heads, blocks)
    if not picks.numel() or not key.numel():
        shape = torch.broadcast_shapes(head.shape, query.shape, key.shape)
        return torch.zeros(shape, dtype=torch.bool, device=key.device)
    # A pair is one number: which list, and which block. Finding it among the sorted ones suits any shape of question.
    span = 1 + max(int(picks.max()), int(key_block.max()))
    lists = torch.arange(len(heads) * len(blocks), device=key.device).view(len(heads), len(blocks), 1)
    held = (lists * span + picks)[picks >= 0].sort().values
    asked = (h * len(blocks) + b) * span + key_block
    if not len(held):
        return torch.zeros_like(asked, dtype=torch.bool)
    return held[torch.searchsorted(held, asked).clamp(max=len(held) - 1)] == asked
