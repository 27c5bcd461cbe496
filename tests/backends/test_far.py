"""Far pairs: tokens `near` or more apart are scored by a query and key of their own, in one softmax with the others."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, Longformer, PerHead, Random, SlidingWindow, StreamingLLM, Strided, get_pattern
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.pieces import function
from hf_sparse.backends.pieces.walk import Pass
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Columns, Constraint, Segment, Segments

from .cases import SHAPES, Shape, oracle, segments, tensors, written_mask


class Predicate(Pattern):
    """A predicate alone, planned as tiles."""

    def allows(self, context, head, query, key):
        return (query - key < 9 + head) | (key % 16 == 3)


PATTERNS = {
    "full": Full(),
    "window": SlidingWindow(37),
    "streaming": StreamingLLM(sinks=2, window=30),
    "window-or-sinks": SlidingWindow(21) | Longformer(1, (0, 1, 2)),
    "longformer": Longformer(24, (0, 7, 40)),
    "strided": Strided(5),
    "strided-17": Strided(17),
    "fixed": get_pattern("sparse_transformer_fixed", block=16, summary=3),
    "blocks": get_pattern("block_local", block=16, neighbours=1),
    "two-strides": Strided(3) | Strided(4),
    "bigbird": get_pattern("bigbird", block=8),
    "per-head": PerHead((SlidingWindow(9), Random(keys_per_query=3), Strided(4), Longformer(3, (0, 5)))),
    "predicate": Predicate(),
}
NEAR = (1, 13, 37, 60)
NAMES = ("out", "dq", "dk", "dv", "dq_far", "dk_far")


def make(shape, dtype=torch.float64):
    """Return query, key, value, far query, far key, and an output gradient."""
    q, k, v, grad = tensors(shape, dtype)
    q_far, k_far, _, _ = tensors(shape, dtype, seed=1)
    return q, k, v, q_far, k_far, grad


def results(given, call, batch=None, backend="torch"):
    """Return the output and five gradients, and the record of the call."""
    q, k, v, q_far, k_far, grad = given
    with recording() as seen:
        out = attend(q, k, v, call, batch, backend, far=(q_far, k_far))
    inputs = (q, k, v, q_far, k_far)
    # Without any far pair the far query and key are unread.
    gradients = torch.autograd.grad(out, inputs, grad, materialize_grads=True, allow_unused=True)
    return (out.detach(), *gradients), seen.calls[0]


def close(got, want, tolerance=1e-11):
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(g, w, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def close_some(got, want):
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, atol=1e-11, rtol=1e-11)


def test_the_reference_chooses_the_query_and_key_by_distance():
    """Row by row: each pair's score is that of its own query and key, in a softmax over what the pattern allows."""
    q, k, v, q_far, k_far, _ = (x.detach() for x in make(Shape(2, 1, 12, 20, batch=1)))
    call = Call(StreamingLLM(3, 6), near=4)
    got = attend(q, k, v, call, backend="reference", far=(q_far, k_far))
    for head in range(2):
        for row in range(12):
            position = 8 + row
            keys = [key for key in range(position + 1) if key < 3 or position - key < 6]
            scores = torch.stack(
                [
                    (
                        q[0, head, row] @ k[0, 0, key]
                        if position - key < 4
                        else q_far[0, head, row] @ k_far[0, 0, key]
                    )
                    for key in keys
                ]
            )
            want = (scores * 8**-0.5).softmax(0) @ v[0, 0, keys]
            assert_close(got[0, head, row], want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_five_gradients_are_those_of_the_reference(name, near):
    for shape in (SHAPES["odd-length"], SHAPES["gqa"], SHAPES["chunked-prefill"], SHAPES["dv-narrower"]):
        if name == "per-head" and shape.heads != 4:
            continue
        for kind in ("plain", "left", "right", "packed", "holes"):
            batch, _ = segments(kind, shape)
            given = make(shape)
            call = Call(PATTERNS[name], near=near)
            got, record = results(given, call, batch)
            close(got, results(given, call, batch, "reference")[0])
            with recording() as seen:
                attend(*given[:3], Call(PATTERNS[name]), batch, "torch")
            assert (record.pairs, record.dense_pairs) == (seen.calls[0].pairs, seen.calls[0].dense_pairs)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_query_and_key_at_all_distances_change_nothing(name):
    q, k, v, grad = tensors(SHAPES["gqa"])
    q_far, k_far = (x.detach().clone().requires_grad_() for x in (q, k))
    got, _ = results((q, k, v, q_far, k_far, grad), Call(PATTERNS[name], near=11))
    out = oracle(q, k, v, written_mask(PATTERNS[name], True, torch.zeros(2, 97), SHAPES["gqa"]))
    want = torch.autograd.grad(out, (q, k, v), grad)
    close_some((got[0], got[1] + got[4], got[2] + got[5], got[3]), (out.detach(), *want))


@pytest.mark.parametrize(
    "constraint", [Constraint(window=20), Constraint(chunk=32), Constraint(window=5), Constraint(chunk=8)]
)
@pytest.mark.parametrize("name", ["full", "streaming", "strided", "fixed", "predicate"])
def test_the_models_own_constraint_holds_for_both_kinds_of_pairs(name, constraint):
    given = make(Shape(4, 2, 75, 90))
    call = Call(PATTERNS[name], constraint, near=11)
    got, record = results(given, call)
    close(got, results(given, call, backend="reference")[0])
    query, key = torch.arange(15, 90)[:, None], torch.arange(90)
    assert record.dense_pairs == 2 * 4 * constraint.admits(query, key).sum()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed", "holes", "cache"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_step(name, kv_heads, kind, softcap):
    shape = Shape(4, kv_heads, 1, 70, v_width=5, batch=3)
    batch = segments(kind, shape)[0] if kind != "cache" else None
    if kind == "cache":
        entries = (Segment(slice(0, 2), slice(0, 70), 31), Segment(slice(2, 3), slice(9, 70), 4))
        batch = Segments(3, 70, entries)
    given = make(shape)
    call = Call(PATTERNS[name], softcap=softcap, near=13)
    got, record = results(given, call, batch)
    close(got, results(given, call, batch, "reference")[0])
    if name != "predicate" and kind == "plain":
        assert record.operator == "step"


@pytest.mark.parametrize("q_len", [1, 17])
@pytest.mark.parametrize("name", ["streaming", "longformer"])
def test_a_cache_that_dropped_keys(name, q_len):
    """Distances go by position, not by slot: all keys seen are held, those before a gap in the first slots."""
    columns = Columns(np.array([0, 1, 7, 40]))
    batch = Segments(2, 64, (Segment(slice(0, 2), slice(0, 64), 91, columns=columns),))
    given = make(Shape(4, 2, q_len, 64))
    for near in (13, 60, 100):
        call = Call(PATTERNS[name], near=near)
        close(results(given, call, batch)[0], results(given, call, batch, "reference")[0])
    places = torch.cat((torch.tensor([0, 1, 7, 40]), torch.arange(91, 151)))
    whole = [x.detach().new_zeros(2, x.shape[1], 151, x.shape[3]) for x in given[:5]]
    for full, x in zip(whole, given, strict=False):
        full[:, :, places[-x.shape[2] :]] = x.detach()
    call = Call(PATTERNS[name], near=60)
    q, k, v, q_far, k_far = whole
    want = attend(q, k, v, call, backend="reference", far=(q_far, k_far))[:, :, -q_len:]
    close_some(results(given, call, batch)[0][:1], (want,))


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_and_single_tokens_equal_one_pass(name):
    q, k, v, q_far, k_far, _ = (x.detach() for x in make(Shape(4, 2, 80, 80)))
    call = Call(PATTERNS[name], near=13)
    whole = attend(q, k, v, call, backend="torch", far=(q_far, k_far))
    for step in (1, 17):
        parts = []
        for start in range(0, 80, step):
            now, upto = slice(start, min(start + step, 80)), min(start + step, 80)
            far = q_far[:, :, now], k_far[:, :, :upto]
            parts.append(attend(q[:, :, now], k[:, :, :upto], v[:, :, :upto], call, backend="torch", far=far))
        assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["full", "strided", "streaming", "two-strides"])
