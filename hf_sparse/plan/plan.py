"""The plan of one attention call: disjoint pieces and tiles that hold exactly the allowed pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from ..patterns.base import Context, Pattern
from ..patterns.parts import Bound, Drawn, Every, Part
from .columns import check_columns, check_drawn, held_pieces, in_slots
from .constraint import Constraint
from .intervals import Interval, Leftover, disjoint
from .pieces import Piece, pieces_of
from .segments import Columns
from .step import Reads, by_head, reads_of
from .tiles import Predicate, Tiles, drawn_tiles, tiles_of


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """What the query heads `heads` see; they all see the same, but for drawn blocks.

    pieces, tiles: disjoint; together exactly the allowed pairs.
    n_pieces: intervals (a family counts once) and tile lists that hold at least one pair.
    """

    heads: tuple[int, ...]
    pieces: tuple[Piece, ...]
    tiles: tuple[Tiles, ...]
    n_pieces: int

    @cached_property
    def pairs(self) -> int:
        """Allowed pairs, summed over the heads."""
        return len(self.heads) * sum(p.pairs for p in self.pieces) + sum(t.pairs for t in self.tiles)


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one sequence: queries are the last `q_len` of `k_len` keys, which begin at position `first`.

    columns: earlier positions held in the first slots, before those that begin at `first`; None where there are none.
    reads: for a single query, what it reads; None for more.
    make_groups: gives `groups`, when they are asked for: a single query is served by `reads` alone.
    """

    heads: int
    q_len: int
    k_len: int
    first: int
    constraint: Constraint
    make_groups: Callable[[], tuple[HeadPlan, ...]]
    reads: tuple[Reads, ...] | None = None
    columns: Columns | None = None

    @cached_property
    def groups(self) -> tuple[HeadPlan, ...]:
        """The heads, each in exactly one group."""
        return self.make_groups()

    @cached_property
    def n_pieces(self) -> int:
        """Intervals, families and tile lists that hold at least one pair, over all groups."""
        return sum(own.n_pieces for own in self.reads or self.groups)

    @cached_property
    def pairs(self) -> float:
        """Allowed pairs per head, the mean where heads differ."""
        return sum(own.pairs for own in self.reads or self.groups) / self.heads

    @cached_property
    def dense_pairs(self) -> int:
        """The pairs per head that dense attention has under the same constraint, tokens no longer held included."""
        end = self.first + self.k_len - (0 if self.columns is None else len(self.columns))
        return _dense_pairs(self.constraint, self.q_len, end)


def make_plan(
    pattern: Pattern,
    constraint: Constraint,
    q_len: int,
    k_len: int,
    *,
    heads: int,
    layer: int = 0,
    first: int = 0,
    chosen: tuple[int, ...] = (),
    columns: Columns | None = None,
) -> Plan:
    """Return the plan for keys at positions first .. first + k_len; shared by all layers that ask for the same.

    chosen: positions that are global in this sequence.
    columns: earlier positions, held in the first of the `k_len` slots; the others then hold positions from `first` on.
        Every key that a query may see is held, and those of a stride relative to the query lie in the tail.

    Raises:
        ValueError: columns with a constraint that is not causal, with a query among them, or under drawn blocks, whose
            keys may all be wanted again; or a pattern that selects by content, of which only a part has a plan.
    """
    if pattern.content_based:
        raise ValueError(f"{pattern} selects by content; divide it first with hf_sparse.selectors.divided")
    if columns is not None and not len(columns):
        columns = None
    if columns is not None:
        check_columns(columns, constraint, q_len, k_len, first)
    context = constraint.context(pattern, layer=layer, heads=heads, length=first + k_len, chosen=chosen)
    parts = _parts(pattern, context)
    if parts is None:
        return _plan_predicate(pattern, context, constraint, q_len, k_len, first, columns)
    if columns is not None:
        check_drawn(parts, columns)
    make = _plan_step if q_len == 1 else _plan_parts
    return make(parts, constraint, q_len, k_len, heads, first, columns)


@lru_cache(maxsize=256)
def _parts(pattern: Pattern, context: Context) -> tuple[Part, ...] | None:
    parts = pattern.parts(context)
    return None if parts is None else tuple(parts)


