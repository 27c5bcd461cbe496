"""Every pattern on every backend gives the output and the gradients of the written mask."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, SlidingWindow, StreamingLLM
from hf_sparse.backends import Call, attend, recording
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Constraint, Segments, make_plan

from .cases import PATTERNS, SHAPES, Shape, call_of, oracle, run, segments, tensors, truth, written_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = ("out", "dq", "dk", "dv")
KINDS = ("plain", "left", "right", "holes", "packed", "packed-padded", "empty-row")


def close(got, want, tolerance):
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(g.double(), w, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_are_those_of_the_written_mask(name, backend, dtype):
    pattern, pieces = PATTERNS[name]
    for shape_name, shape in SHAPES.items():
        for kind in KINDS:
            if shape.batch == 1 and kind == "holes":
                continue  # two rows with different holes
            for causal in (True, False):
                batch, labels = segments(kind, shape)
                given = tensors(shape, dtype)
                got, record = run(backend, given, call_of(name, causal), batch)
                close(got, truth(given, pattern, causal, labels, shape), TOLERANCE[dtype])
                assert record.backend == backend
                mask = written_mask(pattern, causal, labels, shape)
                assert record.pairs == mask.sum(), (shape_name, kind)
                if causal and kind == "plain" and shape_name == "long":
                    assert record.pieces == pieces


@pytest.mark.parametrize("name", PATTERNS)
def test_half_precision_errs_no_more_than_plain_attention_does(name):
    """As in flash-attention's tests: at most 2x the error of plain half-precision attention, 3x for gradients."""
    shape = Shape(4, 2, 150, 150, width=16, v_width=16)
    for dtype in (torch.bfloat16, torch.float16):
        for kind in ("plain", "left"):
            batch, labels = segments(kind, shape)
            given = tensors(shape, dtype)
            got, record = run("torch", given, call_of(name), batch)
            want = truth(given, PATTERNS[name][0], True, labels, shape)
            q, k, v, grad = given
            plain = oracle(q, k, v, written_mask(PATTERNS[name][0], True, labels, shape))
            naive = (plain.detach(), *torch.autograd.grad(plain, (q, k, v), grad))
            assert record.backend == "torch"
            for what, g, n, w, factor in zip(NAMES, got, naive, want, (2, 3, 3, 3), strict=True):
                assert g.dtype == dtype
                assert (g.double() - w).abs().max() <= factor * (n.double() - w).abs().max(), (what, dtype)


def test_mixed_dtypes_of_autocast_and_of_a_float32_cache():
    shape = Shape(4, 2, 60, 60)
    q, k, v, grad = tensors(shape, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v.bfloat16(), call_of("window"), backend="torch")
    want = truth((q, k, v, grad), PATTERNS["window"][0], True, segments("plain", shape)[1], shape)
    assert out.dtype == torch.bfloat16
    assert (out.double() - want[0]).abs().max() < 0.05  # bf16 has 8 bits: 2^-8 of values up to about 4
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out, (q, k, v), grad.bfloat16()))
    assert attend(q, k, v.bfloat16(), call_of("window")).dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_future_does_not_leak(name, backend):
    shape = Shape(2, 1, 150, 150, batch=1)
    q, k, v, _ = (x.detach() for x in tensors(shape, torch.float32))
    before = attend(q, k, v, call_of(name), backend=backend)
    t = 77
    for x in (q, k, v):
        x[:, :, t] += 3.0
    after = attend(q, k, v, call_of(name), backend=backend)
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t], after[:, :, t])


def test_a_row_with_no_key_is_exactly_zero_with_finite_gradients():
    shape = Shape(2, 1, 40, 40)
    batch, labels = segments("left", shape)
    for name in PATTERNS:
        for backend in ("reference", "torch"):
            got, _ = run(backend, tensors(shape, torch.float32), call_of(name), batch)
            padding = labels[0] < 0
            assert (got[0][0][:, padding] == 0).all() and (got[1][0][:, padding] == 0).all()
            assert (got[2][0][:, padding] == 0).all() and (got[3][0][:, padding] == 0).all()
            assert all(torch.isfinite(x).all() for x in got)


class Sparse(Pattern):
    """A predicate alone, different per head, with keys far apart."""

    def allows(self, context, head, query, key):
        return ((query - key) == 3 * (head + 1)) | ((key % 64 == 5) & (query > 100))


@pytest.mark.parametrize("causal", [True, False])
def test_a_bare_predicate_runs_as_tiles(causal):
    shape = Shape(4, 2, 201, 201)
    batch, labels = segments("left", shape)
    given = tensors(shape)
    got, record = run("torch", given, Call(Sparse(), Constraint(causal)), batch)
    close(got, truth(given, Sparse(), causal, labels, shape), 1e-12)
    assert record.pairs == written_mask(Sparse(), causal, labels, shape).sum()


