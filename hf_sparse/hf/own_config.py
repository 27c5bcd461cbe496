"""Giving a loaded model another config object: every module of it holds the config, or one nested in it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .active import unwrap


def own_config(model: nn.Module) -> None:
    """Give the model a config of its own: several models may have been built on one object."""
    put_config(model, copy.deepcopy(unwrap(model).config))


def put_config(model: nn.Module, config: Any) -> None:
    """Put `config`, a copy of the model's own with the same nested ones, in its place in every module."""
    old = unwrap(model).config
    replacements = {id(a): b for a, b in zip(_configs(old), _configs(config), strict=True)}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacements:
                setattr(module, name, replacements[id(value)])


def _configs(config: Any) -> list[Any]:
    nested = [getattr(config, key, None) for key in config.sub_configs]
    return [config, *(c for sub in nested if sub is not None for c in _configs(sub))]
