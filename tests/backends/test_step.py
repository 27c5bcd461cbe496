"""Decoding: one query, or a few, after a cache equal the same rows of one pass, for every pattern."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse import (
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    StreamingLLM,
    Strided,
    get_pattern,
)
from hf_sparse.backends import Call, attend, choose, recording
from hf_sparse.backends.pieces import function, step
from hf_sparse.patterns import static_patterns
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Constraint, Segment, Segments, make_plan

from .cases import Shape, oracle, tensors, written_mask


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
    "sinks": of("sinks"),
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
    "rerope": of("rerope", window=9, pattern=SlidingWindow(20)),
    "self-extend": of("self_extend", group=3, window=8, pattern="strided"),
    "predicate": Predicate(),
}


def test_every_registered_pattern_is_here():
    assert {p.name for p in PATTERNS.values()} >= set(static_patterns())


def decode(q, k, v, call, size, segments=None):
    """Return the output of queries taken `size` at a time, each with the keys up to them."""
    parts = []
    for start in range(0, k.shape[2], size):
        stop = min(start + size, k.shape[2])
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
    for size in (1, 17, 64) if kv_heads == 2 else (1,):
        assert_close(decode(q, k, v, call, size), whole, atol=1e-12, rtol=1e-12)


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


def labelled(kind, k_len, batch=3):
    """Return a label per slot [B, K], -1 = padding; the last slot is real but in "right", where row 1 has no query."""
    labels = torch.zeros(batch, k_len, dtype=torch.long)
    labels[0, :13] = -1
    labels[1, : k_len // 2] = -1
    if kind == "holes":
        labels[1, k_len - 20 : k_len - 15], labels[2, k_len - 30] = -1, -1
    if kind == "right":
        labels[1, -1] = -1
    if kind == "packed":
        labels[2, k_len // 3 :] = 1
    return labels


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["whole", "left", "holes", "right", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_of_a_batch_and_its_gradients(name, kv_heads, kind, softcap):
    q, k, v, grad = tensors(Shape(4, kv_heads, 1, 90, v_width=5, batch=3))
    segments = None if kind == "whole" else Segments.from_labels(labelled(kind, 90))
    call = Call(PATTERNS[name], softcap=softcap)
    found = []
    for backend in ("torch", "reference"):
        with recording() as seen:
            out = attend(q, k, v, call, segments, backend)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
        if backend == "torch" and name != "predicate":
            assert seen.calls[0].operator == "step"
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)
    if kind == "right":
        assert (found[0][0][1] == 0).all() and (found[0][1][1] == 0).all()


@pytest.mark.parametrize("kind", ["whole", "left", "holes"])
@pytest.mark.parametrize("name", PATTERNS)
def test_half_precision_errs_no_more_than_plain_attention_does(name, kind):
    """At most 2x the error of plain attention in the same precision, 3x for gradients."""
    shape = Shape(4, 2, 1, 150, width=16, v_width=16, batch=3)
    labels = torch.zeros(3, 150, dtype=torch.long) if kind == "whole" else labelled(kind, 150)
    mask = written_mask(PATTERNS[name], True, labels, shape)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, grad = tensors(shape, dtype)
        found = []
        for out in (
            attend(q, k, v, Call(PATTERNS[name]), Segments.from_labels(labels), "torch"),
            oracle(q, k, v, mask),
        ):
            found.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad)))
        double = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out = oracle(*double, mask)
        want = (out.detach(), *torch.autograd.grad(out, double, grad.double()))
        for got, naive, exact, factor in zip(*found, want, (2, 3, 3, 3), strict=True):
            assert got.dtype == dtype
            assert (got.double() - exact).abs().max() <= factor * (naive.double() - exact).abs().max()


def test_heads_that_are_grouped_otherwise_in_each_row():
    """The first head sees what the second does in rows 0 and 1, and what the third does in row 2."""
    chosen = torch.zeros(3, 90, dtype=torch.bool)
    chosen[0, 13 + 3], chosen[1, 45 + 3], chosen[2, 4] = True, True, True
    segments = Segments.from_labels(labelled("holes", 90)).choose(chosen)
    windows = (Longformer(9, ()), Longformer(9, (3,)), Longformer(9, (4,)), SlidingWindow(9))
    q, k, v, grad = tensors(Shape(4, 2, 1, 90, batch=3))
    found = []
    for backend in ("torch", "reference"):
        out = attend(q, k, v, Call(PerHead(windows)), segments, backend)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)


def shares_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Operations(TorchDispatchMode):
    """Count the operators that ran, and remember the most numbers one of them wrote; a view of `keys` writes none."""

    def __init__(self, keys=None):
        super().__init__()
        self.count, self.written, self.keys = 0, 0, keys

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and self.keys is not None and not shares_memory(x, self.keys):
                self.written = max(self.written, x.numel())
        return result


@pytest.mark.parametrize(
    ("pattern", "padding"),
    [
        (SlidingWindow(1024), ()),
        (SlidingWindow(1024), (0, 700, 3000)),
        (SlidingWindow(3000), (0, 700, 3000)),  # one row is shorter than the window
        (StreamingLLM(4, 1020), ()),
        (StreamingLLM(4, 1020), (0, 700, 3000)),
        (Strided(64), ()),
        (Longformer(1000, tuple(range(8))), (0, 700, 3000)),
    ],
    ids=str,
)
def test_a_step_copies_no_key(pattern, padding):
    """Nothing is written that is larger than a row of scores per head, or the keys read at other places in each row."""
    rows, heads, n = max(1, len(padding)), 8, 4096
    buffer = torch.randn(rows, heads, n + 100, 64)
    q, k = torch.randn(rows, heads, 1, 64), buffer[:, :, :n]
    segments = Segments.whole(rows, n)
    if padding:
        segments = Segments.from_labels(-(torch.arange(n) < torch.tensor(padding)[:, None]).long())
    with Operations(buffer) as seen:
        out = attend(q, k, k, Call(pattern), segments, "torch")
    hull = 3000 if pattern == SlidingWindow(3000) else 1024
    gathered = {"StreamingLLM": 4, "Longformer": 8}.get(type(pattern).__name__, 0) if padding else 0
    assert seen.written <= max(rows * heads * hull, rows * heads * gathered * 64)
    assert_close(out, attend(q, k, k, Call(pattern), segments, "reference"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "predicate"])
def test_one_call_serves_all_rows_and_its_tables_all_layers(name, monkeypatch):
    pattern, made, planned = PATTERNS[name], [], []
    monkeypatch.setattr(step, "_layout", lambda *given, make=step._layout: made.append(given) or make(*given))
    monkeypatch.setattr(
        choose, "make_plan", lambda *given, **options: planned.append(given) or make_plan(*given, **options)
    )
    counts = []
    for rows in (3, 24):
        q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 1, 300, batch=rows)))
        segments = Segments.from_labels(-(torch.arange(300) < 7 * torch.arange(rows)[:, None]).long())
        # A pattern that draws keys anew in each layer has tables of its own there.
        for layer in (0, 0) if pattern.per_layer else (0, 1):
            with Operations() as seen:
                attend(q, k, v, Call(pattern, layer=layer), segments, "torch")
        counts.append(seen.count)
    # A mask more or less, but nothing for each of 21 more rows.
    assert counts[1] <= counts[0] + 10 and len(made) == 2 and len(planned) == 3 + 24


def test_layers_that_see_different_keys_share_nothing():
    pattern = of("layered", layers={0: SlidingWindow(7), 1: SlidingWindow(30)})
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 1, 90, batch=3)))
    segments = Segments.from_labels(labelled("left", 90))
    for layer in (0, 1, 0):
        call = Call(pattern, layer=layer)
        assert_close(attend(q, k, v, call, segments, "torch"), attend(q, k, v, call, segments, "reference"))


@pytest.mark.parametrize("name", ["window", "longformer", "per-head", "bigbird"])
def test_a_step_with_dropout(name):
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 1, 70)))
    without, dropped = attend(q, k, v, Call(PATTERNS[name]), backend="torch"), []
    for _ in range(2):
        torch.manual_seed(3)
        dropped.append(attend(q, k, v, Call(PATTERNS[name], dropout=0.5), backend="torch"))
    assert torch.equal(*dropped) and not torch.equal(dropped[0], without)