@pytest.mark.parametrize(
    "constraint", [Constraint(window=11), Constraint(causal=False, window=9), Constraint(chunk=16)]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_models_own_window_is_intersected(name, constraint):
    shape = Shape(2, 2, 75, 75)
    given = tensors(shape)
    pattern = PATTERNS[name][0]
    got, record = run("torch", given, Call(pattern, constraint))
    query, key = torch.arange(75)[:, None], torch.arange(75)
    mask = (written_mask(pattern, constraint.causal, torch.zeros(2, 75), shape)) & constraint.admits(
        query, key
    )
    q, k, v, grad = given
    out = oracle(q, k, v, mask)
    close(got, (out, *torch.autograd.grad(out, (q, k, v), grad)), 1e-12)
    assert record.pairs == mask.sum() and record.dense_pairs == 4 * constraint.admits(query, key).sum()


@pytest.mark.parametrize("name", PATTERNS)
def test_softcap_runs_through_tiles(name):
    shape = Shape(4, 2, 90, 90)
    given = tensors(shape, scale=2.0)
    batch, labels = segments("left", shape)
    got, record = run("torch", given, call_of(name, softcap=1.5), batch)
    close(got, truth(given, PATTERNS[name][0], True, labels, shape, softcap=1.5), 1e-12)
    assert record.operator == "tiled"


def test_gradcheck():
    shape = Shape(2, 1, 11, 11, width=3, v_width=2, batch=1)
    for name in ("window", "longformer", "strided", "window-or-strided", "two-strides"):
        q, k, v, _ = tensors(shape)
        assert torch.autograd.gradcheck(partial(attend, call=call_of(name), backend="torch"), (q, k, v))


@pytest.mark.parametrize("scale", [100.0, 1e-3, 0.0])
@pytest.mark.parametrize("name", PATTERNS)
def test_extreme_inputs_stay_finite(name, scale):
    for dtype in (torch.float32, torch.float16):
        got, _ = run("torch", tensors(Shape(2, 1, 90, 90), dtype, scale=scale), call_of(name))
        assert all(torch.isfinite(x).all() for x in got)


def test_repeated_runs_are_bit_equal():
    first, _ = run("torch", tensors(SHAPES["gqa"], torch.float32), call_of("longformer"))
    for _ in range(5):
        again, _ = run("torch", tensors(SHAPES["gqa"], torch.float32), call_of("longformer"))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory_layouts_give_the_same_numbers():
    q, k, v, grad = tensors(SHAPES["gqa"])
    for name in PATTERNS:
        a, _ = run("torch", (q, k, v, grad), call_of(name))
        plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
        b, _ = run("torch", (*plain, grad.contiguous()), call_of(name))
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, atol=1e-14, rtol=1e-14)
        assert attend(q, k, v, call_of(name), backend="torch").transpose(1, 2).is_contiguous()


def test_auto_goes_dense_only_where_nothing_is_sparse():
    for pattern, q_len, k_len, operator in [
        (Full(), 50, 50, "dense"),
        (SlidingWindow(window=50), 50, 50, "dense"),
        (SlidingWindow(window=49), 50, 50, "flash+tiled"),
        (StreamingLLM(sinks=4, window=46), 50, 50, "dense"),
        (SlidingWindow(window=50), 1, 50, "dense"),
        (SlidingWindow(window=50), 3, 50, "flash+tiled"),
    ]:
        shape = Shape(4, 2, q_len, k_len)
        given = tensors(shape)
        got, record = run("auto", given, Call(pattern))
        close(got, truth(given, pattern, True, torch.zeros(2, k_len), shape), 1e-12)
        assert record.operator == operator, pattern
        assert run("torch", given, Call(pattern))[1].operator == ("step" if q_len == 1 else "flash+tiled")


def test_density_is_counted_while_it_runs():
    q, k, v, _ = tensors(Shape(4, 2, 100, 100))
    with recording() as seen:
        attend(q, k, v, Call(SlidingWindow(window=10)))
        attend(q, k, v, Call(Full()))
    plan = make_plan(SlidingWindow(window=10), Constraint(), 100, 100, heads=4)
    assert seen.density == (plan.pairs + 5050) / (2 * 5050)
    with recording() as nothing:
        pass
    assert nothing.calls == [] and nothing.density != nothing.density


def test_segments_of_another_batch_are_refused():
    q, k, v, _ = tensors(SHAPES["gqa"])
    with pytest.raises(ValueError, match="segments describe 2 x 96 slots, the keys are 2 x 97"):
        attend(q, k, v, Call(Full()), Segments.whole(2, 96))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backend": "tirch"},
            "unknown backend 'tirch'. Available: auto, reference, torch, flex, cuda_flash.",
        ),
        ({"heads": 3}, "3 query heads are no multiple of 2 key heads"),
        ({"q_len": 12}, "12 queries for 10 keys"),
        ({"width": 5}, "shapes do not fit"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"softcap": 0.0}, "softcap must be above 0, or None for no cap, got 0.0"),
        ({"dtype": torch.int64}, "attention takes floating-point tensors, got torch.int64"),
        ({"heads": 0}, "attention needs at least one head of at least one channel"),
        ({"v_width": 0}, "attention needs at least one head of at least one channel"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change, message):
    given = {
        "backend": "auto",
        "heads": 4,
        "q_len": 10,
        "width": 8,
        "dropout": 0.0,
        "softcap": None,
        **change,
    }
    q = torch.zeros(1, given["heads"], given["q_len"], given["width"], dtype=given.get("dtype"))
    k, v = (torch.zeros(1, 2, 10, width) for width in (8, given.get("v_width", 8)))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        attend(
            q,
            k,
            v,
            Call(Full(), dropout=given["dropout"], softcap=given["softcap"]),
            backend=given["backend"],
        )
