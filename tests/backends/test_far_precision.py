"""Far pairs in half precision, under autocast, with dropout, and against finite differences."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse.backends import Call, attend
from hf_sparse.backends.pieces.walk import Pass

from .cases import Shape, segments, written_mask
from .far_pairs import NAMES, PATTERNS, make, results


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


def test_gradcheck():
    shape = Shape(2, 1, 11, 11, width=3, v_width=2, batch=1)
    for name in ("full", "streaming", "strided", "two-strides"):
        call = Call(PATTERNS[name], near=3)

        def attention(q, k, v, q_far, k_far, call=call):
            return attend(q, k, v, call, backend="torch", far=(q_far, k_far))

        assert torch.autograd.gradcheck(attention, make(shape)[:5])
