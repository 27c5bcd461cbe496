"""What the attention of the model in training runs as: its pattern, with a wider window while it narrows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..backends import Call, attend
from ..hf.attention import computed_by
from ..patterns import Union
from ..patterns.sliding_window import SlidingWindow
from ..plan import Segments


class StudentAttention:
    """Lets a window stand beside the pattern for a step, and keeps what the attention layers give.

    Both hold for a whole step, forward and backward pass: layers that gradient checkpointing computes again run as they
    did before.

    Args:
        adapted: a patched PeftModel.
    """

    def __init__(self, adapted: Any) -> None:
        self.adapted = adapted
        self._window: int | None = None
        self._outputs: list[Tensor] | None = None

    @contextmanager
    def widened(self, window: int | None) -> Iterator[None]:
        """Let every sparse layer see the last `window` keys too inside the block; None is the pattern alone."""
        if window is None:
            yield
            return
        self._window = window
        try:
            with computed_by(self.adapted, self._attend):
                yield
        finally:
            self._window = None

    @contextmanager
    def keeping(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Give the list of the outputs [B, H, N, D] of the attention layers run inside the block, if wanted."""
        outputs: list[Tensor] = []
        if not wanted:
            yield outputs
            return
        self._outputs = outputs
        try:
            with computed_by(self.adapted, self._attend):
                yield outputs
        finally:
            self._outputs = None

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
        segments: Segments,
        backend: str,
        far: Any,
    ) -> Tensor:
        if self._window is not None:
            call = replace(call, pattern=Union.of(call.pattern, SlidingWindow(self._window)))
        out = attend(query, key, value, call, segments, backend, far)
        if self._outputs is not None:
            self._outputs.append(out)
        return out
