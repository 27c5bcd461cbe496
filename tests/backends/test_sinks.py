"""Learned sinks: a logit per head that joins each softmax and has no value (GPT-OSS, arXiv:2508.10925)."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, PerHead, Random, SlidingWindow, Strided, get_pattern
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.flex import attention
from hf_sparse.plan import Constraint, Segments

from .cases import PATTERNS, SHAPES, Shape, call_of, segments, tensors
from .doubles import run_kernel
from .far_pairs import Predicate

MORE = {
    **{name: pattern for name, (pattern, _) in PATTERNS.items()},
    "long-stride": Strided(17),
    "fixed": get_pattern("sparse_transformer_fixed", block=16, summary=3),
    "bigbird": get_pattern("bigbird", block=8),
    "predicate": Predicate(),
}
PER_HEAD = PerHead(
    (SlidingWindow(9), Random(keys_per_query=3), Strided(4), get_pattern("longformer", window=3))
)
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def sinks_of(heads, dtype=torch.float64):
    """Return logits from nearly nothing to most of a row's weight."""
    return torch.linspace(-3.0, 4.0, heads, dtype=dtype).requires_grad_()


def results(given, call, sinks, batch=None, backend="torch", far=None):
    """Return the output and the gradients of q, k, v and the sinks, and the record of the call."""
    q, k, v, grad = given
    with recording() as seen:
        out = attend(q, k, v, call, batch, backend, far, sinks)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v, sinks), grad)), seen.calls[0]


def close(got, want, tolerance=1e-11):
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(g, w, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reference_divides_by_one_more_exponential():
    q, k, v, _ = (x.detach() for x in tensors(Shape(2, 1, 12, 20, batch=1)))
    sinks = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    got = attend(q, k, v, Call(SlidingWindow(6)), backend="reference", sinks=sinks)
    for head in range(2):
        for row in range(12):
            keys = slice(8 + row - 5, 8 + row + 1)
            weights = (q[0, head, row] @ k[0, 0, keys].T * 8**-0.5).exp()
            assert_close(got[0, head, row], weights @ v[0, 0, keys] / (weights.sum() + sinks[head].exp()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MORE)
def test_output_and_four_gradients_are_those_of_the_reference(name, causal):
    for shape in (SHAPES["gqa"], SHAPES["chunked-prefill"], SHAPES["dv-narrower"]):
        if not causal and shape.q_len < shape.k_len:
            continue
        for kind in ("plain", "left", "right", "packed", "holes", "empty-row"):
            batch, _ = segments(kind, shape)
            given, sinks = tensors(shape), sinks_of(shape.heads)
            call = Call(MORE[name], Constraint(causal))
            got, record = results(given, call, sinks, batch)
            assert record.backend == "torch"
            close(got, results(given, call, sinks, batch, "reference")[0])


def test_heads_that_differ_keep_their_own():
    for kv_heads in (1, 2, 4):
        given = tensors(Shape(4, kv_heads, 97, 97))
        got, _ = results(given, Call(PER_HEAD), sinks_of(4))
        close(got, results(given, Call(PER_HEAD), sinks_of(4), backend="reference")[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["full", "window", "strided", "longformer", "per-head", "bigbird"])
def test_a_step(name, kv_heads):
    shape = Shape(4, kv_heads, 1, 70, v_width=5, batch=3)
    softcap = 1.5 if kv_heads == 2 else None
    call = Call(PER_HEAD if name == "per-head" else MORE[name], softcap=softcap)
    for kind in ("plain", "left", "packed", "holes", "empty-row"):
        batch, _ = segments(kind, shape)
        given, sinks = tensors(shape), sinks_of(4)
        got, record = results(given, call, sinks, batch)
        assert record.operator == "step"
        close(got, results(given, call, sinks, batch, "reference")[0])


def test_steps_and_chunks_equal_one_pass():
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 80, 80)))
    sinks = sinks_of(4).detach()
    for name in ("window", "longformer", "strided", "two-strides"):
        whole = attend(q, k, v, call_of(name), backend="torch", sinks=sinks)
        for step in (1, 17):
            parts = [
                attend(q[:, :, at : at + step], k[:, :, :upto], v[:, :, :upto], call_of(name), sinks=sinks)
                for at in range(0, 80, step)
                for upto in [min(at + step, 80)]
            ]
            assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["full", "long-stride", "streaming", "two-strides", "window"])
