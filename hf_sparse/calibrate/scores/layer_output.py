"""The error of a layer's attention output, behind its output projection, where one unit runs a candidate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..gated import DENSE, LayerCall
from ..trial import Trial
from .base import Score, gained, register_score, share_of


@register_score("layer_output")
@dataclass(frozen=True)
class LayerOutput(Score):
    """One dense pass in which every candidate is computed too: ``|(candidate - dense) W|^2 / |dense W|^2``.

    W are the rows of the output projection that belong to the unit; all units of a layer are held against the same.
    """

    sees_choice = False

    def passes(self, shape: tuple[int, int, int]) -> float:
        return 2.0

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        candidates, count = trial.gated.candidates, trial.units.count
        projections = output_projections(trial)

        def measure(seen: LayerCall) -> Tensor:
            dense = _by_token(seen.attend(candidates[DENSE]))
            weight = matrix_of(projections[seen.layer], dense)
            whole = _squared(dense, weight)
            parts = weight.chunk(count)
            apart = [
                [_squared(*pair) for pair in zip(change.chunk(count, -1), parts, strict=True)]
                for change in (_by_token(seen.attend(one)) - dense for one in candidates)
            ]
            return share_of(torch.tensor(apart).mT, whole.cpu())

        return gained(trial.watched("layer output", self.passes(trial.shape), measure), choice)


def _by_token(out: Tensor) -> Tensor:
    """Return [N, H * D] of out [1, H, N, D]."""
    return out[0].transpose(0, 1).flatten(1)


def _squared(out: Tensor, weight: Tensor) -> Tensor:
    """Return ``|out @ weight|^2`` of out [N, R] and weight [R, d], without the product [N, d]."""
    out = out.float()
    return ((out.mT @ out) * (weight @ weight.mT)).sum()


def matrix_of(projection: nn.Module, like: Tensor) -> Tensor:
    """Return W [R, d], float32, of a module that computes ``x @ W + b``: of x [N, R] such as `like`.

    It is asked, not read: adapters, quantised and offloaded weights, and either way round of them, come out right.
    """
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
    return (projection(identity) - projection(torch.zeros_like(identity[:, :1])))[0].float()


def output_projections(trial: Trial) -> list[nn.Module]:
    """Return each layer's output projection: the first module with a matrix that the model calls behind attention.

    Raises:
        ValueError: none is called with what attention gave.
    """
    found: dict[int, nn.Module] = {}
    waiting: list[tuple[int, int]] = []  # layer and width of the attention call that is to be projected

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if waiting and inputs and isinstance(inputs[0], Tensor) and inputs[0].shape[-1] == waiting[-1][1]:
            found[waiting.pop()[0]] = module

    def watch(seen: LayerCall) -> None:
        waiting[:] = [(seen.layer, seen.asked.query.shape[1] * seen.asked.value.shape[-1])]

    few = trial.objective.windows[0].ids[:, :4].to(trial.objective.device)
    with ExitStack() as stack, torch.no_grad():
        for module in _with_matrix(trial.gated.model):
            stack.callback(module.register_forward_pre_hook(before).remove)
        stack.enter_context(trial.gated.watching(watch))
        trial.objective.head.states(few)
    if missing := sorted(set(range(trial.shape[0])) - found.keys()):
        raise ValueError(
            f"score='layer_output' needs the output projection of every layer, and that of {len(missing)} of "
            f"{trial.shape[0]} layers was not found; use score='gate_gradient'"
        )
    return [found[layer] for layer in range(trial.shape[0])]


def _with_matrix(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that have a matrix, and those of adapters around them."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        is_matrix = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        if is_matrix or isinstance(module._modules.get("base_layer"), nn.Module):
            yield module
