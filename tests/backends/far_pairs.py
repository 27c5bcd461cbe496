"""Calls with far pairs: patterns, tensors, and what a backend gives."""

import torch
from torch.testing import assert_close

from hf_sparse import Full, Longformer, PerHead, Random, SlidingWindow, StreamingLLM, Strided, get_pattern
from hf_sparse.backends import attend, recording
from hf_sparse.patterns.base import Pattern

from .cases import tensors


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
