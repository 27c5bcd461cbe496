"""What the attention of the model in training runs as: its pattern, with a wider window while it narrows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ..hf.computed import AttentionCall, computed_by, kept_outputs
from ..patterns import Union
from ..patterns.sliding_window import SlidingWindow


class StudentAttention:
    """Lets a window stand beside the pattern for a step, and keeps what the attention layers give.

    The window stands for a whole step, forward and backward pass: layers that gradient checkpointing computes again run
    as they did before.

    Args:
        adapted: a patched PeftModel.
    """

    def __init__(self, adapted: Any) -> None:
        self.adapted = adapted

    @contextmanager
    def widened(self, window: int | None) -> Iterator[None]:
        """Let every sparse layer see the last `window` keys too inside the block; None is the pattern alone."""
        if window is None:
            yield
            return
        with computed_by(self.adapted, partial(_attend, SlidingWindow(window))):
            yield

    @contextmanager
    def keeping(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Give the list of the outputs [B, H, N, D] of the attention layers run inside the block, if wanted."""
        with kept_outputs(self.adapted, wanted) as outputs:
            yield outputs


def _attend(window: SlidingWindow, asked: AttentionCall) -> Tensor:
    return asked.under(Union.of(asked.call.pattern, window)).attend()