def test_long_sequences_take_every_path(name):
    """Fused triangles, strips, and families at once, with and without other pieces of the same rows."""
    pattern = Strided(64) if name == "long-stride" else MORE[name]
    given = tensors(Shape(2, 1, 1500, 1500, batch=1))
    got, _ = results(given, Call(pattern), sinks_of(2))
    close(got, results(given, Call(pattern), sinks_of(2), backend="reference")[0], 1e-10)


@pytest.mark.parametrize("name", ["full", "streaming", "strided", "bigbird"])
def test_with_far_pairs_and_a_softcap(name):
    for q_len in (1, 60):
        given = tensors(Shape(4, 2, q_len, 90))
        q_far, k_far, _, _ = tensors(Shape(4, 2, q_len, 90), seed=1)
        call = Call(MORE[name], softcap=2.0, near=13)
        both = [results(given, call, sinks_of(4), None, b, (q_far, k_far))[0] for b in ("torch", "reference")]
        close(*both)


@pytest.mark.parametrize("name", ["window", "longformer", "strided", "full"])
@pytest.mark.parametrize("q_len", [1, 97])
def test_a_sink_of_minus_infinity_is_none(name, q_len):
    given = tensors(Shape(4, 2, q_len, 97), torch.float32)
    none = torch.full((4,), float("-inf")).requires_grad_()
    got, _ = results(given, call_of(name), none)
    out = attend(*given[:3], call_of(name), backend="torch")
    want = out.detach(), *torch.autograd.grad(out, given[:3], given[3]), torch.zeros(4)
    close(got, want, 1e-6)


@pytest.mark.parametrize("name", ["window", "longformer", "two-strides", "full"])
def test_gradcheck(name):
    given = tensors(Shape(2, 1, 11, 11, width=4, v_width=3, batch=1))
    pattern = {"window": SlidingWindow(3), "longformer": get_pattern("longformer", window=3)}.get(
        name, MORE[name]
    )
    for q_len in (1, 11):
        inputs = (given[0][:, :, -q_len:].detach().requires_grad_(), *given[1:3], sinks_of(2))
        assert torch.autograd.gradcheck(
            lambda q, k, v, s: attend(q, k, v, Call(pattern), backend="torch", sinks=s), inputs
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["window", "longformer", "strided", "full"])
@pytest.mark.parametrize("q_len", [1, 97])
def test_half_precision_is_at_most_twice_as_far_off_as_plain_attention(name, q_len, dtype):
    """Plain: the reference's own formula with every step in that dtype, sinks and all."""
    shape = Shape(4, 2, q_len, 97)
    given, sinks = tensors(shape, dtype), sinks_of(4, torch.float32)
    want, _ = results(
        [x.detach().double().requires_grad_() for x in given], call_of(name), sinks_of(4), None, "reference"
    )
    got, record = results(given, call_of(name), sinks)
    assert record.backend == "torch" and got[0].dtype == dtype and got[4].dtype == torch.float32
    q, k, v, grad = given
    mask = MORE[name].mask(97, heads=4)[:, -q_len:]
    scores = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    column = sinks.to(dtype)[:, None, None].expand(2, 4, q_len, 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    plain = weights @ v.repeat_interleave(2, 1)
    plain = (plain.detach(), *torch.autograd.grad(plain, (q, k, v, sinks), grad))
    for label, g, p, w in zip(NAMES, got, plain, want, strict=True):
        worst = (p.double() - w).abs().max()
        # Beside it, half a unit in the last place of the largest number: what rounding the result costs anybody.
        least = w.abs().max() * torch.finfo(dtype).eps / 2
        assert (g.double() - w).abs().max() <= 2 * max(worst, least), label


def test_half_precision_is_rounded_once():
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 97, 97), torch.bfloat16))
    sinks = sinks_of(4, torch.float32).detach()
    got = attend(q, k, v, call_of("window"), backend="torch", sinks=sinks)
    want = attend(q.float(), k.float(), v.float(), call_of("window"), backend="torch", sinks=sinks)
    # Rounded before the sinks join as well, three in ten numbers would be others.
    assert (got == want.bfloat16()).float().mean() > 0.99


