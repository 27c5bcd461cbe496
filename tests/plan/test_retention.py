"""What a cache must hold is what the masks of all later queries show, and hardly more."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns.definitions import HEADS, LAYERS, PATTERNS, named

from hf_sparse import (
    BigBird,
    BlockLocal,
    DilatedWindow,
    Full,
    GlobalTokens,
    Longformer,
    Pattern,
    PerHead,
    Random,
    Shifted,
    Sinks,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    Strided,
    get_pattern,
)
from hf_sparse.patterns import static_patterns
from hf_sparse.patterns.parts import Drawn
from hf_sparse.plan import Constraint, cost
from hf_sparse.plan.retention import Retention

LENGTH, QUERIES = 24, 24 + 60  # windows of 8 keys with a dilation of 5 reach 40 tokens back, of 4 and 8 32
CONSTRAINTS = st.one_of(
    st.just(Constraint()),
    st.builds(Constraint, window=st.integers(1, 12)),
    st.builds(Constraint, chunk=st.integers(1, 12)),
)


def shown(pattern, constraint, layer, chosen):
    """Return whether key k may be seen, in any head, by query q: bool [QUERIES, LENGTH]."""
    query, key = torch.arange(QUERIES)[None, :, None], torch.arange(LENGTH)[None, None, :]
    context = constraint.context(pattern, layer=layer, heads=HEADS, length=QUERIES, chosen=chosen)
    head = torch.arange(HEADS)[:, None, None]
    allowed = constraint.allowed(pattern, context, head, query, key)
    return allowed.expand(HEADS, QUERIES, LENGTH).any(0).numpy()


def held(retention, n):
    """Return where the tail begins and which of n positions are held, bool [n]."""
    tail = retention.tail(n)
    early = retention.keeps(np.arange(tail), n)
    return tail, np.concatenate((early, np.ones(n - tail, dtype=bool)))


def check(pattern, constraint, layer, chosen=()):
    retention = Retention(pattern, constraint, HEADS, layer, chosen)
    allowed = shown(pattern, constraint, layer, chosen)
    for n in range(LENGTH + 1):
        seen = allowed[n:, :n].any(0)
        tail, kept = held(retention, n)
        assert 0 <= tail <= n
        assert not (seen & ~kept).any(), (
            f"{pattern} after {n}: {np.flatnonzero(seen & ~kept)} are needed and gone"
        )
        surplus = kept[:tail] & ~seen[:tail]
        assert not surplus.any(), f"{pattern} after {n}: nobody sees {np.flatnonzero(surplus)}"


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", static_patterns())
def test_what_later_queries_see_is_held(name, data):
    chosen = tuple(sorted(data.draw(st.sets(st.integers(0, LENGTH), max_size=3), label="chosen")))
    layer = data.draw(st.integers(0, LAYERS - 1), label="layer")
    check(data.draw(named(name), label="pattern"), data.draw(CONSTRAINTS, label="constraint"), layer, chosen)


@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, constraint=CONSTRAINTS, layer=st.integers(0, LAYERS - 1))
def test_what_later_queries_see_is_held_under_any_composition(pattern, constraint, layer):
    check(pattern, constraint, layer)


EXACT = [
    SlidingWindow(window=5),
    Sinks(2),
    StreamingLLM(sinks=2, window=4),
    StreamingLLM(sinks=2, window=4, positions="cache"),
    Longformer(window=3, global_tokens=(0, 7)),
    BlockLocal(block=4, neighbours=1),
    Shifted(group=6),
    SparseTransformerFixed(block=6, summary=2),
    Strided(stride=4, anchor="absolute"),
    Strided(stride=4),
    GlobalTokens(positions=(0, 5), ratio=0.25),
    DilatedWindow(window=3, dilation=3),
    PerHead((SlidingWindow(3), Strided(5, anchor="absolute"), StreamingLLM(sinks=1, window=2))),
    Full(),
]


@pytest.mark.parametrize("pattern", EXACT, ids=str)
def test_nothing_is_held_that_nobody_will_see(pattern):
    retention, allowed = Retention(pattern, Constraint(), HEADS), shown(pattern, Constraint(), 0, ())
    for n in range(LENGTH + 1):
        np.testing.assert_array_equal(held(retention, n)[1], allowed[n:, :n].any(0), err_msg=f"after {n}")


@pytest.mark.parametrize("pattern", [Random(keys_per_query=3), BigBird(block=4)], ids=str)
def test_keys_that_are_drawn_are_all_held(pattern):
    assert any(
        isinstance(part.keys, Drawn)
        for part in pattern.parts(Constraint().context(pattern, layer=0, heads=1, length=0))
    )
    assert Retention(pattern, Constraint(), HEADS).tail(LENGTH) == 0


def test_a_bare_predicate_holds_every_key_but_what_the_model_itself_hides():
    class Bare(Pattern):
        def allows(self, context, head, query, key):
            return query - key < 3

    assert Retention(Bare(), Constraint(), 1).tail(20) == 0
    assert not Retention(Bare(), Constraint(), 1).is_bounded


def test_a_token_that_may_yet_be_chosen_may_see_every_key():
    pattern = GlobalTokens(positions=(0,), global_queries=True)
    assert Retention(pattern, Constraint(), 1).tail(20) == 0
    assert not Retention(pattern, Constraint(), 1).is_bounded


def test_bounded_is_what_drops_keys():
    bounded = {str(p): Retention(p, Constraint(), HEADS).is_bounded for p in EXACT}
    assert [name for name, drops in bounded.items() if not drops] == [str(Strided(stride=4)), str(Full())]


@pytest.mark.parametrize("dilation", [2**36, 2**39])
def test_gaps_that_no_text_reaches_cost_nothing(dilation):
    retention = Retention(DilatedWindow(window=2, dilation=dilation), Constraint(), 1)
    assert retention.is_bounded and retention.tail(20) == 0
    assert retention.tail(3 * dilation + 7) == 2 * dilation + 7


def test_what_the_model_hides_is_not_held():
    window, chunk = Retention(Full(), Constraint(window=6), 1), Retention(Full(), Constraint(chunk=8), 1)
    assert [window.tail(n) for n in (3, 20)] == [0, 15] and [chunk.tail(n) for n in (7, 8, 21)] == [0, 8, 16]
    assert not Retention(StreamingLLM(2, 4), Constraint(window=6), 1).keeps(np.arange(2), 20).any()


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        (get_pattern("streaming_llm", sinks=4, window=100), 4 + 99),
        (get_pattern("dilated_window", window=20, dilation=3), 19 * 3),
        (get_pattern("strided", stride=10, anchor="absolute"), 100),
        (get_pattern("strided", stride=10), 1000),
        (get_pattern("sparse_transformer_fixed", block=50, summary=5), 20 * 5),
    ],
    ids=str,
)
def test_the_cost_of_a_pattern_tells_the_bytes_that_are_held(pattern, keys):
    told = cost(pattern, 1000, heads=4, kv_heads=2, head_dim=8, dtype_bytes=2)
    assert told.kv_bytes_held == keys * 2 * 2 * 8 * 2
    both = cost(
        pattern, 1000, constraint=Constraint(causal=False), heads=4, kv_heads=2, head_dim=8, dtype_bytes=2
    )
    assert both.kv_bytes_held == 1000 * 2 * 2 * 8 * 2
