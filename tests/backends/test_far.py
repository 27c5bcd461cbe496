"""Far pairs: tokens `near` or more apart are scored by a query and key of their own, in one softmax with the others."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, SlidingWindow, StreamingLLM, Strided
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.pieces import function
from hf_sparse.backends.pieces.walk import Pass
from hf_sparse.plan import Columns, Constraint, Segment, Segments

from .cases import SHAPES, Shape, oracle, segments, tensors, written_mask
from .far_pairs import NEAR, PATTERNS, close, close_some, make, results


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
        (5, (40, 40), Constraint(beyond=9), "says by near which pairs are far, got constraint.beyond=9"),
        (None, None, Constraint(beyond=9), "says by near which pairs are far, got constraint.beyond=9"),
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