def test_dropout_keeps_the_mean_and_its_gradient():
    q, k, v, grad = tensors(Shape(4, 2, 60, 60))
    sinks = sinks_of(4)

    def dropped(logits, seed):
        torch.manual_seed(seed)
        return attend(q, k, v, call_of("window", dropout=0.3), backend="torch", sinks=logits)

    exact = attend(q, k, v, call_of("window"), backend="torch", sinks=sinks).detach()
    mean = torch.stack([dropped(sinks, seed).detach() for seed in range(200)]).mean(0)
    # As for dropout without sinks: 4.5 standard errors of 200 draws of values up to 3.
    assert (mean - exact).abs().max() < 4.5 * 0.5 * 3 / 200**0.5
    (got,) = torch.autograd.grad(dropped(sinks, 5), sinks, grad)
    step = torch.zeros(4, dtype=torch.float64)
    for head in range(4):
        step.zero_()[head] = 1e-6
        with torch.no_grad():
            slope = ((dropped(sinks + step, 5) - dropped(sinks - step, 5)) * grad).sum() / 2e-6
        assert_close(got[head], slope, rtol=1e-6, atol=1e-6)


def test_auto_never_takes_an_operator_without_sinks():
    given = tensors(Shape(2, 2, 90, 90))
    for pattern in (Full(), SlidingWindow(90)):
        got, record = results(given, Call(pattern), sinks_of(2), backend="auto")
        assert (record.backend, record.operator) == ("torch", "flash+tiled")
        close(got, results(given, Call(pattern), sinks_of(2), backend="reference")[0])


def test_backends_that_cannot_refuse():
    q, k, v, _ = (x.detach().float() for x in tensors(Shape(2, 2, 90, 90)))
    with pytest.raises(ValueError, match="on the CPU FlexAttention does not return what learned sinks"):
        attend(q, k, v, Call(SlidingWindow(9)), backend="flex", sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="operators are not merged with learned sinks"):
        attend(q, k, v, Call(SlidingWindow(9)), backend="cuda_flash", sinks=torch.zeros(2))


@pytest.mark.parametrize("name", ["window", "strided", "longformer", "window-or-strided", "per-head"])
def test_flex_merges_them_by_log_sum_exp(name, monkeypatch):
    """With a stand-in for the CUDA kernel, whose log-sum-exp is differentiable as FlexAttention's is."""
    monkeypatch.setattr(attention, "run_kernel", run_kernel)
    monkeypatch.setattr(attention, "unsupported", lambda call, inputs, plans: [])
    monkeypatch.setattr("hf_sparse.backends.flex.unsupported", lambda *_: [])
    pattern = (
        get_pattern("dilated_window", window=5, dilation=(1, 2, 3, 1)) if name == "per-head" else MORE[name]
    )
    for causal in (True, False):
        for kind in ("plain", "left", "packed"):
            shape = Shape(4, 2, 150, 150)
            batch, _ = segments(kind, shape)
            given, call = tensors(shape), Call(pattern, Constraint(causal))
            got, record = results(given, call, sinks_of(4), batch, "flex")
            assert record.backend == "flex"
            close(got, results(given, call, sinks_of(4), batch, "reference")[0])


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_sinks_that_are_not_one_per_head_are_refused(sinks, backend):
    q, k, v, _ = tensors(Shape(2, 2, 9, 9))
    with pytest.raises(ValueError, match="one floating-point logit for each of 2 query heads, got"):
        attend(q, k, v, Call(SlidingWindow(3)), backend=backend, sinks=sinks)


def test_rows_that_see_nothing_stay_zero_and_finite():
    batch = Segments.from_labels(torch.tensor([[-1] * 40, [-1] * 10 + [0] * 30]))
    given = tensors(Shape(2, 2, 40, 40))
    got, _ = results(given, call_of("longformer"), sinks_of(2), batch)
    assert not got[0][0].any() and not got[0][1, :, :10].any()
    assert all(g.isfinite().all() for g in got)
