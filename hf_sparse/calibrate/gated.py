"""A model whose every unit runs any of several candidates, or a mixture of them, without being patched anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluate.variants import base_of
from ..hf import patched
from ..hf.computed import AttentionCall, computed_by
from ..patterns import Pattern
from .units import Units

DENSE = 0  # the number of the candidate that every model begins with


@dataclass(frozen=True)
class LayerCall:
    """One attention call of a forward pass, as a `Gated` hands it to who watches; `layer` counts attention layers."""

    layer: int
    asked: AttentionCall

    def attend(self, pattern: Pattern) -> Tensor:
        """Return the attention [B, H, N, D] of this call under another pattern."""
        return self.asked.under(pattern).attend()


class Gated:
    """Runs a model under choices and mixtures of candidates.

    Args:
        model: a transformers model or a PeftModel of one; patched or not.
        candidates: what a unit may run, dense first.
        backend: of the candidates.
    """

    def __init__(self, model: Any, units: Units, candidates: Sequence[Pattern], backend: str) -> None:
        self.model, self.units, self.candidates, self.backend = model, units, tuple(candidates), backend
        self._number = {layer: number for number, layer in enumerate(units.layers)}

    @contextmanager
    def choosing(self, choice: np.ndarray) -> Iterator[None]:
        """Run inside the block what `choice`, int [L, U], says."""
        rows = [self.units.layer_pattern(row, self.candidates) for row in choice]
        with self._computed(lambda seen: seen.attend(rows[seen.layer])):
            yield

    @contextmanager
    def mixing(self, gates: Tensor) -> Iterator[None]:
        """Run inside the block every unit as the mixture that `gates` [L, U, C] gives its candidates.

        Gradients reach every gate, those that are 0 included; a candidate that no unit of a layer mixes in is computed
        without a graph, as no gradient goes through it to the layers below.
        """

        def compute(seen: LayerCall) -> Tensor:
            own = gates[seen.layer]
            mixed = [bool(own[:, number].any()) for number in range(len(self.candidates))]
            outs = []
            for candidate, used in zip(self.candidates, mixed, strict=True):
                with torch.set_grad_enabled(used and torch.is_grad_enabled()):
                    outs.append(seen.attend(candidate))
            per_head = own.to(seen.asked.query.device).repeat_interleave(self.units.size, 0)
            return _Mixture.apply(per_head, tuple(mixed), *outs)

        with self._computed(compute):
            yield

    @contextmanager
    def watching(self, watch: Callable[[LayerCall], None]) -> Iterator[None]:
        """Run the dense model inside the block, and hand every attention call to `watch` before it is computed."""

        def compute(seen: LayerCall) -> Tensor:
            watch(seen)
            return seen.attend(self.candidates[DENSE])

        with self._computed(compute):
            yield

    @contextmanager
    def _computed(self, compute: Callable[[LayerCall], Tensor]) -> Iterator[None]:
        def own(asked: AttentionCall) -> Tensor:
            return compute(LayerCall(self._number[asked.call.layer], replace(asked, backend=self.backend)))

        base = base_of(self.model)
        dense = np.full(self.units.shape, DENSE)
        # One pattern per layer, so that a model whose attention does not know its layer is refused.
        with patched(base, self.units.pattern(dense, self.candidates)), computed_by(base, own):
            yield


class _Mixture(torch.autograd.Function):
    """``sum_c gates[h, c] * outs[c]``, with a gradient for every gate and for those outs that are mixed in."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, mixed: tuple[bool, ...], *outs: Tensor) -> Tensor:
        """Return [B, H, N, D] of gates [H, C] and outs, each [B, H, N, D]; mixed[c] where some gate of c is not 0.

        The gates and their gradients keep their own precision where the outs have less.
        """
        ctx.save_for_backward(gates, *outs)
        ctx.mixed = mixed
        total = None
        for number, (out, used) in enumerate(zip(outs, mixed, strict=True)):
            if used:
                part = out * gates[:, number, None, None].to(out.dtype)
                total = part if total is None else total.add_(part)
        assert total is not None, "some candidate is always mixed in"
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, *outs = ctx.saved_tensors
        exact = torch.promote_types(gates.dtype, torch.float32)
        per_gate = torch.stack([(grad * out).sum((0, 2, 3), dtype=exact) for out in outs], -1)
        through = [
            grad * gates[:, number, None, None].to(grad.dtype) if used else None
            for number, used in enumerate(ctx.mixed)
        ]
        return per_gate.to(gates.dtype), None, *through
