"""Selected blocks of keys in the decoding step: one query per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...plan.segments import Segment, Segments
from ...selectors import Selection
from ..selected import Selected
from .fetch import Fetch


def chosen_fetch(
    segments: Segments, selected: Sequence[Selected | None], heads: int, groups: int, device: torch.device
) -> Fetch:
    """Return how the selected keys of all sequences with a query are taken: slots [R, H_kv, 1 or G, m].

    Where one sequence goes on with a selection, so does what was made of it.
    """
    first = selected[0] if len(selected) == 1 else None
    if first is None or first.is_masked or not isinstance(first.selection, Selection):
        return _fetch(segments, selected, heads, groups, device)
    slots = segments.entries[0].slots
    known = None
    if isinstance(slots, slice):  # an index made in inference mode cannot be differentiated through
        known = slots.start, segments.entries[0].first, torch.is_inference_mode_enabled()
    memo = first.selection.memo
    if known is None or memo.get("known") != known:
        memo.update(known=known, fetch=_fetch(segments, selected, heads, groups, device))
    return cast(Fetch, memo["fetch"])


def _fetch(
    segments: Segments, selected: Sequence[Selected | None], heads: int, groups: int, device: torch.device
) -> Fetch:
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
    return Fetch(table, None if whole else table >= 0)


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
