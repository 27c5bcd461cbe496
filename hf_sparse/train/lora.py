"""LoRA around a patched model: which layers it goes to, and the normalisation layers trained beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import AdaptationArguments

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: Any, arguments: AdaptationArguments) -> PeftModel:
    """Return the model wrapped in peft's LoRA; only LoRA weights and, if asked for, normalisation layers will train.

    Raises:
        ValueError: a named target is not a linear layer of the model, or no layer was named and none was found.
    """
    from peft import LoraConfig, get_peft_model

    targets = _checked_targets(model, arguments.lora_targets) or attention_targets(model)
    linear = [module for name, module in model.named_modules() if _is_target(name, module, targets)]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=norm_names(model) if arguments.train_norms else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def attention_targets(model: Any) -> list[str]:
    """Return the linear layers of the decoder's attention, e.g. ``self_attn.q_proj``; query, key, value and output.

    Raises:
        ValueError: the decoder has no module whose class is called ...Attention with linear layers of its own.
    """
    names = {
        f"{path.rpartition('.')[2]}.{child}"
        for path, module in model.get_decoder().named_modules()
        if type(module).__name__.endswith("Attention")
        for child, layer in module.named_children()
        if isinstance(layer, (nn.Linear, Conv1D))
    }
    if not names:
        raise ValueError(
            f"no linear layers were found in the attention of {type(model).__name__}; name them with lora_targets."
        )
    return sorted(names)


def norm_names(model: Any) -> list[str] | None:
    """Return the names of the decoder's normalisation layers, e.g. ``input_layernorm``; None where it has none."""
    names = {
        path.rpartition(".")[2]
        for path, module in model.get_decoder().named_modules()
        if type(module).__name__.endswith("Norm") and any(True for _ in module.parameters(recurse=False))
    }
    return sorted(names) or None


def _checked_targets(model: Any, targets: list[str] | None) -> list[str] | str | None:
    if targets == ["all-linear"]:
        return "all-linear"
    for target in targets or ():
        if not any(_is_target(name, module, [target]) for name, module in model.named_modules()):
            raise ValueError(
                f"lora_targets names {target!r}, which is no linear layer of {type(model).__name__}; "
                f"its attention has: {', '.join(attention_targets(model))}."
            )
    return targets


def _is_target(name: str, module: nn.Module, targets: list[str] | str) -> bool:
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    return isinstance(targets, str) or any(
        name == target or name.endswith(f".{target}") for target in targets
    )
