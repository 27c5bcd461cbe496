"""Shapes, batches and the oracle the backends are compared with: softmax over a written mask, in float64."""

from dataclasses import dataclass

import torch

from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.backends import Call, attend, recording
from hf_sparse.plan import Constraint, Segments

# Pattern, and its disjoint pieces for one causal sequence that is longer than everything in it.
PATTERNS = {
    "full": (Full(), 1),
    "window": (SlidingWindow(window=37), 1),
    "window-1": (SlidingWindow(window=1), 1),
    "strided": (Strided(stride=5), 1),
    "strided-absolute": (Strided(stride=8, anchor="absolute"), 2),
    "longformer": (Longformer(window=24, global_tokens=(0, 7, 40)), 2),
    "streaming": (StreamingLLM(sinks=2, window=30), 2),
    "window-or-strided": (SlidingWindow(window=9) | Strided(stride=5), 2),
    "two-strides": (Strided(stride=3) | Strided(stride=4), 2),
}


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    width: int = 8
    v_width: int = 8
    batch: int = 2


SHAPES = {
    "one-token": Shape(2, 2, 1, 1),
    "odd-length": Shape(2, 2, 131, 131),
    "long": Shape(1, 1, 277, 277, batch=1),
    "gqa": Shape(4, 2, 97, 97, width=12),
    "mqa": Shape(4, 1, 65, 65),
    "dv-wider": Shape(2, 1, 70, 70, v_width=12),
    "dv-narrower": Shape(2, 2, 70, 70, v_width=5),
    "decode-step": Shape(4, 2, 1, 90),
    "chunked-prefill": Shape(2, 1, 41, 128),
}


def segments(kind: str, shape: Shape) -> tuple[Segments | None, torch.Tensor]:
    """Return the segments of a batch, and a label per slot [B, K], -1 = padding."""
    labels = torch.zeros(shape.batch, shape.k_len, dtype=torch.long)
    third = shape.k_len // 3
    if kind == "left":
        labels[0, :third] = -1
    elif kind == "right":
        labels[0, shape.k_len - third :] = -1
    elif kind == "holes":
        labels[0, third : 2 * third] = -1
        labels[-1, :3:2] = -1
    elif kind == "packed":
        labels[:] = torch.arange(shape.k_len) // (third + 1)
    elif kind == "packed-padded":
        labels[:] = torch.arange(shape.k_len) // (third + 1)
        labels[0, : third // 2] = -1
    elif kind == "empty-row":
        labels[0] = -1
    if kind == "plain":
        return None, labels
    return Segments.from_labels(labels), labels


def written_mask(pattern, causal, labels, shape: Shape) -> torch.Tensor:
    """Return the mask [B, H, Q, K] row by row: the pattern's own picture laid over each sequence's slots."""
    mask = torch.zeros(shape.batch, shape.heads, shape.k_len, shape.k_len, dtype=torch.bool)
    for row in range(shape.batch):
        for label in labels[row].unique().tolist():
            if label >= 0:
                slots = (labels[row] == label).nonzero()[:, 0]
                mask[row][:, slots[:, None], slots] = pattern.mask(
                    len(slots), heads=shape.heads, causal=causal
                )
    return mask[:, :, shape.k_len - shape.q_len :]


def tensors(shape: Shape, dtype=torch.float64, seed=0, scale=1.0):
    """Return q, k, v and an output gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, length, width):
        x = torch.randn(shape.batch, length, heads, width, generator=generator, dtype=torch.float64) * scale
        return x.transpose(1, 2).to(dtype)

    return (
        draw(shape.heads, shape.q_len, shape.width).requires_grad_(),
        draw(shape.kv_heads, shape.k_len, shape.width).requires_grad_(),
        draw(shape.kv_heads, shape.k_len, shape.v_width).requires_grad_(),
        draw(shape.heads, shape.q_len, shape.v_width),
    )


def oracle(q, k, v, mask, softcap=None):
    """Return softmax(q k^T / sqrt(D)) v over the mask; rows without a key give 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    tiny = torch.finfo(weights.dtype).tiny
    return weights / weights.sum(-1, keepdim=True).clamp_min(tiny) @ v


def run(backend, tensors, call, segments=None):
    """Return (output, dq, dk, dv) and the record of the call."""
    q, k, v, grad = tensors
    with recording() as seen:
        out = attend(q, k, v, call, segments, backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad)), seen.calls[0]


def truth(tensors, pattern, causal, labels, shape, softcap=None):
    """Return (output, dq, dk, dv) of the oracle in float64."""
    q, k, v, grad = (x.detach().double().requires_grad_() for x in tensors)
    out = oracle(q, k, v, written_mask(pattern, causal, labels, shape), softcap)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def call_of(name: str, causal: bool = True, **options) -> Call:
    return Call(PATTERNS[name][0], Constraint(causal), **options)
