"""Lists of indices in FlashAttention's layout: a stride's residues side by side in the head axis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...plan.pieces import Indices, Lattice


def fold(x: Tensor, indices: Indices, members: int) -> Tensor:
    """Return the listed tokens of x [B, H, N, D] as [B, count, members * H, D], a view where the layout allows it."""
    if not isinstance(indices, Lattice):
        return x.index_select(2, numbers(indices, x.device)).transpose(1, 2)
    return _places(x, indices, members).flatten(2, 3)


def write(x: Tensor, indices: Indices, members: int, folded: Tensor) -> None:
    """Put `folded` [B, count, members * H, D] back to its places in x [B, H, N, D]."""
    if isinstance(indices, Lattice):
        _places(x, indices, members).copy_(folded.unflatten(2, (members, -1)))
    else:
        x.index_copy_(2, numbers(indices, x.device), folded.transpose(1, 2).to(x.dtype))


def add(x: Tensor, indices: Indices, members: int, folded: Tensor) -> None:
    """Add `folded` [B, count, members * H, D] to its places in x [B, H, N, D]."""
    if isinstance(indices, Lattice):
        _places(x, indices, members).add_(folded.unflatten(2, (members, -1)))
    else:
        x.index_add_(2, numbers(indices, x.device), folded.transpose(1, 2).to(x.dtype))


def _places(x: Tensor, indices: Lattice, members: int) -> Tensor:
    """View the listed tokens as [B, count, members, H, D]; no token occurs twice, so it can be written to."""
    batch, heads, _, width = x.shape
    s_b, s_h, s_n, s_d = x.stride()
    return x.as_strided(
        (batch, indices.count, members, heads, width),
        (s_b, s_n * indices.step, s_n, s_h, s_d),
        x.storage_offset() + indices.first * s_n,
    )


def numbers(indices: Indices, device: torch.device) -> Tensor:
    """Return the indices as a tensor [count], int64."""
    return torch.from_numpy(indices.at(np.arange(indices.count))).to(device, non_blocking=True)
