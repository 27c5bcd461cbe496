"""Cross-entropy and divergence over a large vocabulary, the logits of a chunk of positions at a time.

The gradient of a chunk is computed as soon as its loss is, so that neither pass holds logits of more than one chunk, as
in Liger Kernel's fused losses (arXiv:2410.10989), here for whatever the model does behind its body.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..evaluate.head import ChunkedHead, States
from .config.objective import ObjectiveArguments
from .engine import gathered
from .teacher import Teacher

IGNORED = -100  # label of what is not to be predicted


class ChunkLoss(NamedTuple):
    """What the loss of a chunk is computed from.

    states, taught: of the student and of the teacher; targets: int64 [B, N], -100 where nothing is predicted.
    """

    head: ChunkedHead
    states: States
    teacher: Teacher | None
    taught: States | None
    targets: Tensor
    arguments: ObjectiveArguments

    def chunks(self) -> Iterator[slice]:
        """Yield the positions of each chunk with anything to predict."""
        step = max(1, self.head.chunk // len(self.targets))
        for begin in range(0, self.targets.shape[1], step):
            at = slice(begin, begin + step)
            if (self.targets[:, at] != IGNORED).any():
                yield at

    def at(self, at: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the targets of a chunk, in nats: KL(teacher, student), and cross-entropy.

        Args:
            hidden: [B, C, d], the student's.
        """
        targets = self.targets[:, at]
        taught = None
        if self.teacher is not None and self.taught is not None:  # first: it may switch the head
            dense = self.teacher.logits(self.taught, self.taught.hidden[:, at])
            taught = dense.float().log_softmax(-1)
        logits = self.head.logits(self.states, hidden).float()
        targets = targets.to(logits.device)
        divergence, entropy = logits.new_zeros(()), logits.new_zeros(())
        if taught is not None:
            apart = (taught.exp() * (taught - logits.log_softmax(-1))).sum(-1)
            divergence = (apart * (targets != IGNORED)).sum()
        if self.arguments.lm_weight:
            entropy = cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        return divergence, entropy


def chunked_loss(
    per_chunk: ChunkLoss, hidden: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum over all targets, with a gradient, and its two sums without one, in nats.

    Args:
        hidden: [B, N, d], the student's.
        parameters: of the head, those that are trained.
    """
    with gathered(per_chunk.head.model):
        return _ChunkedLoss.apply(per_chunk, hidden, *parameters)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_chunk: ChunkLoss, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad)
        settings = per_chunk.arguments
        sums = [hidden.new_zeros((), dtype=torch.float32) for _ in range(3)]
        grads = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)] if wanted else []
        for at in per_chunk.chunks():
            with torch.set_grad_enabled(wanted):
                part = hidden[:, at].detach().requires_grad_(wanted)
                divergence, entropy = per_chunk.at(at, part)
                total = settings.kl_weight * divergence + settings.lm_weight * entropy
            for kept, one in zip(sums, (total, divergence, entropy), strict=True):
                kept += one.detach().to(kept.device)
            if wanted:
                own, *shared = torch.autograd.grad(total, (part, *parameters), allow_unused=True)
                grads[0][:, at] = own
                for kept, one in zip(grads[1:], shared, strict=True):
                    if one is not None:
                        kept += one
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *((grad.to(own.device) * own).to(own.dtype) for own in ctx.saved_tensors)
