"""Gradient checkpointing of a model that is in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def checkpointed(base: Any) -> Iterator[None]:
    """Let every layer be computed again in the backward pass inside the block; the modules in it stay in eval mode.

    Raises:
        ValueError: a model without such layers, or one whose layers would drop out activations.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(base).__name__} has no gradient checkpointing; use checkpointing=False")
    rates = [getattr(layer, "dropout", None) for layer in layers]
    if any(isinstance(rate, float) and rate for rate in rates):
        raise ValueError(
            f"the layers of {type(base).__name__} drop out activations while they are checkpointed; "
            "set its dropout to 0, or use checkpointing=False"
        )
    # What transformers looks at in each layer; its own switch would not give back what was set before.
    wanted = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
        "training": True,
    }
    before = [{name: vars(layer)[name] for name in wanted if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(wanted)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name in wanted:
                vars(layer).pop(name)
            vars(layer).update(own)
