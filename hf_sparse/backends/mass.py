"""How much of the dense attention mass a call keeps, measured on some of its queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..plan.constraint import Constraint
from ..plan.segments import Segment, Segments
from .call import Call
from .selected import Selected


@dataclass(frozen=True, eq=False)
class Sample:
    """Some queries of one sequence, and their dense attention weights.

    segment: the sequence, R rows with the same K keys.
    positions: int64 [S], positions of the queries in the sequence, ascending.
    weights: [R, H, S, K], float32 or float64, under what the model itself allows. They sum to 1, less the share of the
        sinks of a call that has some.
    """

    segment: Segment
    positions: Tensor
    weights: Tensor


@torch.no_grad()
def sample_queries(
    query: Tensor,
    key: Tensor,
    call: Call,
    segments: Segments,
    count: int,
    generator: np.random.Generator,
    sinks: Tensor | None = None,
) -> list[Sample | None]:
    """Return up to `count` queries of each sequence of a call, drawn without replacement.

    None for a sequence without a query whose dense weights can be known: it has none in this call, or a cache has
    dropped keys that all of them would see.

    Args:
        query: [B, H, Q, D], the last Q of the keys; key: [B, H_kv, K, D].
        sinks: [H], as `attend` takes them.
    """
    samples: list[Sample | None] = []
    for segment in segments.entries:
        at = segment.queries(query.shape[2], key.shape[2])
        known = _known_queries(segment, call.constraint, segment.queries_in(query.shape[2], key.shape[2]))
        if not len(known):
            samples.append(None)
            continue
        drawn = np.sort(generator.choice(known, min(count, len(known)), replace=False))
        begin = segment.end - segment.queries_in(query.shape[2], key.shape[2])
        index = torch.from_numpy(drawn - begin)
        index = index + at.start if isinstance(at, slice) else at.cpu()[index]
        asked = query[segment.rows].index_select(2, index.to(query.device))
        positions = torch.from_numpy(drawn).to(query.device)
        read = key[segment.rows, :, segment.slots]
        samples.append(Sample(segment, positions, _weights(asked, read, call, segment, positions, sinks)))
    return samples


@torch.no_grad()
def kept_mass(sample: Sample, call: Call, heads: int, selected: Selected | None) -> Tensor:
    """Return the share [R, H, S] of each query's dense mass on keys that the call reads; sinks have no part in it.

    Args:
        call: its pattern the static part of `divided`.
        selected: the blocks that are read besides.
    """
    segment, weights = sample.segment, sample.weights
    context = call.constraint.context(
        call.pattern, layer=call.layer, heads=heads, length=segment.end, chosen=segment.chosen
    )
    head = torch.arange(heads, device=weights.device)[:, None, None]
    keys = torch.from_numpy(segment.positions).to(weights.device)
    read = call.constraint.allowed(call.pattern, context, head, sample.positions[:, None], keys)
    if selected is not None:
        assert segment.columns is None, "a cache drops no key that may be selected"
        read = read | selected.mask(heads, sample.positions)
    total = weights.sum(-1)
    share = ((weights * read).sum(-1) / total).clamp(max=1)
    return torch.where(total > 0, share, 1)  # where all of it is the sink's, nothing is lost


def kept_masses(
    samples: Sequence[Sample | None], call: Call, heads: int, selected: Sequence[Selected | None] | None
) -> list[Tensor]:
    """Return `kept_mass` of every sequence that has a sample."""
    chosen = [None] * len(samples) if selected is None else selected
    pairs = zip(samples, chosen, strict=True)
    return [kept_mass(sample, call, heads, own) for sample, own in pairs if sample is not None]


def _known_queries(segment: Segment, constraint: Constraint, count: int) -> np.ndarray:
    """Return the positions of those of the last `count` queries of which the sequence holds every key they may see."""
    query = np.arange(segment.end - count, segment.end)
    if segment.first == 0 and segment.columns is None:
        return query
    least = np.zeros_like(query)
    for start in constraint.bounds()[0]:
        least = np.maximum(least, start.at(query))
    held = segment.positions
    seen = np.searchsorted(held, query, "right") - np.searchsorted(held, least)
    return query[seen == query + 1 - least]


def _weights(
    query: Tensor, key: Tensor, call: Call, segment: Segment, positions: Tensor, sinks: Tensor | None
) -> Tensor:
    """Return the dense weights [R, H, S, K] of query [R, H, S, D] and key [R, H_kv, K, D]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    # The query heads of a key head are one matrix, so that keys are not repeated for them.
    own = query.detach().to(dtype).unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        scores = (own.flatten(2, 3) @ key.detach().to(dtype).mT) * scale
    scores = scores.unflatten(2, own.shape[2:4]).flatten(1, 2)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    keys = torch.from_numpy(segment.positions).to(query.device)
    scores = scores.masked_fill(~call.constraint.admits(positions[:, None], keys), float("-inf"))
    if sinks is not None:
        beside = sinks.detach().to(scores)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, beside), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)
