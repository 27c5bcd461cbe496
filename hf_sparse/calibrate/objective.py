"""What a choice is judged by: nats per token, or the divergence from the dense model, in chunks of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..evaluate.head import ChunkedHead, States
from .windows import IGNORED, Window

KINDS = ("loss", "kl")


def check_objective(kind: str) -> None:
    """Raise ValueError unless it is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"objective must be one of {', '.join(KINDS)}, got {kind!r}")


class Objective:
    """Gives one figure per window: the mean over its targets of the cross-entropy, or of KL(dense, model), in nats.

    Logits are held for `head.chunk` positions at a time, in the backward pass too. The divergence keeps the dense
    model's states of every window, [1, N, d] each, on the CPU.

    Args:
        kind: "loss" or "kl".
        device: where the inputs go.
    """

    def __init__(self, head: ChunkedHead, windows: Sequence[Window], kind: str, device: torch.device) -> None:
        self.head, self.windows, self.kind, self.device = head, windows, kind, device
        self._dense: dict[int, Tensor] = {}

    @property
    def needs_dense(self) -> bool:
        """True where the dense model reads every window once before anything can be judged."""
        return self.kind == "kl"

    @torch.no_grad()
    def read_dense(self, number: int) -> None:
        """Keep the states of a window; the model must be running dense."""
        self._dense[number] = self.states(number).hidden.cpu()

    def states(self, number: int) -> States:
        """Return the states of a window for the model as it runs now."""
        return self.head.states(self.windows[number].ids.to(self.device))

    @torch.no_grad()
    def value(self, number: int) -> float:
        """Return the figure of a window for the model as it runs now."""
        states = self.states(number)
        return sum(float(part) for part in self._parts(states, states.hidden, number))

    def backward(self, number: int) -> float:
        """Add the gradient of the figure of a window to what requires one, and return the figure."""
        states = self.states(number)
        hidden = states.hidden.detach().requires_grad_()
        total = 0.0
        for part in self._parts(states, hidden, number):
            part.backward()
            total += float(part.detach())
        states.hidden.backward(hidden.grad)
        return total

    def _parts(self, states: States, hidden: Tensor, number: int) -> Iterator[Tensor]:
        """Yield the figure of `hidden` [1, N, d] in parts, which add up to it."""
        targets = self.windows[number].targets.to(hidden.device)
        count = int((targets != IGNORED).sum())
        for begin in range(0, targets.shape[1], self.head.chunk):
            at = slice(begin, begin + self.head.chunk)
            wanted = targets[:, at]
            if not (wanted != IGNORED).any():
                continue
            logits = self.head.logits(states, hidden[:, at])
            wanted = wanted.to(logits.device)
            if self.kind == "loss":
                losses = nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                yield losses / count
                continue
            with torch.no_grad():
                dense = self.head.logits(states, self._dense[number][:, at].to(hidden.device))
            apart = nn.functional.kl_div(
                logits.float().log_softmax(-1),
                dense.float().log_softmax(-1),
                reduction="none",
                log_target=True,
            ).sum(-1)
            yield (apart * (wanted != IGNORED)).sum() / count
