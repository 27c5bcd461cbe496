"""The first and one past the last key of every row, as positions on a call's key axis, by arithmetic on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.pieces import Comb, Indices, Lattice
from .orders import Order


def row_bounds(order: Order, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return lo and hi, int64 [reads, n]: row ``rows[i]`` reads the keys lo .. hi of the call's key axis.

    Args:
        rows: row numbers [n] below `order.rows`, int64, on the device on which the work is done.
    """
    behind = order.k_len - order.q_len
    if order.stride > 1:
        residue, index = sorted_place(order.k_len, behind, order.stride, rows)
    else:
        residue = None
        index = rows + behind
        if order.queries is not None:
            index = torch.from_numpy(order.queries).to(rows.device, non_blocking=True)[rows] + behind
    position = index + order.key_position
    los, his = [], []
    for reads in order.reads:
        if residue is not None:
            begin = _sorted_before(order.k_len, order.stride, residue)
            count = _below(torch.full_like(residue, order.k_len), residue, order.stride)
        else:
            begin = torch.full_like(rows, order.places[reads.keys])
            count = torch.full_like(rows, order.lists[reads.keys].count)
        lo, hi = torch.zeros_like(rows), count
        for bound in reads.starts:
            lo = torch.maximum(lo, _count_below(order, reads.keys, bound.at(position), residue))
        for bound in reads.stops:
            hi = torch.minimum(hi, _count_below(order, reads.keys, bound.at(position), residue))
        lo = torch.minimum(lo, count)
        los.append(begin + lo)
        his.append(begin + torch.maximum(hi, lo))
    return torch.stack(los), torch.stack(his)


def sorted_place(length: int, behind: int, stride: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return residue and index of the tokens behind .. length in the order (residue modulo stride, index)."""
    residues = torch.arange(stride + 1, device=rows.device)
    before = _sorted_before(length, stride, residues) - _sorted_before(behind, stride, residues)
    residue = torch.searchsorted(before, rows, right=True) - 1
    index = behind + (residue - behind) % stride + stride * (rows - before[residue])
    return residue, index


def sorting(order: Order, behind: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for tokens behind .. k_len sorted by residue, the token at each place and the place of each token."""
    rows = torch.arange(order.k_len - behind, device=device)
    _, index = sorted_place(order.k_len, behind, order.stride, rows)
    return index - behind, torch.empty_like(rows).scatter_(0, index - behind, rows)


def _sorted_before(length: int, stride: int, residue: Tensor) -> Tensor:
    """Return how many of the indices 0 .. length have a smaller residue."""
    return residue * (length // stride) + residue.clamp(max=length % stride)


def _below(index: Tensor, residue: Tensor, stride: int) -> Tensor:
    """Return how many indices >= 0 with this residue are smaller than `index`."""
    return (-((residue - index) // stride)).clamp_(min=0)


def _count_below(order: Order, number: int, position: Tensor, residue: Tensor | None) -> Tensor:
    """Return how many keys of the list lie before `position`."""
    index = position - order.key_position
    if residue is not None:
        return _below(index, residue, order.stride)
    keys: Indices = order.lists[number]
    if isinstance(keys, Lattice):
        return (-((keys.first - index) // keys.step)).clamp_(0, keys.count)
    if isinstance(keys, Comb):
        start = -(-keys.offset % keys.period)
        before = min(-start, keys.width)
        period, place = (index - start) // keys.period, (index - start) % keys.period
        return (period * keys.width + place.clamp(max=keys.width) - before).clamp_(0, keys.count)
    listed = torch.from_numpy(keys.indices).to(index.device, non_blocking=True)
    return torch.searchsorted(listed, index)
