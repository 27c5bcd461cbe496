"""LoRA around a patched model: which layers it goes to, and what is trained in full beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..evaluate.head import is_masked
from ..hf.extension import extension_of, position_tables
from ..hf.global_projections import NAMES, projections
from ..hf.hooks import mask_owner
from ..hf.learned_sinks import NAME as SINKS
from ..hf.learned_sinks import sinks
from ..hf.loading import reason
from .config import AdaptationArguments
from .in_full import hold_in_float32

if TYPE_CHECKING:
    from peft import PeftModel

# The output projection of BERT's attention is in a module of its own.
_ATTENTION = ("Attention", "SelfOutput")


def add_lora(model: Any, arguments: AdaptationArguments) -> PeftModel:
    """Return the model wrapped in peft's LoRA, with exactly those weights trainable that `arguments` name.

    What the pattern brings along trains in full whatever is asked for: the projections of global queries, learned
    sinks, and learned positions that were copied to make the model longer.

    Raises:
        ValueError: a named target is not a linear layer of the model, no layer was named and none was found, or peft
            cannot put this LoRA on them.
    """
    from peft import LoraConfig, get_peft_model

    targets = _checked_targets(model, arguments.lora_targets) or attention_targets(model)
    linear = [module for name, module in model.named_modules() if _is_target(name, module, targets)]
    in_full = [
        *(norm_names(model) if arguments.train_norms else ()),
        *(NAMES if projections(model) else ()),
        *((SINKS,) if sinks(model) else ()),
        *(position_tables(model) if extension_of(model) is not None else ()),
        *(embedding_names(model) if arguments.train_embeddings else ()),
    ]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        modules_to_save=in_full or None,
        # a head tied to trained embeddings is the same weight afterwards too
        ensure_weight_tying=arguments.train_embeddings
        and bool(model.config.get_text_config().tie_word_embeddings),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear),
        task_type=None if is_masked(model) else "CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        cure = "leave use_dora out, or " if arguments.use_dora else ""
        raise ValueError(
            f"peft cannot put this LoRA on {type(model).__name__} ({reason(error)}); {cure}name other layers with "
            "lora_targets."
        ) from error
    hold_in_float32(adapted)
    return adapted


def attention_targets(model: Any) -> list[str]:
    """Return the linear layers of the model's attention, e.g. ``self_attn.q_proj``; query, key, value and output.

    Raises:
        ValueError: it has no module whose class is called ...Attention with linear layers of its own.
    """
    names = {
        f"{path.rpartition('.')[2]}.{child}"
        for path, module in mask_owner(model).named_modules()
        if type(module).__name__.endswith(_ATTENTION)
        for child, layer in module.named_children()
        if isinstance(layer, (nn.Linear, Conv1D)) and child not in NAMES
    }
    if not names:
        raise ValueError(
            f"no linear layers were found in the attention of {type(model).__name__}; name them with lora_targets."
        )
    return sorted(names)


def norm_names(model: Any) -> list[str]:
    """Return the names of the model's normalisation layers, e.g. ``input_layernorm``."""
    names = {
        path.rpartition(".")[2]
        for path, module in mask_owner(model).named_modules()
        if type(module).__name__.endswith("Norm") and any(True for _ in module.parameters(recurse=False))
    }
    return sorted(names)


def embedding_names(model: Any) -> list[str]:
    """Return the name of the token embeddings, e.g. ``embed_tokens``."""
    tokens = model.get_input_embeddings()
    return [path.rpartition(".")[2] for path, module in model.named_modules() if module is tokens]


def _checked_targets(model: Any, targets: list[str] | None) -> list[str] | str | None:
    if targets == ["all-linear"]:
        return "all-linear"
    for target in targets or ():
        if not any(_is_target(name, module, [target]) for name, module in model.named_modules()):
            raise ValueError(
                f"lora_targets names {target!r}, which is no linear layer of {type(model).__name__}; "
                f"its attention has: {', '.join(attention_targets(model))}."
            )
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        named = [name for name, module in model.named_modules() if module is head]
        if any(_is_target(name, head, targets or []) for name in named):
            raise ValueError(
                f"lora_targets names {named[0]}, the head of {type(model).__name__} whose weight the embeddings share: "
                "it could not be merged; train both with train_embeddings, or leave it out."
            )
    return targets


def _is_target(name: str, module: nn.Module, targets: list[str] | str) -> bool:
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    return isinstance(targets, str) or any(
        name == target or name.endswith(f".{target}") for target in targets
    )
