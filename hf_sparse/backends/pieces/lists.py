"""The tensors of a group of pieces, its queries and keys in the order of their lists.

A slice of tokens stays a view; the members of a family (the residues of a stride) are taken one after the other, each a
slice. Explicit lists, and combs of neighbours, are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...plan.pieces import Indices, Lattice
from .schedule import Group


@dataclass(frozen=True)
class Tensors:
    """The tensors of one walk, [B, H or H_kv, N, D or Dv], lse [B, H, N]; the gradients in a backward pass only."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    grad: Tensor | None = None
    dquery: Tensor | None = None
    dkey: Tensor | None = None
    dvalue: Tensor | None = None

    def heads(self, own: slice, read: slice) -> Tensors:
        """Return the same for some query heads, and the key heads they read."""

        def cut(x: Tensor | None, heads: slice) -> Any:
            return None if x is None else x[:, heads]

        names = ("query", "key", "value", "out", "lse", "grad", "dquery", "dkey", "dvalue")
        of_keys = ("key", "value", "dkey", "dvalue")
        return Tensors(*(cut(getattr(self, n), read if n in of_keys else own) for n in names))


@dataclass(frozen=True)
class Lists:
    """What one member of a group works on: query, out, grad, dquery [B, H, count, D or Dv]; one key list per piece."""

    query: Tensor
    out: Tensor
    lse: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    grad: Tensor | None = None
    dquery: Tensor | None = None
    dkeys: list[Tensor] | None = None
    dvalues: list[Tensor] | None = None


def members(group: Group, tensors: Tensors) -> Iterator[Lists]:
    """Yield what each member works on; what was gathered and changed is put back after its turn."""
    for member in range(group.repeat):
        queries = _shifted(group.queries, member)
        keys = [_shifted(indices, member) for indices in group.keys]
        alone = isinstance(queries, Lattice)
        query, out = take(tensors.query, queries), take(tensors.out, queries)
        lse = take(tensors.lse[..., None], queries)[..., 0]
        read, values = ([take(x, indices) for indices in keys] for x in (tensors.key, tensors.value))
        if tensors.dquery is None or tensors.grad is None:
            yield Lists(query, out, lse, read, values)
            if not alone:
                _put(tensors.out, queries, out)
                _put(tensors.lse[..., None], queries, lse[..., None])
            continue
        assert tensors.dkey is not None and tensors.dvalue is not None
        dquery = take(tensors.dquery, queries)
        dkeys, dvalues = (
            [take(x, i) if isinstance(i, Lattice) else _zeros(x, i) for i in keys]
            for x in (tensors.dkey, tensors.dvalue)
        )
        grad = take(tensors.grad, queries)
        yield Lists(query, out, lse, read, values, grad, dquery, dkeys, dvalues)
        if not alone:
            _put(tensors.dquery, queries, dquery)
        for indices, dkey, dvalue in zip(keys, dkeys, dvalues, strict=True):
            if not isinstance(indices, Lattice):
                numbers = _numbers(indices, dkey.device)
                tensors.dkey.index_add_(2, numbers, dkey)
                tensors.dvalue.index_add_(2, numbers, dvalue)


def take(x: Tensor, indices: Indices) -> Tensor:
    """Return the listed tokens of x [B, H, N, D]: a view of a slice, a copy of anything else."""
    if isinstance(indices, Lattice):
        return x[:, :, indices.first : indices.first + (indices.count - 1) * indices.step + 1 : indices.step]
    return x.index_select(2, _numbers(indices, x.device))


def _put(x: Tensor, indices: Indices, listed: Tensor) -> None:
    x.index_copy_(2, _numbers(indices, x.device), listed)


def _zeros(x: Tensor, indices: Indices) -> Tensor:
    return x.new_zeros((x.shape[0], x.shape[1], indices.count, x.shape[3]))


def _numbers(indices: Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(indices.at(np.arange(indices.count))).to(device)


def _shifted(indices: Indices, by: int) -> Indices:
    if by == 0:
        return indices
    assert isinstance(indices, Lattice)
    return Lattice(indices.first + by, indices.count, indices.step)
