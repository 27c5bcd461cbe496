"""One cell of the suite: a pattern at a length, with the tensors' shape and device; and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_sparse import Pattern
from hf_sparse.backends import Call
from hf_sparse.plan import Constraint, make_plan

from .cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """A peer that is not installed, or cannot compute the cell; the message says why."""


@dataclass(frozen=True)
class Shape:
    """Tensors of one call, batch 1."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def gqa(self) -> bool:
        return self.heads != self.kv_heads

    @property
    def described(self) -> dict[str, Any]:
        """The shape as rows of results have it."""
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tensors(self, q_len: int, k_len: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query [1, H, Q, D], key and value [1, H_kv, K, D], and an output gradient like query.

        On CUDA they lie in memory as a model's projections leave them, [1, N, H, D]; a cache lies as it is indexed.
        """
        projected = self.device.type == "cuda" and q_len == k_len
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(heads: int, length: int) -> Tensor:
            shape = (1, length, heads, self.head_dim) if projected else (1, heads, length, self.head_dim)
            drawn = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
            return drawn.transpose(1, 2) if projected else drawn

        return (
            draw(self.heads, q_len),
            draw(self.kv_heads, k_len),
            draw(self.kv_heads, k_len),
            draw(self.heads, q_len),
        )

    def unit_bytes(self, q_len: int, k_len: int) -> int:
        """Return the bytes of query, key, value and output together."""
        elements = 2 * self.heads * q_len + 2 * self.kv_heads * k_len
        return elements * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Task:
    case: Case
    length: int
    shape: Shape

    @cached_property
    def pattern(self) -> Pattern:
        pattern = self.case.pattern(self.length)
        pattern.check_fit(self.shape.heads, 1)
        return pattern

    @property
    def constraint(self) -> Constraint:
        return Constraint(self.case.causal)

    @property
    def call(self) -> Call:
        return Call(self.pattern, self.constraint)

    @cached_property
    def heads_differ(self) -> bool:
        plan = make_plan(self.pattern, self.constraint, self.length, self.length, heads=self.shape.heads)
        return len(plan.groups) > 1 or any(t.lists.shape[0] > 1 for g in plan.groups for t in g.tiles)

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return what pattern and causality allow, for positions that broadcast with one another."""
        context = self.constraint.context(self.pattern, layer=0, heads=self.shape.heads, length=self.length)
        return self.constraint.allowed(self.pattern, context, head, query, key)

    def error(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int = 24) -> float:
        """Return the largest error of `out` in some rows against a masked softmax in float32 over all keys.

        The queries sit at the last Q of the K positions.
        """
        q_len, k_len = q.shape[2], k.shape[2]
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randint(q_len, (rows,), generator=generator)
        chosen = torch.cat([chosen, torch.tensor([0, q_len - 1])]).unique().to(q.device)
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        query = (chosen + k_len - q_len)[None, :, None]
        allowed = self.allowed(heads, query, torch.arange(k_len, device=q.device)[None, None, :])
        allowed = allowed.expand(q.shape[1], len(chosen), k_len)
        groups = q.shape[1] // k.shape[1]
        # Query heads of a group beside one another: [H_kv, G * rows, D] against [H_kv, K, D].
        some = q[0, :, chosen].float().reshape(k.shape[1], groups * len(chosen), -1)
        scores = some @ k[0].float().mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~allowed.reshape(scores.shape), float("-inf"))
        want = (scores.softmax(-1) @ v[0].float()).reshape(q.shape[1], len(chosen), -1)
        return float((out[0, :, chosen].float() - want).abs().max())
