"""Plans of every registered pattern, of unions, and of patterns per head and per layer, with random options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns.definitions import LAYERS, LEAVES, OPTIONS, PATTERNS, POSITIONS, named

from hf_sparse import (
    BigBird,
    GlobalTokens,
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    Strided,
    get_pattern,
)
from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint, make_plan

from .holding import check

positive = st.integers(1, 9)
CONSTRAINTS = st.one_of(
    st.builds(Constraint, causal=st.booleans(), window=st.none() | positive),
    st.builds(Constraint, causal=st.booleans(), chunk=positive),
)


def check_drawn(data, pattern):
    """Check one plan of any shape for the pattern."""
    heads = data.draw(st.integers(1, 6), label="heads")
    try:
        pattern.check_fit(heads, LAYERS)
    except ValueError:
        heads = 3
    q_len = data.draw(st.sampled_from([1, 1, 2, 5, 14]), label="queries")
    k_len = q_len + data.draw(st.integers(0, 12), label="keys before them")
    first = data.draw(st.sampled_from([0, 0, 1, 7]), label="first")
    chosen = tuple(sorted(data.draw(st.sets(st.integers(0, k_len + first), max_size=3), label="chosen")))
    constraint = data.draw(CONSTRAINTS, label="constraint")
    layer = data.draw(st.integers(0, LAYERS - 1), label="layer")
    check(pattern, constraint, q_len, k_len, first, heads, layer, chosen)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", static_patterns())
def test_plan_of_a_pattern_with_any_options(name, data):
    check_drawn(data, data.draw(named(name), label="pattern"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_plan_of_any_composition(data):
    check_drawn(data, data.draw(PATTERNS, label="pattern"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_plan_of_a_pattern_per_head(data):
    uniform = LEAVES.filter(
        lambda p: not any(isinstance(getattr(p, f, 0), tuple) for f in ("dilation", "window"))
    )
    patterns = data.draw(st.lists(uniform, min_size=6, max_size=6), label="per head")
    heads = data.draw(st.integers(1, 6), label="heads")
    q_len, behind = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    chosen = tuple(data.draw(POSITIONS.map(set).map(sorted)))
    check(
        PerHead(tuple(patterns)),
        Constraint(data.draw(st.booleans())),
        q_len,
        q_len + behind,
        2,
        heads,
        1,
        chosen,
    )


def test_every_registered_pattern_has_a_strategy():
    assert set(OPTIONS) == set(static_patterns())


def of(name, **options):
    return get_pattern(name, **options)


@pytest.mark.parametrize(
    ("pattern", "causal", "pieces"),
    [
        (of("block_local", block=8, neighbours=1), True, 1),
        (of("block_local", block=8, neighbours=1), False, 1),
        (of("shifted", group=8), True, 2),  # one for each half of the heads
        (of("sparse_transformer_fixed", block=8, summary=2), True, 2),
        (of("sparse_transformer_fixed", block=8, summary=2), False, 3),
        (of("sparse_transformer_strided", stride=8), True, 2),
        (of("sparse_transformer_strided", stride=8), False, 3),
        (of("atrous", stride=8), True, 1),
        (of("atrous_local", stride=8), True, 2),
        (of("dilated_window", window=4, dilation=3), True, 1),
        (of("dilated_window", window=4, dilation=3), False, 1),
        (of("multi_scale", window=4, scales=3), True, 3),
        (of("multi_scale", window=4, scales=3), False, 5),
        (of("longformer", window=5, global_tokens=(0, 20, 31)), True, 2),
        (of("longformer", window=5, global_tokens=(0, 20, 31)), False, 4),
        (of("longformer", window=5, global_tokens=()), False, 1),
        (of("global_tokens", positions=(0, 9)), True, 2),
        (of("global_tokens", positions=(0, 9)), False, 4),
        (of("sinks", sinks=2), True, 2),
        (of("streaming_llm", sinks=2, window=5), False, 2),
        (of("grouped_heads", window=5), True, 3),  # a window; columns, and the token itself
        (of("bigbird", block=4, random_blocks=0), True, 2),
        (of("bigbird", block=4, random_blocks=1), True, 3),
        (of("random", keys_per_query=2), True, 2),
    ],
    ids=str,
)
def test_a_pattern_is_a_handful_of_pieces(pattern, causal, pieces):
    plan = make_plan(pattern, Constraint(causal), 60, 60, heads=2)
    drawn = pattern.name in ("random", "bigbird") and getattr(pattern, "random_blocks", 1) > 0
    assert plan.n_pieces == pieces
    assert sum(len(group.tiles) for group in plan.groups) == drawn


def test_drawn_patterns_of_different_heads_are_planned_as_drawn():
    """Not by asking a predicate: each head has lists of its own, of the blocks that it drew."""
    patterns = (
        Random(keys_per_query=3),
        Random(blocks=2, block=8),
        BigBird(block=16),
        Random(keys_per_query=5),
    )
    plan = check(PerHead(patterns), Constraint(), 100, 100, heads=4)
    sizes = [(tile.query_block, tile.lists.shape[2]) for group in plan.groups for tile in group.tiles]
    assert sizes == [(1, 3), (8, 2), (16, 3), (1, 5)]
    assert check(PerHead(patterns), Constraint(), 1, 100, heads=4).reads is not None


@pytest.mark.parametrize("causal", [True, False])
def test_a_union_of_drawn_patterns_leaves_out_what_the_first_drew(causal):
    pattern = Random(keys_per_query=9) | BigBird(block=8) | Random(blocks=3, block=4, seed=5)
    plan = check(pattern, Constraint(causal), 90, 90, heads=3, layer=1)
    assert len(plan.groups[0].tiles) == 3
    check(pattern, Constraint(causal), 1, 90, heads=3, layer=1)
    check(pattern, Constraint(causal, window=20), 30, 61, first=5, heads=3)


def test_a_whole_drawn_tile_needs_no_mask_beside_rows_that_see_everything():
    plan = check(BigBird(block=8), Constraint(causal=False), 160, 160, heads=2)
    (tiles,) = plan.groups[0].tiles
    assert not tiles.masked.any()
    # A chosen query in the middle of a block: its block alone is masked.
    plan = check(BigBird(block=8) | GlobalTokens((75,)), Constraint(causal=False), 160, 160, heads=2)
    assert plan.groups[0].tiles[0].masked.nonzero()[0].tolist().count(75 // 8) == 1


def test_positions_beyond_the_sequence_change_nothing():
    pattern = Longformer(window=3, global_tokens=(2, 50, 10**9)) | Strided(10**12)
    plan = check(pattern, Constraint(False), 20, 20)
    assert (
        plan.pairs
        == make_plan(Longformer(window=3, global_tokens=(2,)), Constraint(False), 20, 20, heads=2).pairs
    )
    check(SlidingWindow(2**40), Constraint(), 20, 20)


def test_a_step_through_two_coprime_strides_asks_only_for_their_keys(monkeypatch):
    import hf_sparse.plan.step as step

    asked, original = [], step._allowed
    monkeypatch.setattr(step, "_allowed", lambda *a: asked.append(len(a[-1])) or original(*a))
    n = 1_000_003
    plan = make_plan(Strided(1000) | Strided(999), Constraint(), 1, n, heads=1)
    query = torch.tensor([n - 1])
    key = torch.arange(n)
    assert plan.pairs == int((((query - key) % 1000 == 0) | ((query - key) % 999 == 0)).sum())
    assert sum(asked) <= n // 999 + 1
