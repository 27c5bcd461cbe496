"""Making a loaded model read more tokens than it was trained for."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..active import is_switched, settings
from ..own_config import put_config
from ..placing import set_positions
from ..routing import attention_layers
from .learned import find_table, repeat_table
from .record import KEY, LEARNED_METHODS, METHODS, ROTARY_METHODS, Extension, extension_of, readable_tokens
from .rotary import rebuilt, replace_rotary, rotary_modules, scale_config

M = TypeVar("M", bound=nn.Module)


def extend_positions(model: M, length: int, method: str) -> M:
    """Make `model` read `length` tokens at once, in place, and return it; dense or patched, with its weights loaded.

    The model is then what transformers loads from the folder that ``save_pretrained`` writes of it. It needs some
    training at the new length to use it; do it before an optimizer or an adapter takes hold of the parameters.

    Args:
        method: for rotary positions "linear" (position interpolation), "ntk" (a higher base), "yarn", or "dynamic" (as
            "ntk", by the longest text so far: inputs within the trained length give the same logits as before, but a
            cache mixes keys of several lengths); for learned ones "copy" (the table repeated; inputs within
            the trained length give the same logits as before).
    Raises:
        ValueError: an unknown method, one that does not go with the model's positions, a length it can read
            already, or a model that is extended already; the model is left as it was.
    """
    base = _check(model, length, method)
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    if method in ROTARY_METHODS:
        modules = rotary_modules(base)
        scale_config(text, method, length, base)
        replace_rotary(modules, rebuilt(modules, text, method))
    else:
        table = find_table(base)
        assert table is not None  # _check has found it
        repeat_table(base, table, config, length)
    setattr(text, KEY, Extension(method, length).to_json())
    put_config(base, config)
    if (current := settings(base)) is not None:  # its rotations or its table have changed
        set_positions(base, current)
    return model


def restore_extension(model: Any, wanted: Extension | None, where: str, *, extend: bool = True) -> None:
    """Extend a base model as the one was that an adapter in `where` was trained on.

    Args:
        extend: a model that is not extended may be; else it must have been already.
    Raises:
        ValueError: the model is extended in another way, cannot be extended, or is not and must not be.
    """
    present = extension_of(model)
    if wanted == present:
        return
    if wanted is not None and present is None and extend:
        try:
            extend_positions(model, wanted.length, wanted.method)
        except ValueError as error:
            raise ValueError(f"the extension of positions saved in {where} does not fit: {error}") from error
        return
    cure = (
        "load the base as it was before"
        if wanted is None or present is not None
        else f"call hf_sparse.extend_positions(model, {wanted.length}, {wanted.method!r}) first"
    )
    raise ValueError(
        f"the adapter of {where} was trained on a base {_said(wanted)}, and this {type(model).__name__} is "
        f"{_said(present)}; {cure}"
    )


def _said(extension: Extension | None) -> str:
    return "with its own positions" if extension is None else str(extension)


def _check(model: Any, length: int, method: str) -> PreTrainedModel:
    """Return the model; raise ValueError where it cannot be extended like this."""
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r} of extending positions; use {', '.join(ROTARY_METHODS)} for rotary positions, "
            f"{', '.join(LEARNED_METHODS)} for learned ones"
        )
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(f"{name} has an adapter on it; extend the base model before the adapter goes on")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"extend_positions needs a transformers model, got {name}; extend it before wrapping it"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; only models with one of them can be extended")
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{name} has no weights in memory; load it without offloading to extend it")
    if (present := extension_of(model)) is not None:
        raise ValueError(
            f"{name} is {present} already; load the original model to extend it to {length} by {method!r}"
        )
    _check_method(model, method)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be a whole number of tokens, got {length!r}")
    readable = readable_tokens(model)
    if readable is None:
        raise ValueError(
            f"the config of {name} does not say how many tokens it was trained for; set max_position_embeddings"
        )
    if length <= readable:
        raise ValueError(
            f"{name} reads {readable} tokens already, got length={length}; extend it to more, or not at all"
        )
    return model


def _check_method(model: PreTrainedModel, method: str) -> None:
    """Raise ValueError where the method is none for the model's positions, or for its pattern."""
    name = type(model).__name__
    own: tuple[str, ...]
    if modules := rotary_modules(model):
        own, kind = ROTARY_METHODS, "rotary"
        if any(getattr(module, "config", None) is not model.config.get_text_config() for module in modules):
            raise ValueError(
                f"{name} has rotary positions that its config does not settle alone; extend another model"
            )
    elif find_table(model) is not None:
        own, kind = LEARNED_METHODS, "learned"
    else:
        raise ValueError(
            f"{name} has neither rotary positions set by its config's rope_parameters nor one table of learned "
            "positions, so there is nothing to extend; use a model with either"
        )
    if method not in own:
        raise ValueError(
            f"{name} has {kind} positions, which {method!r} cannot extend; use {' or '.join(own)}"
        )
    if method == "dynamic" and is_switched(model):
        current = settings(model)
        assert current is not None
        if any(
            current.pattern_at(i).places(i) is not None
            for i in attention_layers(model.config.get_text_config())
        ):
            raise ValueError(
                f"'dynamic' changes the rotary frequencies with the length of the text, so {current.pattern} could not "
                "turn far keys to their places; use linear, ntk or yarn"
            )
