"""Attention over what a cache still holds equals attention over every key: outputs and gradients."""

import numpy as np
import pytest
import torch
from plan.keeping import held
from torch.testing import assert_close

from hf_sparse import (
    Atrous,
    BlockLocal,
    DilatedWindow,
    GlobalTokens,
    GroupedHeads,
    Longformer,
    MultiScale,
    PerHead,
    Shifted,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    Strided,
)
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.cuda_flash import attention
from hf_sparse.backends.cuda_flash.bands import bands_of
from hf_sparse.plan import Constraint, Segments, make_plan
from hf_sparse.plan.segments import Segment

from . import doubles
from .cases import Shape, tensors

PATTERNS = {
    "window": SlidingWindow(20),
    "streaming": StreamingLLM(sinks=3, window=16),
    "longformer": Longformer(window=12, global_tokens=(0, 5, 17, 40)),
    "longformer-chosen": Longformer(window=12),
    "block-local": BlockLocal(block=16, neighbours=1),
    "shifted": Shifted(group=16),
    "fixed": SparseTransformerFixed(block=8, summary=2),
    "fixed-split": SparseTransformerFixed(block=8, summary=2, heads="split"),
    "strided-absolute": Strided(6, anchor="absolute"),
    "global-ratio": GlobalTokens(ratio=0.2),
    "dilated": DilatedWindow(window=6, dilation=4),
    "multi-scale": MultiScale(window=4, scales=4),
    "dilated-longformer": Longformer(window=6, dilation=3, global_tokens=(2, 9)),
    "grouped-heads": GroupedHeads(window=8, global_token_ratio=0.2, local_heads=2),
    "union": StreamingLLM(sinks=2, window=9) | Strided(7, anchor="absolute") | GlobalTokens((4, 11)),
    "coprime": SlidingWindow(5) | Strided(3, anchor="absolute") | Strided(4, anchor="absolute"),
    "per-head": PerHead(
        (SlidingWindow(9), StreamingLLM(4, 5), SparseTransformerFixed(8, 1), Strided(4, anchor="absolute"))
    ),
    "everything-stays": Atrous(5),
}
CHOSEN = {"longformer-chosen": (1, 2, 30)}


class Cache:
    """Rows of one batch after different numbers of tokens, each with what it still holds, padded on the left.

    positions: [T] int64 of each row, ascending.
    """

    def __init__(self, pattern, lengths, q_len, lazy=0, hole=False, constraint=None, heads=4, chosen=()):
        constraint = constraint or Constraint()
        entries, self.slots, self.positions = [], [], []
        found = [held(pattern, n, q_len, constraint, lazy, heads=heads, chosen=chosen) for n in lengths]
        for (first, columns), n in zip(found, lengths, strict=True):
            early = np.empty(0, dtype=np.int64) if columns is None else columns.positions
            self.positions.append(torch.from_numpy(np.concatenate((early, np.arange(first, n)))))
        self.k_len = max(map(len, self.positions)) + 2 * hole
        for row, ((first, columns), positions) in enumerate(zip(found, self.positions, strict=True)):
            slots = torch.arange(self.k_len - len(positions), self.k_len)
            if hole:
                # Padding between what was held before and the queries.
                slots[:-q_len] -= 2
            self.slots.append(slots)
            place = slots if hole else slice(self.k_len - len(positions), self.k_len)
            entries.append(Segment(slice(row, row + 1), place, first, chosen, columns))
        self.segments = Segments(len(lengths), self.k_len, tuple(entries))

    def fill(self, row, x):
        """Return the held tokens of x [1, H, n, D] in their slots [H, T, D]."""
        out = x.new_full((x.shape[1], self.k_len, x.shape[3]), 1e3)
        out[:, self.slots[row]] = x[0, :, self.positions[row]]
        return out


def over_every_key(call, lengths, q_len, kv_heads, chosen):
    """Return per row q, k, v, the gradient of the output, and what the reference gives with its gradients."""
    rows = []
    for row, n in enumerate(lengths):
        q, k, v, grad = tensors(Shape(4, kv_heads, q_len, n, batch=1), seed=row)
        segments = Segments(1, n, (Segment(slice(0, 1), slice(0, n), 0, chosen),))
        out = attend(q, k, v, call, segments, "reference")
        rows.append(((q, k, v, grad), (out, *torch.autograd.grad(out, (q, k, v), grad))))
    return rows