@lru_cache(maxsize=256)
def _plan_parts(
    parts: tuple[Part, ...],
    constraint: Constraint,
    q_len: int,
    k_len: int,
    heads: int,
    first: int,
    columns: Columns | None,
) -> Plan:
    def groups() -> tuple[HeadPlan, ...]:
        return tuple(
            _head_plan(numbers, own, constraint, q_len, k_len, first, columns)
            for numbers, own in by_head(parts, heads)
        )

    return Plan(heads, q_len, k_len, first, constraint, groups, columns=columns)


@lru_cache(maxsize=32)  # the next step has another plan, and the lists of one may be long
def _plan_step(
    parts: tuple[Part, ...],
    constraint: Constraint,
    q_len: int,
    k_len: int,
    heads: int,
    first: int,
    columns: Columns | None,
) -> Plan:
    reads = reads_of(parts, constraint, k_len, heads, first, columns)
    return replace(_plan_parts(parts, constraint, q_len, k_len, heads, first, columns), reads=reads)


def _head_plan(
    heads: tuple[int, ...],
    parts: tuple[Part, ...],
    constraint: Constraint,
    q_len: int,
    k_len: int,
    first: int,
    columns: Columns | None,
) -> HeadPlan:
    starts, stops = constraint.bounds()
    intervals, leftovers = _disjoint(parts)
    pieces: list[Piece] = []
    tiles: list[Tiles] = []
    n_pieces = 0
    for interval in intervals:
        clipped = replace(interval, starts=(*interval.starts, *starts), stops=(*interval.stops, *stops))
        if columns is None:
            found = pieces_of(clipped, q_len, k_len, first)
        else:
            found = held_pieces(clipped, q_len, k_len, first, columns)
        if found is None:
            leftovers = [*leftovers, Leftover(interval)]
            continue
        found = [piece for piece in found if piece.holds_pairs]
        pieces += found
        n_pieces += bool(found)
    for leftover in leftovers:

        def allowed(head: Tensor, query: Tensor, key: Tensor, leftover: Leftover = leftover) -> Tensor:
            return leftover.allowed(head, query, key) & constraint.admits(query, key)

        bounds = (*leftover.interval.starts, *starts), (*leftover.interval.stops, *stops)
        if isinstance(leftover.interval.keys, Drawn):
            tile = drawn_tiles(leftover, allowed, bounds, heads, q_len, k_len, first)
        else:
            tile = _tiles(allowed, heads, q_len, k_len, first, columns, bounds)
        if tile.pairs:
            tiles.append(tile)
            n_pieces += 1
    return HeadPlan(heads, tuple(pieces), tuple(tiles), n_pieces)


@lru_cache(maxsize=32)
def _plan_predicate(
    pattern: Pattern,
    context: Context,
    constraint: Constraint,
    q_len: int,
    k_len: int,
    first: int,
    columns: Columns | None,
) -> Plan:
    def allowed(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return constraint.allowed(pattern, context, head, query, key)

    def groups() -> tuple[HeadPlan, ...]:
        tile = _tiles(allowed, heads, q_len, k_len, first, columns, constraint.bounds())
        return (HeadPlan(heads, (), (tile,), 1),)

    heads = tuple(range(context.heads))
    return Plan(len(heads), q_len, k_len, first, constraint, groups, columns=columns)


def _tiles(
    allowed: Predicate,
    heads: tuple[int, ...],
    q_len: int,
    k_len: int,
    first: int,
    columns: Columns | None,
    bounds: tuple[tuple[Bound, ...], tuple[Bound, ...]],
) -> Tiles:
    if columns is None:
        return tiles_of(allowed, heads, q_len, k_len, first, bounds)
    # Bounds are positions: among slots they say nothing.
    return tiles_of(in_slots(allowed, first, columns), heads, q_len, k_len, 0)


_disjoint = lru_cache(maxsize=256)(disjoint)


@lru_cache(maxsize=256)
def _dense_pairs(constraint: Constraint, q_len: int, k_len: int) -> int:
    pieces = pieces_of(Interval(Every(), *constraint.bounds()), q_len, k_len, 0)
    assert pieces is not None
    return sum(piece.pairs for piece in pieces)
