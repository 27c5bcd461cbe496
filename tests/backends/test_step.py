"""Decoding: one query, or a few, after a cache equal the same rows of one pass, for every pattern."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import (
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    StreamingLLM,
    Strided,
    available_patterns,
    get_pattern,
)
from hf_sparse.backends import Call, attend
from hf_sparse.backends.pieces import function
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Constraint, Segment, Segments

from .cases import Shape, tensors


def of(name, **options):
    return get_pattern(name, **options)


class Predicate(Pattern):
    """A predicate alone, without parts: no step of its own."""

    def allows(self, context, head, query, key):
        return (query - key < 9 + head) | (key % 16 == 3)


PATTERNS = {
    "full": of("full"),
    "window": SlidingWindow(23),
    "window-1": SlidingWindow(1),
    "dilated": of("dilated_window", window=6, dilation=(1, 3, 2, 1)),
    "strided": of("strided", stride=5),
    "strided-absolute": of("strided", stride=9, anchor="absolute"),
    "atrous": of("atrous", stride=11),
    "atrous-local": of("atrous_local", stride=8),
    "blocks": of("block_local", block=16, neighbours=1),
    "shifted": of("shifted", group=12),
    "sparse-strided-split": of("sparse_transformer_strided", stride=6, heads="split"),
    "sparse-fixed": of("sparse_transformer_fixed", block=16, summary=3),
    "longformer": Longformer(9, (0, 7, 40, 400), dilation=(1, 1, 2, 2)),
    "global": of("global_tokens", positions=(1, 30), ratio=0.1, global_queries=True),
    "streaming": StreamingLLM(3, 12),
    "grouped-heads": of("grouped_heads", window=8),
    "multi-scale": of("multi_scale", window=4, scales=3),
    "layered": of("layered", layers={0: SlidingWindow(7)}),
    "bigbird": of("bigbird", block=8),
    "random": of("random", keys_per_query=6),
    "random-blocks": of("random", blocks=2, block=8),
    "two-strides": Strided(5) | Strided(7),
    "two-draws": Random(keys_per_query=4) | of("bigbird", block=8),
    "per-head": PerHead((SlidingWindow(9), Random(keys_per_query=3), Strided(4), Longformer(3, (0, 5)))),
    "predicate": Predicate(),
}


def test_every_registered_pattern_is_here():
    assert {p.name for p in PATTERNS.values()} >= set(available_patterns())


def decode(q, k, v, call, step, segments=None):
    """Return the output of queries taken `step` at a time, each with the keys up to them."""
    parts = []
    for start in range(0, k.shape[2], step):
        stop = min(start + step, k.shape[2])
        cached = None if segments is None else segments(stop)
        parts.append(attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], call, cached, "torch"))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_prefill_in_chunks_and_token_by_token_equal_one_pass(name, kv_heads):
    call = Call(PATTERNS[name])
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, kv_heads, 101, 101, v_width=5)))
    whole = attend(q, k, v, call, backend="torch")
    assert_close(whole, attend(q, k, v, call, backend="reference"), atol=1e-12, rtol=1e-12)
    for step in (1, 17, 64) if kv_heads == 2 else (1,):
        assert_close(decode(q, k, v, call, step), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["left", "holes", "chosen"])
@pytest.mark.parametrize("name", PATTERNS)
def test_padded_rows_decode_as_in_one_pass(name, kind):
    labels = torch.zeros(3, 61, dtype=torch.long)
    labels[0, :13] = -1
    if kind == "holes":
        labels[1, 20:25], labels[2, 40] = -1, -1
    chosen = torch.zeros(3, 61, dtype=torch.bool)
    if kind == "chosen":
        chosen[0, 30], chosen[1, 3], chosen[1, 4] = True, True, True

    def segments(stop):
        return Segments.from_labels(labels[:, :stop]).choose(chosen[:, :stop])

    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 61, 61, batch=3)))
    # Chosen keys to come must not change what was: they are global from the first step on that holds them.
    call = Call(PATTERNS[name])
    want = attend(q, k, v, call, segments(61), "reference")
    assert_close(decode(q, k, v, call, 1, segments), want, atol=1e-12, rtol=1e-12)
    assert (want[0, :, :13] == 0).all()


@pytest.mark.parametrize("first", [1, 30, 1000])
@pytest.mark.parametrize("name", PATTERNS)
def test_steps_after_a_cache_that_dropped_its_first_tokens(name, first):
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 3, 40)))
    segments = Segments(
        2, 40, (Segment(slice(0, 1), slice(0, 40), first), Segment(slice(1, 2), slice(5, 40), 2))
    )
    for constraint in (Constraint(), Constraint(window=14), Constraint(chunk=16), Constraint(causal=False)):
        call = Call(PATTERNS[name], constraint)
        for queries in (q, q[:, :, -1:]):
            want = attend(queries, k, v, call, segments, "reference")
            assert_close(attend(queries, k, v, call, segments, "torch"), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "predicate"])
def test_a_step_reads_the_keys_of_its_plan_only(name, monkeypatch):
    """Keys that the query may not see hold nan; the step, not the pieces, computes it."""
    monkeypatch.setattr(function._Attention, "apply", None)
    pattern = PATTERNS[name]
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 4, 1, 90)))
    want = attend(q, k, v, Call(pattern), backend="reference")
    unseen = ~pattern.mask(1, 90, heads=4)[:, 0]
    k[:, unseen], v[:, unseen] = float("nan"), float("nan")
    assert_close(attend(q, k, v, Call(pattern), backend="torch"), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["window", "longformer", "per-head", "bigbird", "strided", "two-draws"])
def test_gradients_of_a_step(name):
    q, k, v, grad = tensors(Shape(4, 2, 1, 70))
    gradients = []
    for backend in ("torch", "reference"):
        out = attend(q, k, v, Call(PATTERNS[name]), backend=backend)
        gradients.append(torch.autograd.grad(out, (q, k, v), grad))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["window", "longformer", "per-head", "bigbird"])
def test_a_step_with_softcap_or_dropout(name):
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 1, 70)))
    call = Call(PATTERNS[name], softcap=1.5)
    got, want = (attend(q, k, v, call, backend=backend) for backend in ("torch", "reference"))
    assert_close(got, want, atol=1e-12, rtol=1e-12)
    dropped = []
    for _ in range(2):
        torch.manual_seed(3)
        dropped.append(attend(q, k, v, Call(PATTERNS[name], dropout=0.5), backend="torch"))
    assert torch.equal(*dropped) and not torch.equal(dropped[0], want)