def test_long_sequences_take_every_path(name):
    """Enough rows for strips, fused triangles that begin after many rows without a far key, and families at once."""
    pattern = Strided(64) if name == "strided" else PATTERNS[name]
    given = make(Shape(2, 1, 1500, 1500, batch=1))
    for near in (3, 900):
        call = Call(pattern, near=near)
        close(results(given, call)[0], results(given, call, backend="reference")[0], 1e-10)


@pytest.mark.parametrize("name", PATTERNS)
def test_softcap(name):
    shape = Shape(4, 2, 90, 90)
    batch, _ = segments("left", shape)
    given = make(shape)
    call = Call(PATTERNS[name], softcap=1.5, near=13)
    close(results(given, call, batch)[0], results(given, call, batch, "reference")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 150])
@pytest.mark.parametrize("name", PATTERNS)
def test_half_precision_errs_no_more_than_plain_attention_does(name, q_len, dtype):
    """At most 2x the error of the same softmax in plain half precision, 3x for gradients."""
    shape = Shape(4, 2, q_len, 150, width=16, v_width=16)
    given = make(shape, dtype)
    call = Call(PATTERNS[name], near=13)
    batch, labels = segments("left", shape)
    mask = written_mask(PATTERNS[name], True, labels, shape)
    got, record = results(given, call, batch)
    assert record.backend == "torch"
    double = [x.detach().double().requires_grad_() for x in given]
    want = results(double, call, batch, "reference")[0]
    q, k, v, q_far, k_far, grad = given
    groups = [x.repeat_interleave(2, 1) for x in (k, v, k_far)]
    distance = torch.arange(150 - q_len, 150)[:, None] - torch.arange(150)
    scores = torch.where(distance < 13, q @ groups[0].mT, q_far @ groups[2].mT) * 16**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    plain = (weights.softmax(-1) * mask) @ groups[1]
    naive = (plain.detach(), *torch.autograd.grad(plain, (q, k, v, q_far, k_far), grad))
    for what, g, n, w in zip(NAMES, got, naive, want, strict=True):
        assert g.dtype == dtype
        limit = (2 if what == "out" else 3) * (n.double() - w).abs().max()
        assert (g.double() - w).abs().max() <= limit, what


