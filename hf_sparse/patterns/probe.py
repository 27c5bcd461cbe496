"""A short trial of a pattern before a model runs it: what `allows` and `parts` return on a few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Context, Pattern
from .parts import Bound, Drawn, Listed, Part, Periodic, Residue
from .sampling import is_drawn

_TOKENS = 70  # not a multiple of any block size in use
_CORNER = 16


def check_predicate(pattern: Pattern, heads: int, causal: bool) -> None:
    """Raise ValueError where `pattern`, or a pattern it is made of, does not answer as `Pattern.allows` says.

    Asked again in smaller and larger company, it must give every pair of positions the same answer: one that looks at
    what else is asked would let later tokens change earlier rows, and decoding differ from one pass.

    heads: query heads of the model.
    """
    chosen = (1, _CORNER + 3) if pattern.takes_globals else ()
    layer = 0 if pattern.per_layer else None
    context = Context(causal, layer, heads, None if causal else _TOKENS, chosen)
    whole = _asked(pattern, context, torch.arange(_TOKENS), torch.arange(_TOKENS))
    few, one = torch.arange(_CORNER), torch.arange(_TOKENS - 3, _TOKENS - 2)
    for queries, keys in [(few, few), (one, torch.arange(_TOKENS)), (one, few), (few, one)]:
        alone = _asked(pattern, context, queries, keys)
        if differ := torch.nonzero(alone != whole[:, queries][:, :, keys]).tolist():
            head, q, k = differ[0]
            raise ValueError(
                f"{pattern} answers {bool(alone[head, q, k])} for query {int(queries[q])} and key {int(keys[k])} when "
                f"asked about {len(queries)} x {len(keys)} positions, and {not alone[head, q, k]} among {_TOKENS}; "
                f"allows must look at each pair alone, not at shapes, maxima or other positions"
            )
    _check_tile(pattern, context, whole)
    _check_parts(pattern, context, whole)
    for member in pattern.members:
        check_predicate(member, heads, causal)


def parts_mask(parts: Sequence[Part], heads: int, length: int) -> Tensor:
    """Return the union of `parts` as a dense mask [heads, length, length], pair by pair: for checks, quadratic.

    Causality is not in it.
    """
    query, key = torch.arange(length)[None, :, None], torch.arange(length)[None, None, :]
    held = torch.zeros(heads, length, length, dtype=torch.bool)
    for part in parts:
        own = _listed(part, torch.arange(heads)[:, None, None], query, key)
        if part.start is not None:
            own = own & (key >= _at(part.start, query))
        if part.stop is not None:
            own = own & (key < _at(part.stop, query))
        if part.queries is not None:
            own = own & _member(part.queries, query)
        rows = slice(None) if part.heads is None else list(part.heads)
        held[rows] |= own.expand_as(held)[rows]
    return held


def _listed(part: Part, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    keys = part.keys
    if isinstance(keys, Residue):
        return (query - key) % keys.stride == 0
    if isinstance(keys, (Periodic, Listed)):
        return _member(keys, key)
    if isinstance(keys, Drawn):
        return is_drawn(keys, head, query, key)
    return torch.ones_like(query == key)


def _member(listed: Periodic | Listed, position: Tensor) -> Tensor:
    if isinstance(listed, Periodic):
        return (position - listed.offset) % listed.period < listed.width
    return torch.isin(position, torch.tensor(listed.positions, dtype=torch.long))


def _at(bound: Bound, query: Tensor) -> Tensor:
    return torch.from_numpy(bound.at(query.numpy()))


def _asked(pattern: Pattern, context: Context, queries: Tensor, keys: Tensor) -> Tensor:
    """Return what `allows` answers, [H, Q, K]."""
    head = torch.arange(context.heads)[:, None, None]
    return _answer(pattern, context, head, queries[None, :, None], keys[None, None, :])


def _answer(pattern: Pattern, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(head.shape, query.shape, key.shape)
    asked = f"head {list(head.shape)}, query {list(query.shape)} and key {list(key.shape)}"
    try:
        allowed = pattern.allows(context, head, query, key)
    except ValueError:  # an option that is refused, in the pattern's own words
        raise
    except Exception as error:
        raise ValueError(
            f"{pattern} raises {type(error).__name__} in allows for {asked}: {error}; compute it by broadcasting"
        ) from error
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        got = f"a tensor of {allowed.dtype}" if isinstance(allowed, Tensor) else type(allowed).__name__
        raise ValueError(
            f"{pattern} returns {got} from allows; return a bool tensor, True = may attend, as comparisons give it"
        )
    try:
        return allowed.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{pattern} returns shape {list(allowed.shape)} from allows for {asked}; return a shape that broadcasts to "
            f"{list(shape)}"
        ) from None


def _check_tile(pattern: Pattern, context: Context, whole: Tensor) -> None:
    """Ask for blocks of keys per head, the way tiles are checked: four dimensions, other keys for every head."""
    head = torch.arange(context.heads)[:, None, None, None]
    query = torch.arange(2 * _CORNER).view(1, 2, _CORNER, 1)
    key = ((torch.arange(2) + head[..., 0, :]) * _CORNER % 64).flatten(1)[:, :, None, None] + torch.arange(
        _CORNER
    )
    allowed = _answer(pattern, context, head, query, key)
    if not torch.equal(allowed, whole[head, query, key]):
        raise ValueError(
            f"{pattern} answers otherwise when asked for head {list(head.shape)}, query {list(query.shape)} and key "
            f"{list(key.shape)} than for {_TOKENS} x {_TOKENS} positions at once; compute allows from head, query and "
            f"key by broadcasting, without fixed dimensions"
        )


def _check_parts(pattern: Pattern, context: Context, whole: Tensor) -> None:
    parts = pattern.parts(context)
    if parts is None:
        return
    seen = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool)
    seen = seen.tril() if context.causal else seen
    wanted = (whole | torch.eye(_TOKENS, dtype=torch.bool)) & seen
    if differ := torch.nonzero(parts_mask(parts, context.heads, _TOKENS) & seen != wanted).tolist():
        head, q, k = differ[0]
        does, says = ("miss", "allows") if wanted[head, q, k] else ("hold", "does not allow")
        raise ValueError(
            f"{pattern} has parts that {does} query {q} and key {k} of head {head}, which allows {says}; make parts "
            f"equal to allows (and hold every token itself), or leave parts out"
        )
