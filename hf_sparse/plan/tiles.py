"""Tiles: what is not an interval, planned block by block from a predicate, never n x n at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A row of the search holds heads x BLOCK x this many keys at a time.
_SEARCH_KEYS = 8192
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Tiles:
    """For every block of BLOCK queries the blocks of BLOCK keys that hold at least one allowed pair of any head.

    allowed: predicate on (head, query, key), int64 positions broadcastable with one another, True = may attend.
    key_blocks: for each query block its increasing key block numbers.
    pairs: allowed pairs, summed over heads.
    """

    allowed: Callable[[Tensor, Tensor, Tensor], Tensor]
    key_blocks: tuple[np.ndarray, ...]
    pairs: int
    heads: int
    q_len: int
    k_len: int
    first: int

    def rows(self, block: int) -> tuple[int, int]:
        """Return the first and one past the last query index of a block."""
        return block * BLOCK, min((block + 1) * BLOCK, self.q_len)

    def tile(self, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the key indices [S] that a query block reads, and which pairs [H, C, S] are allowed."""
        start, stop = self.rows(block)
        keys = (torch.from_numpy(self.key_blocks[block])[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        keys = keys[keys < self.k_len].to(device)
        query = torch.arange(start, stop, device=device) + self.first + self.k_len - self.q_len
        allowed = self.allowed(
            torch.arange(self.heads, device=device)[:, None, None],
            query[None, :, None],
            (keys + self.first)[None, None, :],
        )
        return keys, allowed.expand(self.heads, stop - start, len(keys))


def tiles_of(
    allowed: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int, q_len: int, k_len: int, first: int
) -> Tiles:
    """Return the tiles of a predicate by asking it for BLOCK x _SEARCH_KEYS pairs at a time."""
    head = torch.arange(heads)[:, None, None]
    key_blocks, pairs = [], 0
    for start in range(0, q_len, BLOCK):
        query = torch.arange(start, min(start + BLOCK, q_len)) + first + k_len - q_len
        found: list[np.ndarray] = []
        for key_start in range(0, k_len, _SEARCH_KEYS):
            key = torch.arange(key_start, min(key_start + _SEARCH_KEYS, k_len)) + first
            held = allowed(head, query[None, :, None], key[None, None, :])
            pairs += int(held.sum()) * (heads // held.shape[0] if held.dim() == 3 else heads)
            columns = held.expand(heads, len(query), len(key)).any(dim=0).any(dim=0).numpy()
            found.append(np.unique((np.flatnonzero(columns) + key_start) // BLOCK))
        key_blocks.append(np.concatenate(found))
    return Tiles(allowed, tuple(key_blocks), pairs, heads, q_len, k_len, first)