def check(pattern, lengths, q_len, backend, kv_heads=2, constraint=None, chosen=(), **kept):
    call = Call(pattern, constraint or Constraint())
    rows = over_every_key(call, lengths, q_len, kv_heads, chosen)
    cache = Cache(pattern, lengths, q_len, constraint=call.constraint, chosen=chosen, **kept)
    q, grad = (torch.cat([row[0][i] for row in rows]).detach() for i in (0, 3))
    k, v = (torch.stack([cache.fill(r, row[0][i]) for r, row in enumerate(rows)]) for i in (1, 2))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with recording() as seen:
        out = attend(q, k, v, call, cache.segments, backend)
    assert seen.calls[0].backend == backend
    got = out, *torch.autograd.grad(out, (q, k, v), grad)
    for row, (_, want) in enumerate(rows):
        positions, slots = cache.positions[row], cache.slots[row]
        for mine, whole in zip(got[:2], want[:2], strict=True):
            assert_close(mine[row], whole[0], atol=1e-12, rtol=1e-12)
        for mine, whole in zip(got[2:], want[2:], strict=True):
            assert_close(mine[row][:, slots], whole[0][:, positions], atol=1e-12, rtol=1e-12)
            # Nothing is lost with what is not held, and padding gets nothing.
            assert_close(whole[0][:, positions].abs().sum(), whole[0].abs().sum())
            assert_close(mine[row].abs().sum(), mine[row][:, slots].abs().sum())
    return cache


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("q_len", [1, 3, 17])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_chunk_over_what_is_held(name, q_len, backend):
    chosen = CHOSEN.get(name, ())
    cache = check(PATTERNS[name], [97], q_len, backend, chosen=chosen)
    assert (cache.k_len < 97) == (name != "everything-stays")
    check(PATTERNS[name], [150], q_len, backend, chosen=chosen, lazy=11)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("name", PATTERNS)
def test_rows_of_different_lengths(name, q_len, backend):
    """Short rows have dropped nothing yet."""
    chosen = CHOSEN.get(name, ())
    check(PATTERNS[name], [97, 20, 64], q_len, backend, chosen=chosen)
    check(PATTERNS[name], [41, 97], q_len, backend, chosen=chosen, hole=True, lazy=3)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ["streaming", "fixed", "grouped-heads", "per-head", "coprime"])
def test_heads_share_keys(name, kv_heads):
    for q_len in (1, 6):
        check(PATTERNS[name], [90], q_len, "torch", kv_heads)


@pytest.mark.parametrize("constraint", [Constraint(window=30), Constraint(chunk=48)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_under_a_constraint_of_the_model(name, constraint):
    for q_len in (1, 7):
        check(PATTERNS[name], [110], q_len, "torch", constraint=constraint, chosen=CHOSEN.get(name, ()))


@pytest.mark.parametrize("name", ["streaming", "fixed", "per-head", "union"])
def test_many_rows_of_a_chunk(name):
    """Long enough for the fused operator and for strips."""
    check(PATTERNS[name], [700], 400, "torch")


def test_one_set_of_columns_may_serve_several_rows():
    pattern = PATTERNS["union"]
    cache = Cache(pattern, [90], 4)
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 4, cache.k_len, batch=3)))
    (segment,) = cache.segments.entries
    both = Segment(slice(1, 3), segment.slots, segment.first, (), segment.columns)
    segments = Segments(3, cache.k_len, (both,))
    got, want = (attend(q, k, v, Call(pattern), segments, backend) for backend in ("torch", "reference"))
    assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert not got[0].any() and got[1].any()


def test_auto_passes_over_flex_and_a_name_is_told_why():
    cache = Cache(PATTERNS["union"], [90], 4)
    q, k, v, _ = (x.detach().float() for x in tensors(Shape(4, 2, 4, cache.k_len, batch=1)))
    call = Call(PATTERNS["union"])
    with pytest.raises(ValueError, match="no calls over a cache whose old keys are held apart"):
        attend(q, k, v, call, cache.segments, "flex")
    with recording() as seen:
        attend(q, k, v, call, cache.segments)
    assert seen.calls[0].backend == "torch"


@pytest.mark.parametrize("name", ["streaming", "longformer", "strided-absolute", "union"])
def test_bands_of_flash_attention_lie_wherever_the_keys_are(name, monkeypatch):
    # The operators need a CUDA device; dense stand-ins with their window rule take their place.
    monkeypatch.setattr(attention, "flash_forward", doubles.flash_forward)
    monkeypatch.setattr(attention, "flash_backward", doubles.flash_backward)
    monkeypatch.setattr("hf_sparse.backends.cuda_flash.unsupported", lambda *_: [])
    for q_len in (1, 5, 17):
        cache = check(PATTERNS[name], [97, 64], q_len, "cuda_flash")
        for segment in cache.segments.entries:
            kept = {"first": segment.first, "columns": segment.columns}
            plan = make_plan(PATTERNS[name], Constraint(), q_len, segment.length, heads=4, **kept)
            assert not any(bands_of(plan, group).reasons for group in plan.groups)
