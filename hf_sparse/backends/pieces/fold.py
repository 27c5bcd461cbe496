"""Lists of indices as views: a stride's residues folded into the head axis, an explicit list gathered once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.pieces import IndexList, Lattice


def fold(x: Tensor, indices: Lattice | IndexList, members: int = 1) -> Tensor:
    """Return the listed tokens of x [B, H, N, D] as [B, members * H, count, D].

    A view wherever the memory layout allows it: always for a slice, for a family in the layout [B, N, H, D].
    """
    if isinstance(indices, IndexList):
        return x.index_select(2, torch.from_numpy(indices.indices).to(x.device))
    if members == 1:
        return x[:, :, _slice(indices)]
    return _family(x, indices, members).reshape(x.shape[0], -1, indices.count, x.shape[-1])


def is_view(indices: Lattice | IndexList, members: int = 1) -> bool:
    """True when `fold` gives a view that can be written to."""
    return isinstance(indices, Lattice) and members == 1


def write(x: Tensor, indices: Lattice | IndexList, members: int, folded: Tensor) -> None:
    """Put `folded` [B, members * H, count, D] back to its places in x [B, H, N, D]."""
    if isinstance(indices, IndexList):
        x.index_copy_(2, torch.from_numpy(indices.indices).to(x.device), folded.to(x.dtype))
    elif members == 1:
        x[:, :, _slice(indices)] = folded
    else:
        places = _family(x, indices, members)
        places.copy_(folded.reshape(places.shape))


def add(x: Tensor, indices: Lattice | IndexList, members: int, folded: Tensor) -> None:
    """Add `folded` [B, members * H, count, D] to its places in x [B, H, N, D]."""
    if isinstance(indices, IndexList):
        x.index_add_(2, torch.from_numpy(indices.indices).to(x.device), folded.to(x.dtype))
    elif members == 1:
        x[:, :, _slice(indices)] += folded
    else:
        places = _family(x, indices, members)
        places.add_(folded.reshape(places.shape))


def _slice(indices: Lattice) -> slice:
    return slice(indices.first, indices.first + (indices.count - 1) * indices.step + 1, indices.step)


def _family(x: Tensor, indices: Lattice, members: int) -> Tensor:
    """View the family's tokens as [B, members, H, count, D]; no token occurs twice, so it can be written to."""
    batch, heads, _, width = x.shape
    s_b, s_h, s_n, s_d = x.stride()
    return x.as_strided(
        (batch, members, heads, indices.count, width),
        (s_b, s_n, s_h, s_n * indices.step, s_d),
        x.storage_offset() + indices.first * s_n,
    )
