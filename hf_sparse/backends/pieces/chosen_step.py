"""Selected blocks of keys in the decoding step: one query per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ...plan.segments import Segment, Segments
from ...selectors import Selection
from ..selected import Selected
from .fetch import Fetch


def chosen_fetch(
    segments: Segments, selected: Sequence[Selected | None], heads: int, groups: int, device: torch.device
) -> Fetch:
    """Return how the selected keys of all sequences with a query are taken: slots [R, H_kv, 1 or G, m]."""
    kv_heads = heads // groups
    asking = [
        (segment, chosen)
        for segment, chosen in zip(segments.entries, selected, strict=True)
        if segment.queries_in(1, segments.k_len)
    ]
    found = [_slots(segment, chosen, kv_heads, groups, device) for segment, chosen in asking]
    width = max(slots.shape[3] for slots in found)
    per_head = max(slots.shape[2] for slots in found)
    table = torch.cat(
        [pad(slots, (0, width - slots.shape[3]), value=-1).expand(-1, -1, per_head, -1) for slots in found]
    )
    whole = all(slots.shape[3] == width for slots in found) and all(
        chosen is not None and not chosen.is_masked and chosen.listed.exact for chosen in selected
    )
    allowed = None if whole else table >= 0
    if device.type == "cpu" and per_head == 1 and all(_is_whole(*one) for one in asking):
        blocks = _blocks([(s, c) for s, c in asking if c is not None], kv_heads)
        starts = [cast(slice, s.slots).start for s, _ in asking for _ in range(s.rows.start, s.rows.stop)]
        size = width // blocks.shape[2]
        return BlockFetch(slots=table, allowed=allowed, blocks=blocks, starts=starts, size=size)
    return Fetch(table, allowed)


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockFetch(Fetch):
    """Keys of all heads in whole blocks, on a CPU, where copying few long runs costs a fraction of a gather by tokens.

    blocks: int64 [R, H_kv, n], numbers of blocks; 0 behind the last one of a list.
    starts: for each row the slot at which block 0 begins.
    size: tokens per block.
    """

    blocks: Tensor
    starts: list[int]
    size: int

    def scores(self, query: Tensor, key: Tensor, rows: slice | Tensor, heads: slice) -> Tensor:
        if not _in_place(key, query):
            return super().scores(query, key, rows, heads)
        count, kv_heads, most = self.blocks.shape
        own = query.unflatten(1, (kv_heads, -1))
        out = query.new_empty((count, kv_heads, own.shape[2], most * self.size))
        copy = query.new_empty((most, self.size * key.shape[3]))  # stays in the processor's cache
        for row, x in enumerate(key[rows]):
            blocks = x[:, self.starts[row] :]
            blocks = blocks[:, : blocks.shape[1] // self.size * self.size].unflatten(1, (-1, self.size))
            for head in range(kv_heads):
                torch.index_select(blocks[head].flatten(1), 0, self.blocks[row, head], out=copy)
                torch.mm(own[row, head], copy.view(-1, key.shape[3]).mT, out=out[row, head])
        return out

    def sums(self, weights: Tensor, value: Tensor, rows: slice | Tensor, heads: slice) -> Tensor:
        """Return the sums, in which values are read where they are, without a copy."""
        size = value.shape[3]
        if not _in_place(value, weights):
            return super().sums(weights, value, rows, heads)
        own = value[rows]
        row, head, token = (stride // size for stride in own.stride()[:3])
        count, kv_heads, groups, _ = weights.shape
        last = (count - 1) * row + (kv_heads - 1) * head + (own.shape[2] - 1) * token
        flat = own.as_strided((last + 1, size), (size, 1))
        slots = cast(Tensor, self.slots)
        slots = torch.where(slots < 0, own.shape[2] - 1, slots)  # the query's own value is no nan
        places = slots * token + torch.arange(kv_heads)[:, None, None] * head
        places = places + torch.arange(count)[:, None, None, None] * row
        places = places.expand(-1, -1, groups, -1).flatten(0, 2)
        summed = embedding_bag(places, flat, mode="sum", per_sample_weights=weights.flatten(0, 2))
        return summed.view(count, kv_heads, groups, size)


def _in_place(x: Tensor, other: Tensor) -> bool:
    """True where keys or values x [B, H_kv, K, D] are read as they lie: tokens of a head one after the other.

    So caches hold them. What is read is not differentiated.
    """
    size = x.shape[3]
    lies = x.stride()[2:] == (size, 1) and all(stride % size == 0 for stride in x.stride()[:2])
    graph = torch.is_grad_enabled() and (x.requires_grad or other.requires_grad)
    return lies and x.dtype == other.dtype and not graph


def _is_whole(segment: Segment, chosen: Selected | None) -> bool:
    """True where a sequence selects blocks and has every slot from its first token on, without a hole."""
    if chosen is None or not isinstance(chosen.selection, Selection):
        return False
    return isinstance(segment.slots, slice) and segment.first == 0


def _blocks(asking: list[tuple[Segment, Selected]], kv_heads: int) -> Tensor:
    """Return the numbers of the blocks that rows read, int64 [R, H_kv, n], 0 behind the last one of a list."""
    lists = [chosen.listed.lists[:, :, -1].clamp(min=0) for _, chosen in asking]
    most = max(x.shape[2] for x in lists)
    return torch.cat([pad(x, (0, most - x.shape[2])).expand(-1, kv_heads, -1) for x in lists])


def _slots(
    segment: Segment, chosen: Selected | None, kv_heads: int, groups: int, device: torch.device
) -> Tensor:
    """Return the slots [R, H_kv, 1 or G, m] that one sequence reads, -1 where it reads fewer."""
    rows = segment.rows.stop - segment.rows.start
    if chosen is None:
        return torch.full((rows, kv_heads, 1, 0), -1, device=device)
    own = chosen.selection
    if isinstance(own, Selection):
        keys, real = own.positions(own.lists[:, :, -1])
        keys, real = (x[:, :, None].expand(-1, kv_heads, -1, -1) for x in (keys, real))
    else:
        keys = own.read_by_last().unflatten(1, (kv_heads, groups))
        real = keys >= segment.first
    if chosen.is_masked:
        head = torch.arange(kv_heads * groups, device=keys.device).view(1, kv_heads, groups, 1)
        query = torch.full((), chosen.begin, device=keys.device)
        real = chosen.counts(head, query, keys) & real
    keys = (keys - segment.first).clamp(min=0)  # what the model's own window has left behind does not count
    listed = segment.slots
    slots = keys + listed.start if isinstance(listed, slice) else listed.to(keys.device)[keys]
    return torch.where(real, slots, -1)
