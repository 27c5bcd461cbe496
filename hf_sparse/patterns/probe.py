"""A short trial of a pattern before a model runs it: what `allows` and `parts` return on a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from .base import Context, Pattern
from .parts import Bound, Drawn, Every, Keys, Listed, Part, Periodic, Residue
from .sampling import is_drawn

_TOKENS = 70  # not a multiple of any block size in use
_CORNER = 16
_FAR = (0, 1, 5, 18, 300, 301, 1000, 5000)  # few, as a pattern may have a lot to compute for each


def check_predicate(pattern: Pattern, heads: int, causal: bool, layers: int = 1) -> None:
    """Raise ValueError where `pattern`, or a pattern it is made of, does not answer as `Pattern.allows` says.

    Asked again in smaller and larger company, it must give every pair of positions the same answer: one that looks at
    what else is asked would let later tokens change earlier rows, and decoding differ from one pass. What changes with
    time or with the number of calls, a short trial cannot always see.

    heads, layers: query heads and layers of the model.
    """
    for layer in range(layers) if pattern.per_layer else (None,):
        chosen = (1, _CORNER + 3) if pattern.takes_globals else ()
        context = Context(causal, layer, heads, None if causal else _TOKENS, chosen)
        parts = _parts(pattern, context)
        if parts is not None and layer and layer < layers - 1:
            continue  # parts cannot look at other positions: the first layer and the last stand for all
        whole = _check_pairs(pattern, context)
        if parts is None:
            _check_far(pattern, context)
        else:
            _check_parts(pattern, context, parts, whole)
    if not pattern.members:
        _check_declared(pattern, heads, causal)
    for member in pattern.members:
        check_predicate(member, heads, causal, layers)


def _check_pairs(pattern: Pattern, context: Context) -> Tensor:
    """Return what `allows` answers for all pairs, after asking for some of them again in smaller company."""
    everything = torch.arange(_TOKENS)
    whole = _asked(pattern, context, everything, everything)
    few, one = torch.arange(_CORNER), torch.arange(_TOKENS - 3, _TOKENS - 2)
    for queries, keys in [(few, few), (one, everything), (one, few), (few, one), (everything, everything)]:
        alone = _asked(pattern, context, queries, keys)
        _check_same(pattern, alone, whole[:, queries][:, :, keys], queries, keys, _TOKENS)
    _check_tile(pattern, context, whole)
    return whole


def _check_far(pattern: Pattern, context: Context) -> None:
    """Ask whether later positions, far behind, change the answer for early ones."""
    far = torch.tensor(_FAR)
    context = replace(context, length=None if context.causal else int(far[-1]) + 1)
    try:
        whole = _asked(pattern, context, far, far)
    except ValueError as refused:
        if isinstance(refused.__cause__, (IndexError, RuntimeError)):
            return  # it has a table of so many positions; sequences that are longer will say so
        raise
    for count in range(1, len(far)):
        near = far[:count]
        _check_same(
            pattern, _asked(pattern, context, near, near), whole[:, :count, :count], near, near, len(far)
        )


def _check_same(
    pattern: Pattern, alone: Tensor, among: Tensor, queries: Tensor, keys: Tensor, company: int
) -> None:
    if differ := torch.nonzero(alone != among).tolist():
        head, q, k = differ[0]
        raise ValueError(
            f"{pattern} answers {bool(alone[head, q, k])} for query {int(queries[q])} and key {int(keys[k])} when "
            f"asked about {len(queries)} x {len(keys)} positions, and {not alone[head, q, k]} among {company} x "
            f"{company}; allows must look at each pair alone, not at shapes, maxima or other positions, and give the "
            f"same answer every time"
        )


def _check_declared(pattern: Pattern, heads: int, causal: bool) -> None:
    """Refuse a pattern that looks at the layer or the chosen positions, which it is told only if it says that it does.

    It is asked with and without them; a pattern that does not look answers the same.
    """
    told = Context(causal, None, heads, None if causal else _TOKENS)
    asked: list[tuple[str, str, Any]] = []
    if not pattern.per_layer:
        asked += [("layer", "per_layer", replace(told, layer=layer)) for layer in (0, 1)]
    if not pattern.takes_globals:
        layer = 0 if pattern.per_layer else None
        asked += [
            ("chosen", "takes_globals", replace(told, layer=layer, chosen=chosen)) for chosen in ((), (1, 9))
        ]
    few = torch.arange(_CORNER)
    for (name, declared, first), (_, _, second) in zip(asked[::2], asked[1::2], strict=True):
        try:
            before, again, other = (_asked(pattern, c, few, few) for c in (first, first, second))
        except ValueError:  # said in better words when it is asked as a model asks
            continue
        if torch.equal(before, again) and not torch.equal(before, other):
            raise ValueError(
                f"{pattern} looks at context.{name} without saying so; set {declared} = True in its class"
            )


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
        cure = "compute it by broadcasting, or refuse its options in __post_init__"
        if "NoneType" in str(error):
            cure = "context.layer is None without per_layer = True, context.length is None in causal models"
        elif isinstance(error, LookupError):
            cure = f"check the length of its lists, {context.heads} heads and layer {context.layer or 0} are asked for"
        raise ValueError(
            f"{pattern} raises {type(error).__name__} in allows for {asked}: {error}; {cure}"
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


def _parts(pattern: Pattern, context: Context) -> Sequence[Part] | None:
    """Return the parts of a pattern; raise ValueError where they are not what `Pattern.parts` says."""
    try:
        parts = pattern.parts(context)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{pattern} raises {type(error).__name__} in parts: {error}; correct it, or leave parts out"
        ) from error
    if parts is None:
        return None
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Part) for part in parts):
        raise ValueError(f"{pattern} returns {parts!r} from parts; return a list of Part, or None")
    for part in parts:
        if fault := _fault(part, context.heads):
            raise ValueError(f"{pattern} has the part {part}, whose {fault}; correct it, or leave parts out")
    return parts


def _fault(part: Part, heads: int) -> str:
    """Return what is wrong with a part, "" where nothing is."""
    if not isinstance(part.keys, get_args(Keys)):
        return "keys are none of those in hf_sparse.patterns.parts"
    for listed in (part.keys, part.queries):
        if isinstance(listed, Listed) and any(a >= b for a, b in pairwise(listed.positions)):
            return "positions do not increase"
    for bound in (part.start, part.stop):
        if bound is not None and (bound.mul < 0 or bound.div < 1):
            return "bounds decrease"
    if part.queries is not None and (part.keys, part.start, part.stop) != (Every(), None, None):
        return "queries do not see every key"
    if part.heads is not None and (
        any(a >= b for a, b in pairwise(part.heads)) or not {*part.heads} <= {*range(heads)}
    ):
        return f"heads are not ascending numbers below {heads}"
    return ""


def _check_parts(pattern: Pattern, context: Context, parts: Sequence[Part], whole: Tensor) -> None:
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
