"""Hooks that a patch leaves on a model's modules: plain functions, so that a copy of the model can lose them too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

Hook = Callable[..., Any]


def add_hook(module: nn.Module, hook: Hook, *, after: bool = False, first: bool = False) -> None:
    """Call `hook` before each forward of `module`, or after it, whether it returns or raises; keywords included.

    first: before the hooks that are there.
    """
    if after:
        module.register_forward_hook(hook, with_kwargs=True, always_call=True, prepend=first)
    else:
        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)


def find_hooks(model: nn.Module, ours: Collection[Hook]) -> list[tuple[nn.Module, Hook, bool]]:
    """Return which of the hooks `ours` the model's modules carry, as (module, hook, after)."""
    return [
        (module, hook, after)
        for module in model.modules()
        for after, registry in ((False, module._forward_pre_hooks), (True, module._forward_hooks))
        for hook in registry.values()
        if hook in ours
    ]


def remove_hooks(model: nn.Module, ours: Collection[Hook]) -> None:
    """Remove the hooks `ours`, also from a copy of the model they were added to."""
    for module, hook, after in find_hooks(model, ours):
        registries: tuple[dict[int, Any], ...]
        if after:
            registries = (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            )
        else:
            registries = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        key = next(k for k, h in registries[0].items() if h is hook)
        for registry in registries:
            registry.pop(key, None)


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return what a call of `module` passes for the parameter `name`, by keyword or by place; None where nothing."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def with_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of `module` with `value` for the parameter `name`, wherever it was passed."""
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def mask_owner(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost model of the text config, whose forward makes the masks."""
    config = model.config.get_text_config()
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config][-1]
