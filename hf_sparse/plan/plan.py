"""The plan of one attention call: disjoint pieces and tiles that hold exactly the allowed pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from ..patterns.base import Context, Pattern
from ..patterns.parts import Every, Part
from .constraint import Constraint
from .intervals import Interval, Leftover, disjoint
from .pieces import Piece, pieces_of
from .tiles import Tiles, tiles_of


@dataclass(frozen=True, eq=False)
class Plan:
    """The pieces of one sequence: queries are the last `q_len` of `k_len` keys.

    pieces, tiles: disjoint; together exactly the allowed pairs.
    n_pieces: intervals (a family counts once) and tile lists that hold at least one pair.
    pairs: allowed pairs per head, the mean where heads differ.
    dense_pairs: the pairs dense attention has under the same constraint.
    """

    heads: int
    q_len: int
    k_len: int
    pieces: tuple[Piece, ...]
    tiles: tuple[Tiles, ...]
    n_pieces: int
    pairs: float
    dense_pairs: int


def make_plan(
    pattern: Pattern,
    constraint: Constraint,
    q_len: int,
    k_len: int,
    *,
    heads: int,
    layer: int = 0,
    first: int = 0,
) -> Plan:
    """Return the plan for keys at positions first .. first + k_len; shared by all layers that ask for the same."""
    layer = layer if pattern.per_layer else 0  # one plan for all layers
    parts = pattern.parts(Context(constraint.causal, layer if pattern.per_layer else None))
    if parts is None:
        return _plan_predicate(pattern, constraint, q_len, k_len, heads, layer, first)
    return _plan_parts(tuple(parts), constraint, q_len, k_len, heads, first)


@lru_cache(maxsize=256)
def _plan_parts(
    parts: tuple[Part, ...], constraint: Constraint, q_len: int, k_len: int, heads: int, first: int
) -> Plan:
    starts, stops = constraint.bounds()
    intervals, leftovers = _disjoint(parts)
    pieces: list[Piece] = []
    tiles: list[Tiles] = []
    n_pieces, pairs = 0, 0.0
    for interval in intervals:
        clipped = replace(interval, starts=(*interval.starts, *starts), stops=(*interval.stops, *stops))
        found = pieces_of(clipped, q_len, k_len, first)
        if found is None:
            leftovers = [*leftovers, Leftover(interval)]
            continue
        found = [piece for piece in found if piece.pairs]
        pieces += found
        n_pieces += bool(found)
        pairs += sum(piece.pairs for piece in found)
    for leftover in leftovers:

        def allowed(head: Tensor, query: Tensor, key: Tensor, leftover: Leftover = leftover) -> Tensor:
            return leftover.allowed(query, key) & constraint.admits(query, key)

        tile = tiles_of(allowed, heads, q_len, k_len, first)
        if tile.pairs:
            tiles.append(tile)
            n_pieces += 1
            pairs += tile.pairs / heads
    dense = _dense_pairs(constraint, q_len, k_len, first)
    return Plan(heads, q_len, k_len, tuple(pieces), tuple(tiles), n_pieces, pairs, dense)


@lru_cache(maxsize=32)
def _plan_predicate(
    pattern: Pattern, constraint: Constraint, q_len: int, k_len: int, heads: int, layer: int, first: int
) -> Plan:
    def allowed(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return constraint.allowed(pattern, layer, head, query, key)

    tile = tiles_of(allowed, heads, q_len, k_len, first)
    dense = _dense_pairs(constraint, q_len, k_len, first)
    return Plan(heads, q_len, k_len, (), (tile,), 1, tile.pairs / heads, dense)


_disjoint = lru_cache(maxsize=256)(disjoint)


@lru_cache(maxsize=256)
def _dense_pairs(constraint: Constraint, q_len: int, k_len: int, first: int) -> int:
    starts, stops = constraint.bounds()
    pieces = pieces_of(Interval(Every(), tuple(starts), tuple(stops)), q_len, k_len, first)
    assert pieces is not None
    return sum(piece.pairs for piece in pieces)
