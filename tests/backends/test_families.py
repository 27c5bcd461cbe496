"""The residues of a stride, computed all at once, give what the definition gives."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import SlidingWindow, Strided, get_pattern
from hf_sparse.backends import Call
from hf_sparse.backends.pieces import families, walk
from hf_sparse.plan import Constraint, make_plan

from .cases import Shape, run, segments, tensors, truth

PATTERNS = [
    Strided(stride=32),
    Strided(stride=17),
    SlidingWindow(window=80) | Strided(stride=40),
    get_pattern("dilated_window", window=9, dilation=36),
    get_pattern("sparse_transformer_strided", stride=33, heads="split"),
]


@pytest.fixture
def calls(monkeypatch):
    """The members of every family that is computed at once."""
    seen = []

    def counted(run, group, *rest):
        seen.append(group.repeat)
        return families.run_members(run, group, *rest)

    monkeypatch.setattr(walk, "run_members", counted)
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["plain", "left", "holes", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_output_and_gradients(pattern, kind, causal, calls):
    for heads, kv_heads, dtype, tolerance in [
        (4, 4, torch.float64, 1e-11),
        (6, 2, torch.float64, 1e-11),
        (4, 2, torch.float32, 1e-5),
    ]:
        shape = Shape(heads, kv_heads, 613, 613)
        batch, labels = segments(kind, shape)
        given = tensors(shape, dtype)
        got, _ = run("torch", given, Call(pattern, Constraint(causal)), batch)
        for g, w in zip(got, truth(given, pattern, causal, labels, shape), strict=True):
            assert_close(g.double(), w, atol=tolerance, rtol=tolerance)
    assert (calls or not causal) and all(members >= 16 for members in calls)


def test_soft_capping_and_dropout_go_the_same_way(calls):
    shape = Shape(4, 2, 613, 613)
    given = tensors(shape, scale=2.0)
    got, _ = run("torch", given, Call(Strided(stride=32), softcap=1.5))
    labels = torch.zeros(2, 613, dtype=torch.long)
    for g, w in zip(got, truth(given, Strided(stride=32), True, labels, shape, softcap=1.5), strict=True):
        assert_close(g, w, atol=1e-11, rtol=1e-11)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(run("torch", given, Call(Strided(stride=32), dropout=0.3))[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # A small step along q changes the output as the gradient says: both passes drew the same masks.
    q, k, v, grad = (x.detach() for x in given)
    step = torch.randn_like(q) * 1e-6
    values = []
    for sign in (1, -1):
        torch.manual_seed(5)
        moved = [(q + sign * step).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        out, *_ = run("torch", (*moved, grad), Call(Strided(stride=32), dropout=0.3))[0]
        values.append((out * grad).sum())
    assert_close((values[0] - values[1]) / 2, (results[0][1] * step).sum(), rtol=1e-4, atol=1e-9)
    assert calls


def test_long_residues_are_left_to_the_fused_operator(calls):
    plan = make_plan(Strided(stride=16), Constraint(), 16 * 520, 16 * 520, heads=1)
    assert plan.groups[0].pieces[0].repeat == 16
    shape = Shape(1, 1, 16 * 520, 16 * 520, batch=1)
    run("torch", tensors(shape, torch.float32), Call(Strided(stride=16)))
    assert not calls
