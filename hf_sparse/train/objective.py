"""What a step minimises: divergence from the dense model, cross-entropy, distance of the attention outputs.

Distilling a model into its own sparse form follows the attention transfer and low-rank fine-tuning of LoLCATs
(arXiv:2410.10254), with one model in memory: the teacher is the same weights without the adapter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..evaluate.head import ChunkedHead, States
from .chunked_loss import IGNORED, ChunkLoss, chunked_loss
from .config.objective import ObjectiveArguments
from .student import StudentAttention
from .teacher import Teacher


class Loss(NamedTuple):
    """The weighted sum, with a gradient, and its parts without one, each in its own unit."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The loss of a batch.

    Args:
        adapted: a patched PeftModel, not wrapped for training.
        student: what its attention runs as while a batch is trained on.
    Raises:
        ValueError: a model without an output head that runs in chunks, or one that cannot be its own teacher.
    """

    def __init__(self, adapted: Any, arguments: ObjectiveArguments, student: StudentAttention) -> None:
        self.arguments, self.student = arguments, student
        self.head = ChunkedHead(adapted, arguments.head_chunk)
        distils = arguments.kl_weight or arguments.attention_weight
        self.teacher = Teacher(adapted, self.head) if distils else None

    def __call__(self, model: Any, batch: dict[str, Tensor], count: Tensor | int | None = None) -> Loss:
        """Return the loss of a batch.

        Args:
            model: what is called for the student's forward pass: the PeftModel, or what it is wrapped in.
            batch: ``input_ids`` [B, N] and ``labels`` [B, N], -100 where nothing is to be predicted; anything else goes
                to the model.
            count: predicted tokens that the loss is the mean over, those of other batches of the step included; None
                counts this batch.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        targets = batch["labels"] if self.head.masked else pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        own = (targets != IGNORED).sum()
        count = own.clamp(min=1) if count is None else count
        settings = self.arguments
        taught: States | None = None
        wanted: list[Tensor] = []
        if self.teacher is not None:
            taught, wanted = self.teacher.read(inputs, bool(settings.attention_weight))
        with self.student.keeping(bool(settings.attention_weight)) as given:
            states = self.head.states(**inputs, through=model)
        total = states.hidden.new_zeros((), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        if settings.kl_weight or settings.lm_weight:
            teacher = self.teacher if settings.kl_weight else None
            # hidden states may lie on the last of several devices
            targets = targets.to(states.hidden.device)
            per_chunk = ChunkLoss(self.head, states, teacher, taught, targets, settings)
            total, kl, lm = chunked_loss(per_chunk, states.hidden, self.head.trained())
            total = total / count
            if settings.kl_weight:
                parts["kl"] = kl / count
            if settings.lm_weight:
                parts["lm"] = lm / count
        if settings.attention_weight:
            apart = _distance(given, wanted) * (own / count)
            parts["attention"] = apart.detach()
            total = total + settings.attention_weight * apart.to(total.device)
        return Loss(total, parts)


def _distance(given: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Return the mean over layers of the squared distance, as a share of the square of what is wanted.

    Args:
        given, wanted: [B, H, N, D] of each layer.
    Raises:
        ValueError: no gradient goes through what is given.
    """
    assert len(given) == len(wanted) > 0, "teacher and student run the same layers"
    if torch.is_grad_enabled() and not any(out.requires_grad for out in given):
        raise ValueError(
            "attention_weight needs attention outputs with gradients, which reentrant gradient checkpointing does not "
            "give; set gradient_checkpointing_kwargs to {use_reentrant: false}."
        )
    distances = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp(min=1e-12)
        for ours, theirs in zip(given, wanted, strict=True)
    ]
    return torch.stack([d.to(distances[0].device) for d in distances]).mean()
