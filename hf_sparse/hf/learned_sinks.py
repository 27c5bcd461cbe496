"""Learned sinks: a logit per query head that joins each softmax and has no value (GPT-OSS, arXiv:2508.10925).

A head whose pattern leaves out what it looked at has nowhere to put the weight it gave the first tokens, and spreads it
over what it still sees; with a sink its weights may sum to less than 1. A model that was trained without gets one per
query head and sparse layer, in a module of its own, so that adapters can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..patterns.full import Full
from ..patterns.selected_heads import of_layer
from .global_projections import projects
from .shared_heads import sinks_of_heads
from .stored_settings import SparseSettings, pattern_of_layer, query_heads

NAME = "learned_sinks"  # of the module within an attention module
# Logits are so many times their weights: an optimiser such as Adam moves a weight by about the learning rate in a step,
# and in the few hundred steps of an adaptation a logit has to go some units.
SCALE = 32.0


class LearnedSinks(nn.Module):
    """The sinks of an attention module: SCALE times `weight`, [H] float32.

    At first the logits are 0, as in "softmax off by one". Much lower ones would leave the model as it is, and be left
    alone by training: where the sink has no weight, neither has its gradient, and for many heads it points down until
    the sink is large enough to serve.
    """

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=device))

    def forward(self, query: Tensor) -> Tensor:
        """Return the logits [H] float32, the same for every `query` [B, H, Q, D]: wrappers want an input."""
        return SCALE * self.weight.float()


def set_sinks(model: PreTrainedModel, settings: SparseSettings, heads: dict[nn.Module, int]) -> None:
    """Give the attention modules of sparse layers the sinks that the settings ask for, unless they have some.

    Args:
        heads: the attention modules, each with the query heads of its calls.
    Raises:
        ValueError: nothing is sparse, global queries have projections of their own, or a module that does not hold all
            heads of its layer.
    """
    wanted = {
        module
        for module in heads
        if settings.learned_sinks and has_sinks_at(settings, getattr(module, "layer_idx", None), module)
    }
    if settings.learned_sinks and not wanted:
        raise ValueError(
            f"learned_sinks=True is for sparse layers, and {settings.pattern} leaves every layer of "
            f"{type(model).__name__} dense; leave it out"
        )
    if wanted and projects(settings.pattern):
        raise ValueError(
            "learned_sinks=True does not go with global_projections=True, whose global queries have a softmax of their "
            "own; leave one out"
        )
    for module in wanted:
        if not (whole := query_heads(model.config.get_text_config())) or heads[module] < whole:
            raise ValueError(
                f"learned_sinks=True needs one logit for each query head, and {type(module).__name__} calls attention "
                f"with {heads[module]} of {whole or 'an unknown number'}; patch the whole model first"
            )
    for module in model.modules():
        if has_sinks(module) and module not in wanted:
            delattr(module, NAME)
    for module in wanted:
        if not has_sinks(module):
            device = next((weight.device for weight in module.parameters()), model.device)
            module.add_module(NAME, LearnedSinks(heads[module], device))


def has_sinks_at(settings: SparseSettings, layer: int | None, module: nn.Module) -> bool:
    """True where the settings give the attention of a layer learned sinks: where it is sparse."""
    if not settings.learned_sinks:
        return False
    pattern = pattern_of_layer(settings, layer, type(module).__name__)
    return not isinstance(of_layer(pattern, layer or 0), Full)


def has_sinks(module: nn.Module) -> bool:
    return NAME in module._modules


def sinks(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the attention modules that have learned sinks, with the module of these."""
    return [(module, module.get_submodule(NAME)) for module in model.modules() if has_sinks(module)]


def remove_sinks(model: nn.Module) -> None:
    """Take the sinks away, also from a copy of the model they were added to."""
    for module, _ in sinks(model):
        delattr(module, NAME)


def put_sinks(model: nn.Module, kept: list[tuple[nn.Module, nn.Module]]) -> None:
    """Make `kept` (see `sinks`) the only ones that the model has."""
    remove_sinks(model)
    for module, member in kept:
        module.add_module(NAME, member)


def sinks_of_call(
    module: nn.Module,
    query: Tensor,
    settings: SparseSettings,
    layer: int | None,
    own: Tensor | None,
    *,
    is_dense: bool,
    trial: bool,
) -> Tensor | None:
    """Return the sinks [H] of one attention call, None for none.

    Args:
        own: those that the model itself passes to attention.
        is_dense: the model is run as it was before it was patched: with its own sinks only.
        trial: a forward of the patch, before the module has been given any.
    Raises:
        ValueError: sinks that the settings promise are not there, or stand beside the model's own.
    """
    name, learned = type(module).__name__, has_sinks_at(settings, layer, module)
    if learned and own is not None:
        raise ValueError(
            f"{name} has attention sinks of its own, which are trained with its other weights; leave learned_sinks out"
        )
    if learned and not has_sinks(module) and not trial:
        raise ValueError(
            f"{name} has none of the learned sinks that its settings speak of; load the model with hf_sparse.load, or "
            f"prepare it with hf_sparse.patch_model"
        )
    found = own if is_dense or not learned or not has_sinks(module) else module.get_submodule(NAME)(query)
    if found is not None and not is_dense and projects(settings.pattern):
        raise ValueError(
            f"{name} has attention sinks, and global queries with projections of their own have a softmax without; "
            f"leave global_projections out"
        )
    return None if found is None else sinks_of_heads(found, module, query)
