"""The kept share of sampled queries against the weights of the reference, pair by pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_sparse.backends import Call, attend
from hf_sparse.backends.mass import kept_masses, sample_queries
from hf_sparse.backends.selected import select_all, selected_of
from hf_sparse.patterns import PerHead, PerLayer
from hf_sparse.patterns.full import Full
from hf_sparse.patterns.global_tokens import GlobalTokens
from hf_sparse.patterns.longformer import Longformer
from hf_sparse.patterns.sliding_window import SlidingWindow
from hf_sparse.patterns.strided import Strided
from hf_sparse.plan import Constraint, Segments
from hf_sparse.plan.segments import Columns, Segment
from hf_sparse.selectors import BlockIndex, divided
from hf_sparse.selectors.quest import Quest
from hf_sparse.selectors.topk_blocks import TopKBlocks

PATTERNS = [
    Full(),
    Longformer(window=11, global_tokens=(0, 20)),
    TopKBlocks(keep=4, block=4, query_block=2, local=0),
    Quest(keep=0.3, block=4, dense_layers=0) | Strided(5),
]
LEFT = torch.zeros(3, 60, dtype=torch.long)
LEFT[1:, :13] = -1
PACKED = torch.arange(60).expand(3, -1) // 25
HOLES = torch.zeros(3, 60, dtype=torch.long)
HOLES[0, 20:33], HOLES[2, 5:9:2] = -1, -1


def drawn(q_len=60, k_len=60, heads=4, kv_heads=2):
    torch.manual_seed(0)
    return torch.randn(3, heads, q_len, 8, dtype=torch.float64), torch.randn(
        3, kv_heads, k_len, 8, dtype=torch.float64
    )


def weights(query, key, call, segments, sinks=None, selections=None):
    """Return what the reference weighs, [B, H, Q, K]."""
    one_hot = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return attend(query, key, one_hot, call, segments, "reference", None, sinks, selections)


def check(query, key, call, segments, count=7, sinks=None, selections=None):
    """Compare with the reference and return the samples."""
    heads, q_len = query.shape[1:3]
    samples = sample_queries(query, key, call, segments, count, np.random.default_rng(1), sinks)
    division = divided(call.pattern, call.layer)
    selected = None
    if division.selector is not None:
        if selections is None:
            selections = select_all(division.selector, query, key, segments, call.constraint)
        selected = selected_of(division, call, segments, selections, heads, q_len)
    found = kept_masses(samples, replace(call, pattern=division.static), heads, selected)
    dense = weights(query, key, replace(call, pattern=Full()), segments, sinks)
    read = weights(query, key, call, segments, sinks, selections) > 0
    want = (dense * read).sum(-1) / dense.sum(-1)
    masses = iter(found)
    for segment, sample in zip(segments.entries, samples, strict=True):
        if sample is None:
            continue
        at = torch.arange(q_len)[segment.queries(q_len, segments.k_len)]
        own = at[sample.positions - (segment.end - len(at))]
        slots = torch.arange(segments.k_len)[segment.slots]
        torch.testing.assert_close(sample.weights, dense[segment.rows][:, :, own][..., slots])
        torch.testing.assert_close(next(masses), want[segment.rows][:, :, own])
        assert len(own) == min(count, len(at)) and (sample.positions.diff() > 0).all()
    assert not list(masses)
    return samples


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"constraint": Constraint(window=23)},
        {"constraint": Constraint(chunk=16)},
        {"softcap": 2.0, "scale": 0.7},
    ],
    ids=str,
)
def test_what_the_reference_weighs(pattern, extra):
    check(*drawn(), Call(pattern, **extra), Segments.whole(3, 60))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("labels", [LEFT, PACKED, HOLES], ids=["left", "packed", "holes"])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 3, 4)], ids=["no sinks", "sinks"])
def test_padding_packing_and_sinks(pattern, labels, sinks):
    check(*drawn(), Call(pattern), Segments.from_labels(labels), sinks=sinks)


def test_heads_layers_and_global_tokens_of_a_call():
    chosen = torch.zeros(3, 60, dtype=torch.bool)
    chosen[0, 20], chosen[1, 33] = True, True
    segments = Segments.whole(3, 60).choose(chosen)
    check(*drawn(), Call(Longformer(window=7)), segments)
    heads = PerHead((SlidingWindow(3), Strided(4), SlidingWindow(9), Full()))
    check(*drawn(), Call(heads), Segments.whole(3, 60))
    layers = PerLayer((Full(), SlidingWindow(4) | GlobalTokens(positions=(5,))))
    check(*drawn(), Call(layers | Strided(7), layer=1), Segments.whole(3, 60))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_some_queries_of_more_keys(pattern):
    query, key = drawn()
    segments = Segments.from_labels(LEFT)
    selector = divided(pattern, 0).selector
    selections = None
    if selector is not None:
        indexes = [BlockIndex(selector) for _ in segments.entries]
        earlier = Segments.from_labels(LEFT[:, :49])
        select_all(selector, query[:, :, :49], key[:, :, :49], earlier, Constraint(), indexes)
        selections = select_all(selector, query[:, :, 49:], key, segments, Constraint(), indexes)
    check(query[:, :, 49:], key, Call(pattern), segments, selections=selections)


def test_all_queries_where_there_are_no_more_and_both_sides_of_an_encoder():
    segments = Segments.whole(3, 60)
    (sample,) = check(*drawn(), Call(SlidingWindow(5), Constraint(causal=False)), segments, count=99)
    assert sample.positions.tolist() == list(range(60))


def test_half_precision_is_measured_in_single_also_under_autocast():
    query, key = (x.bfloat16() for x in drawn())
    call, segments = Call(SlidingWindow(5)), Segments.whole(3, 60)
    (want,) = sample_queries(query.float(), key.float(), call, segments, 5, np.random.default_rng(0))
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = sample_queries(query, key, call, segments, 5, np.random.default_rng(0))
    assert got.weights.dtype == torch.float32
    torch.testing.assert_close(got.weights, want.weights)


@pytest.mark.parametrize("window, known", [(None, 0), (23, 4)])
def test_queries_of_keys_that_a_cache_has_dropped_are_not_drawn(window, known):
    """Of positions 0, 1, 2 and 70 .. 99 are held: a query of 96 .. 99 with the model's own window misses nothing."""
    query, key = drawn(4, 33)
    segment = Segment(slice(0, 3), slice(0, 33), 70, columns=Columns(np.arange(3)))
    call = Call(SlidingWindow(9), Constraint(window=window))
    (sample,) = sample_queries(query, key, call, Segments(3, 33, (segment,)), 9, np.random.default_rng(0))
    assert (0 if sample is None else len(sample.positions)) == known
    if sample is not None:
        torch.testing.assert_close(sample.weights.sum(-1), torch.ones_like(sample.weights.sum(-1)))
        (mass,) = kept_masses([sample], call, 4, None)
        torch.testing.assert_close(
            mass,
            sample.weights[..., -12:]
            .masked_fill((sample.positions[:, None] - torch.arange(88, 100)).abs() >= 9, 0)
            .sum(-1),
        )


def test_a_query_all_of_whose_mass_is_a_sinks_loses_nothing():
    query, key = drawn()
    sinks = torch.full((4,), 1e4)
    samples = sample_queries(
        query, key, Call(SlidingWindow(5)), Segments.whole(3, 60), 5, np.random.default_rng(0), sinks
    )
    (mass,) = kept_masses(samples, Call(SlidingWindow(5)), 4, None)
    assert (mass == 1).all()


def test_a_sequence_without_queries_has_no_sample():
    query, key = drawn(q_len=10)
    labels = torch.zeros(3, 60, dtype=torch.long)
    labels[1, 45:] = -1
    samples = check(query, key, Call(SlidingWindow(5)), Segments.from_labels(labels))
    assert [sample is None for sample in samples] == [False, True, False]
