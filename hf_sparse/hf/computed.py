"""What computes the attention calls of a model, in place of its pattern alone, and what keeps their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..backends import Call, attend
from ..patterns import Pattern, get_pattern
from ..plan import Segments
from ..selectors import AnySelection

_FULL = get_pattern("full")
_COMPUTE = "_hf_sparse_compute"  # what a module's attention is computed by, and whether it is dense: the last of these
_KEPT = "_hf_sparse_kept"  # the list that a module's outputs are added to


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a forward pass.

    query: [B, H, Q, D], the last of the keys; key: [B, H_kv, K, D]; value: [B, H_kv, K, Dv].
    backend: that was asked for.
    far: queries and keys as far keys see them, of a pattern that gives them other places.
    sinks: [H], of a model that has some.
    selections: what each sequence selects, under a content-based pattern.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    call: Call
    segments: Segments
    backend: str
    far: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None
    selections: Sequence[AnySelection | None] | None = None

    def attend(self) -> Tensor:
        """Return the attention, [B, H, Q, Dv]."""
        tensors = self.query, self.key, self.value
        return attend(*tensors, self.call, self.segments, self.backend, self.far, self.sinks, self.selections)

    def under(self, pattern: Pattern) -> AttentionCall:
        """Return the same call under another pattern."""
        return replace(self, call=replace(self.call, pattern=pattern), selections=None)

    def dense(self) -> AttentionCall:
        """Return the same call with all that the model itself allows, at the places that the model gives it."""
        call = replace(self.call, pattern=_FULL, near=None)
        return replace(self, call=call, far=None, backend="auto", selections=None)


Compute = Callable[[AttentionCall], Tensor]


@contextmanager
def computed_by(model: nn.Module, compute: Compute, *, is_dense: bool = False) -> Iterator[None]:
    """Let `compute` give every sparse attention of `model` inside the block, as `AttentionCall.attend` does otherwise.

    Blocks may be nested: the one that was entered last computes, in whatever order they are left.

    is_dense: what it gives is dense attention, in which global queries have no projections of their own, and heads no
        sinks but those that the model came with.
    """
    own, modules = (compute, is_dense), list(model.modules())
    for module in modules:
        module.__dict__[_COMPUTE] = (*module.__dict__.get(_COMPUTE, ()), own)
    try:
        yield
    finally:
        for module in modules:
            others = tuple(one for one in module.__dict__.pop(_COMPUTE) if one is not own)
            if others:
                module.__dict__[_COMPUTE] = others


def compute_of(module: nn.Module) -> tuple[Compute | None, bool]:
    """Return what computes the attention of a module, None where nothing special does, and whether it is dense."""
    return module.__dict__.get(_COMPUTE, ((None, False),))[-1]


def dense_instead(asked: AttentionCall) -> Tensor:
    """Attend to all that the model itself allows, whatever the pattern: for `computed_by` with ``is_dense=True``."""
    return asked.dense().attend()


@contextmanager
def kept_outputs(model: nn.Module, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Collect what each sparse attention call of `model` gives inside the block, [B, H, Q, Dv], in order, if wanted."""
    outputs: list[Tensor] = []
    modules = list(model.modules()) if wanted else []
    for module in modules:
        module.__dict__[_KEPT] = outputs
    try:
        yield outputs
    finally:
        for module in modules:
            module.__dict__.pop(_KEPT)


def keep_output(module: nn.Module, output: Tensor) -> None:
    """Add an output [B, H, Q, Dv] to the list of `kept_outputs`, inside such a block."""
    if (kept := module.__dict__.get(_KEPT)) is not None:
        kept.append(output)