@pytest.mark.parametrize("q_len", [1, 60])
def test_half_precision_is_rounded_once_after_both_kinds_of_pairs(q_len):
    given = [x.detach() for x in make(Shape(4, 2, q_len, 60), torch.bfloat16)]
    call = Call(PATTERNS["full"], softcap=20.0, near=13)  # in tiles, which compute in float32
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, q_far, k_far, _ = (x.to(dtype) for x in given)
        outputs.append(attend(q, k, v, call, backend="torch", far=(q_far, k_far)))
    assert torch.equal(outputs[0], outputs[1].bfloat16())


def test_autocast_and_mixed_dtypes():
    q, k, v, q_far, k_far, grad = make(Shape(4, 2, 60, 60), torch.float32)
    call = Call(PATTERNS["streaming"], near=13)
    want = attend(q, k, v, call, backend="reference", far=(q_far, k_far))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k.bfloat16(), v, call, far=(q_far, k_far))
    assert out.dtype == torch.bfloat16
    assert (out - want).abs().max() < 0.05  # bf16 has 8 bits: 2^-8 of values up to about 4
    gradients = torch.autograd.grad(out, (q, k, v, q_far, k_far), grad.bfloat16())
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)
    assert attend(q, k.bfloat16(), v, call, far=(q_far, k_far)).dtype == torch.float32


@pytest.mark.parametrize("name", ["full", "streaming", "strided-17", "two-strides", "per-head"])
def test_dropout_draws_the_same_masks_in_both_passes_and_under_checkpointing(name):
    given = make(Shape(4, 2, 150, 150))
    inputs, grad = given[:5], given[5]
    call = Call(PATTERNS[name], dropout=0.3, near=20)

    def attention(q, k, v, q_far, k_far):
        return attend(q, k, v, call, backend="torch", far=(q_far, k_far))

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(attention, *inputs, use_reentrant=False)
        else:
            out = attention(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    generator = torch.Generator().manual_seed(0)
    for place, gradient in enumerate(found[0][1:]):
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        values = []
        for sign in (1, -1):
            torch.manual_seed(11)
            moved = list(inputs)
            moved[place] = moved[place].detach() + sign * 1e-6 * direction
            values.append((attention(*moved).detach() * grad).sum())
        slope = (values[0] - values[1]) / 2e-6
        assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=1e-6)


