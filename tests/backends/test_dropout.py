"""Attention dropout: seeded, unbiased, and differentiated with the masks the forward pass drew."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import SlidingWindow
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.pieces.tiled import Tiled

from .cases import PATTERNS, Shape, call_of, tensors

SHAPE = Shape(4, 2, 90, 90)


def attention(name, given, seed, dropout=0.3):
    torch.manual_seed(seed)
    q, k, v, _ = given
    return attend(q, k, v, call_of(name, dropout=dropout), backend="torch")


@pytest.mark.parametrize("name", PATTERNS)
def test_dropout_is_seeded_and_says_it_runs_in_tiles(name):
    given = tensors(SHAPE)
    with recording() as seen:
        a, b, c = (attention(name, given, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert {call.operator for call in seen.calls} == {"tiled"}


@pytest.mark.parametrize("name", ["window", "longformer", "strided", "window-or-strided", "two-strides"])
def test_gradients_use_the_masks_of_the_forward_pass(name):
    """The output is linear in v, and the seed fixes everything else: finite differences must agree."""
    q, k, v, grad = tensors(SHAPE)
    out = attention(name, (q, k, v, grad), 5)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    generator = torch.Generator().manual_seed(0)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        step = 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                moved = [y + sign * step * direction if y is x else y for y in (q, k, v)]
                values.append((attention(name, (*moved, grad), 5) * grad).sum())
        assert_close((values[0] - values[1]) / (2 * step), (gradient * direction).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["window", "longformer", "strided"])
def test_dropout_keeps_the_mean(name):
    given = tensors(SHAPE)
    mean = torch.stack([attention(name, given, seed, 0.2).detach() for seed in range(200)]).mean(0)
    exact = attention(name, given, 0, 0.0).detach()
    # Standard error of 200 draws: below 0.5 * |v| / sqrt(200); four of those over 30,000 numbers would be a rare event.
    assert (mean - exact).abs().max() < 4.5 * 0.5 * 3 / 200**0.5
    assert (mean - exact).mean().abs() < 2e-3


def test_the_kept_share_is_the_one_asked_for():
    tiled = Tiled(1.0, dropout=0.25, seed=3)
    kept = torch.cat([tiled._kept(torch.ones(8, 64, 64)).flatten() for _ in range(4)])
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((kept > 0).float().mean() - 0.75) < 0.01


def test_gradient_checkpointing_draws_the_same_masks():
    q, k, v, grad = tensors(SHAPE)

    def attention_of(q, k, v):
        return attend(q, k, v, call_of("window", dropout=0.3), backend="torch")

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(attention_of, q, k, v, use_reentrant=False)
        else:
            out = attention_of(q, k, v)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_long_runs_drop_the_same_weights_in_both_passes():
    """Strips of a long run are cut by the memory of a pass; the masks are drawn strip by strip."""
    shape = Shape(2, 1, 3000, 3000, width=32, v_width=32, batch=1)
    call = Call(SlidingWindow(window=40), dropout=0.3)
    q, k, v, grad = tensors(shape)
    step = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1)) * 1e-6
    values = []
    for moved in (q, (q + step).detach(), (q - step).detach()):
        torch.manual_seed(5)
        values.append(attend(moved, k, v, call, backend="torch"))
    (dq,) = torch.autograd.grad(values[0], q, grad)
    slope = ((values[1] - values[2]) * grad).sum() / 2
    assert_close(slope, (dq * step).sum(), rtol=1e-4, atol=1e-9)
