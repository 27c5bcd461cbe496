"""Unions, patterns per head and per layer, and schedules: what they allow, show and refuse."""

import re

import pytest
import torch

from hf_sparse import (
    Full,
    GlobalTokens,
    Layered,
    Longformer,
    Pattern,
    PerHead,
    PerLayer,
    Random,
    SlidingWindow,
    Strided,
    Union,
)
from hf_sparse.patterns.base import Context

A, B = SlidingWindow(window=2), Strided(stride=3)


def test_union_is_flat_and_allows_what_any_member_allows():
    union = A | B | A
    assert union == Union((A, B)) and str(union) == f"{A} | {B}"
    assert torch.equal(union.mask(9), A.mask(9) | B.mask(9))
    with pytest.raises(ValueError, match="a union joins patterns, got str"):
        _ = A | "strided"
    with pytest.raises(ValueError, match="a union joins at least one pattern, got none"):
        Union.of()


def test_per_head_gives_every_head_its_own():
    pattern = PerHead([A, A, B])
    assert pattern == PerHead((A, A, B)) and pattern.members == (A, B)
    assert str(pattern) == f"per_head(0-1: {A}, 2: {B})"
    mask = pattern.mask(9, heads=3)
    assert torch.equal(mask, torch.cat([A.mask(9), A.mask(9), B.mask(9)]))
    assert [part.heads for part in pattern.parts(Context(heads=3))] == [(0, 1), (2,)]
    assert [part.heads for part in PerHead((A,) * 3).parts(Context(heads=3))] == [None]


def test_per_head_inside_per_head_speaks_of_both_heads():
    inner = PerHead((A, B, B)) | GlobalTokens()
    pattern = PerHead((inner, inner, A))
    heads = {(type(part.keys).__name__, part.heads) for part in pattern.parts(Context(heads=3))}
    assert ("Residue", (1,)) in heads and ("Listed", (0, 1)) in heads
    mask = pattern.mask(9, heads=3)
    assert torch.equal(mask[1], (B | GlobalTokens()).mask(9)[0]) and torch.equal(mask[2], A.mask(9)[0])


def test_per_layer_gives_every_layer_its_own():
    pattern = PerLayer([A, B, B])
    assert pattern.per_layer and str(pattern) == f"per_layer(0: {A}, 1-2: {B})"
    for layer, own in enumerate(pattern.patterns):
        assert torch.equal(pattern.mask(9, layer=layer), own.mask(9))
        assert pattern.parts(Context(layer=layer)) == own.parts(Context())


def test_what_a_member_declares_holds_for_the_whole():
    words = GlobalTokens(token_ids=(7, 3))
    for compose in (
        lambda p: p | A,
        lambda p: PerHead((A, p)),
        lambda p: PerLayer((p, A)),
        lambda p: Layered({0: p}),
    ):
        assert compose(words).takes_globals and compose(words).global_token_ids == (3, 7)
        assert not compose(B).takes_globals and compose(B).global_token_ids == ()
        assert compose(Random()).per_layer
    assert not PerHead((A, B)).per_layer and Longformer().takes_globals
    assert not Longformer().per_layer and Longformer(window=(2, 3)).per_layer


def test_chosen_positions_reach_every_member():
    pattern = PerLayer((PerHead((A, Longformer(window=2))),))
    mask = pattern.mask(9, heads=2, chosen=(4,))
    assert not mask[0, 8, 4] and mask[1, 8, 4] and mask[1, 8, 0]


class Bare(Pattern):
    def allows(self, context, head, query, key):
        return key == 0


def test_a_member_without_parts_leaves_the_whole_without():
    for pattern in (A | Bare(), PerHead((A, Bare())), PerLayer((Bare(),)), PerLayer((PerHead((A, Bare())),))):
        assert pattern.parts(Context(layer=0, heads=2)) is None
    assert PerLayer((Bare(), A)).parts(Context(layer=1)) == A.parts(Context())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PerHead(()), "PerHead joins at least one pattern, got none; name one"),
        (lambda: PerHead((A, "full")), "PerHead joins patterns, got str; use get_pattern(name) first"),
        (
            lambda: PerLayer("full"),
            "PerLayer takes a list of patterns, got 'full'; write [get_pattern(name), ...]",
        ),
        (lambda: PerLayer(7), "PerLayer takes a list of patterns, got 7"),
        (
            lambda: PerHead((A, B)).check_fit(heads=4, layers=1),
            "PerHead has 2 entries and the model has 4 query heads; give one entry per query head",
        ),
        (
            lambda: PerLayer((A, B)).check_fit(heads=4, layers=1),
            "PerLayer has 2 entries and the model has 1 layers; give one entry per layer",
        ),
        (lambda: (A | PerLayer((PerHead((A, B)),))).check_fit(3, 1), "PerHead has 2 entries"),
        (lambda: PerHead((A, B)).mask(4, heads=3), "PerHead has 2 entries and the model has 3 query heads"),
        (
            lambda: PerHead((A, B)).parts(Context(heads=3)),
            "PerHead has 2 entries and the model has 3 query heads",
        ),
        (lambda: PerLayer((A, B)).mask(4, layer=2), "PerLayer has 2 entries and the model has 3 layers"),
        (
            lambda: Longformer(window=(2, 3)).mask(4, layer=2),
            "window has 2 entries and the model has 3 layers",
        ),
        (
            lambda: Longformer(dilation=(1, 2)).mask(4, heads=3),
            "dilation has 2 entries and the model has 3 query",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_schedule_runs_each_range_and_leaves_the_rest_dense():
    schedule = Layered(layers={(0, 2): A, range(2, 8, 3): B, 3: "sliding_window"})
    assert schedule.layers == ((0, 2, A), (2, 3, B), (3, 4, SlidingWindow()), (5, 6, B))
    assert str(schedule) == f"layered(0-1: {A}, 2: {B}, 3: {SlidingWindow()}, 5: {B})"
    for layer, own in enumerate([A, A, B, SlidingWindow(), Full(), B, Full()]):
        assert torch.equal(schedule.mask(9, layer=layer), own.mask(9)), layer
    schedule.check_fit(heads=1, layers=6)


def test_one_layer_in_k_is_dense_the_last_of_each_k():
    schedule = Layered(pattern=A, dense_every=3)
    dense = [layer for layer in range(9) if torch.equal(schedule.mask(7, layer=layer), Full().mask(7))]
    assert dense == [2, 5, 8]
    assert Layered() == Layered(pattern="sliding_window", dense_every=4)