def test_near_and_far_pairs_are_dropped_apart(monkeypatch):
    """Every pass of a call has a seed of its own, whatever sequence and view it is for."""
    seeds = []
    forward = Pass.forward
    monkeypatch.setattr(
        Pass, "forward", lambda self, tensors: (seeds.append(self.tiled.seed), forward(self, tensors))
    )
    shape = Shape(4, 2, 60, 60)
    batch, _ = segments("packed-padded", shape)
    given = make(shape)
    attend(
        *given[:3], Call(PATTERNS["per-head"], dropout=0.5, near=5), batch, "torch", far=(given[3], given[4])
    )
    assert len(set(seeds)) == len(seeds) > 8


def test_a_sequence_without_far_pairs_costs_nothing(monkeypatch):
    passes = []
    forward = Pass.forward
    monkeypatch.setattr(Pass, "forward", lambda self, tensors: (passes.append(self), forward(self, tensors)))
    q, k, v, q_far, k_far, _ = (x.detach() for x in make(Shape(2, 2, 90, 90)))
    q_far[:], k_far[:] = float("nan"), float("nan")
    labels = torch.zeros(2, 90, dtype=torch.long)
    labels[0, :40] = -1
    call = Call(Full(), near=50)
    batch = Segments.from_labels(labels)
    out = attend(q, k, v, call, batch, "torch", far=(q_far, k_far))
    assert len(passes) == 3 and not any(p.merges for p in passes[:2]) and passes[2].merges
    assert out[0].isfinite().all() and not out[1].isfinite().all()
    passes.clear()
    with recording() as seen:
        out = attend(q, k, v, Call(Full(), near=90), backend="auto", far=(q_far, k_far))
        attend(q, k, v, Call(Full(), near=89), backend="auto", far=(q, k))
        attend(q, k, v, Call(SlidingWindow(30), near=30), backend="torch", far=(q_far, k_far))
    assert [call.operator for call in seen.calls] == ["dense", "flash+tiled", "flash+tiled"]
    assert_close(out, attend(q, k, v, Call(Full())))
    assert len(passes) == 3


def test_a_step_needs_no_pass(monkeypatch):
    monkeypatch.setattr(function._Attention, "apply", None)
    given = make(Shape(4, 2, 1, 90))
    close(*(results(given, Call(Full(), near=30), backend=b)[0] for b in ("torch", "reference")))


def test_gradcheck():
    shape = Shape(2, 1, 11, 11, width=3, v_width=2, batch=1)
    for name in ("full", "streaming", "strided", "two-strides"):
        call = Call(PATTERNS[name], near=3)

        def attention(q, k, v, q_far, k_far, call=call):
            return attend(q, k, v, call, backend="torch", far=(q_far, k_far))

        assert torch.autograd.gradcheck(attention, make(shape)[:5])


@pytest.mark.parametrize("backend", ["flex", "cuda_flash"])
def test_backends_of_one_query_refuse_by_name(backend):
    q, k, v, q_far, k_far, _ = (x.detach() for x in make(Shape(2, 2, 40, 40), torch.float32))
    with pytest.raises(ValueError, match="far pairs need two queries and two keys per call"):
        attend(q, k, v, Call(Full(), near=5), backend=backend, far=(q_far, k_far))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("near", "far", "constraint", "message"),
    [
        (5, None, Constraint(), "got call.near=5 without far"),
        (None, (40, 40), Constraint(), "got far without call.near"),
        (0, (40, 40), Constraint(), "near must be at least 1, .* got 0"),
        (5, (40, 40), Constraint(causal=False), "far pairs are those of causal attention"),
        (5, (39, 40), Constraint(), r"far must have the shapes of query \(2, 2, 40, 8\)"),
        (5, (40, 41), Constraint(), r"got \(2, 2, 40, 8\) and \(2, 2, 41, 8\)"),
    ],
)
def test_calls_that_do_not_fit_are_refused(near, far, constraint, message, backend):
    q, k, v, _ = tensors(Shape(2, 2, 40, 40))
    given = None if far is None else (torch.zeros(2, 2, far[0], 8), torch.zeros(2, 2, far[1], 8))
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, Call(Full(), constraint, near=near), backend=backend, far=given)
