"""What is trained in full is held in float32 around a base of a smaller type, which would round most steps away."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = (torch.bfloat16, torch.float16)


def hold_in_float32(adapted: Any) -> None:
    """Hold the modules that a PeftModel trains in full in float32, as peft holds LoRA; each gives what it gave before.

    Weights that modules share stay shared.
    """
    from peft.utils import ModulesToSaveWrapper

    copies = [
        copy
        for wrapper in adapted.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for copy in wrapper.modules_to_save.values()
        if any(True for _ in copy.parameters())  # ModernBERT's first norm is none
    ]
    types = [
        next(copy.parameters()).dtype for copy in copies
    ]  # before the first of those that share is converted
    for copy, given in zip(copies, types, strict=True):
        if given in _SMALL:
            copy.float()
            copy.register_forward_pre_hook(_fit)
            copy.register_forward_hook(partial(_give, given))


def _fit(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn floating inputs into what the weights are in: an engine may have put them into another type since."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _give(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
