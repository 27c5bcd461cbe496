"""The teacher: the model that is being trained, run dense and without its adapter. No second model is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..evaluate.head import ChunkedHead, States
from ..hf.computed import computed_by, dense_instead, kept_outputs
from ..hf.hooks import mask_owner
from ..hf.placing import positions_of


class Teacher:
    """Reads a batch as the base model would: every key, the weights without the adapter, no dropout, no gradient.

    Used before the student reads the same batch; between the student's forward and its backward pass nothing of the
    model is switched but what the head of a chunk needs, and that is switched back before the next.

    Args:
        adapted: a patched PeftModel.
        head: its output head.
    Raises:
        ValueError: the pattern changes what the model's embeddings are given, so that patched it cannot run dense.
    """

    def __init__(self, adapted: Any, head: ChunkedHead) -> None:
        self.adapted, self.head = adapted, head
        base = adapted.get_base_model()
        positions = positions_of(mask_owner(base))
        if positions is not None and positions.learned is not None:
            raise ValueError(
                f"{type(base).__name__} has learned positions and its pattern gives tokens other ones, so the same "
                "model cannot be its own dense teacher; set kl_weight=0, attention_weight=0 and lm_weight=1."
            )
        self._head_trains = bool(head.trained())

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor], keep_attention: bool) -> tuple[States, list[Tensor]]:
        """Return the states of a batch and, if asked for, the output [B, H, N, D] of each attention layer in order."""
        dense = computed_by(self.adapted, dense_instead, is_dense=True)
        with self._plain(), dense, kept_outputs(self.adapted, keep_attention) as outputs:
            states = self.head.states(**inputs)
        return states, outputs

    @torch.no_grad()
    def logits(self, states: States, hidden: Tensor) -> Tensor:
        """Return the logits [B, C, V] of hidden [B, C, d], a part of ``states.hidden``."""
        if not self._head_trains:
            return self.head.logits(states, hidden)
        with self._plain():
            return self.head.logits(states, hidden)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        training = self.adapted.training
        trained = [p for p in self.adapted.parameters() if p.requires_grad]
        self.adapted.eval()
        try:
            with self.adapted.disable_adapter():
                for parameter in trained:  # else FSDP2, in its first forward pass, takes them for frozen
                    parameter.requires_grad_(True)
                yield
        finally:
            self.adapted.train(training)
