"""Putting a pattern into a loaded model, and taking it out again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..backends import check_backend
from ..patterns import Pattern, pattern_class
from ..patterns.probe import check_predicate
from .active import is_switched, unwrap
from .forward import FORWARD_HOOKS, add_forward_hooks
from .generation import let_generate_make_caches, stop_making_caches
from .global_projections import projections, put_projections, remove_projections, set_projections
from .global_tokens import (
    GLOBAL_HOOKS,
    add_global_hooks,
    check_globals_arrive,
    let_generate_take_globals,
    remove_global_hooks,
)
from .hooks import add_hook, find_hooks, mask_owner, remove_hooks
from .learned_sinks import put_sinks, remove_sinks, set_sinks, sinks
from .own_config import own_config, put_config
from .pattern_file import is_pattern_file, naming_its_file, settings_of
from .placing import positions_of, put_positions, remove_positions, set_positions
from .routing import (
    POSITION_HOOKS,
    add_position_hook,
    check_selecting_layers,
    heads_of_calls,
    is_causal,
    refuse_unroutable,
    text_config_key,
    verify_routing,
)
from .stored_settings import (
    PREFIX,
    SparseSettings,
    attention_name,
    check_comes_back,
    check_fit,
    layer_count,
    query_heads,
    settings_to_json,
)

M = TypeVar("M", bound=nn.Module)
_RESTORE = "_hf_sparse_replaced"  # attribute of a patched model: the attention implementation it had before


def patch_model(
    model: M,
    pattern: str | os.PathLike[str] | Pattern | SparseSettings,
    *,
    backend: str = "auto",
    layers: Iterable[int] | None = None,
    seq_len: int | None = None,
    learned_sinks: bool = False,
    **options: Any,
) -> M:
    """Make every attention layer of `model` run under `pattern`, and return the model.

    Where the pattern takes globals, the model's forward and generate() take ``global_attention_mask``, [B, N] with 1
    for each global token, as transformers' Longformer does; with a cache, for all tokens seen or the new ones alone.

    Patching again replaces the pattern. The settings are kept in ``model.config.sparse_attention`` and saved with the
    model; `hf_sparse.load` restores them.

    Args:
        pattern: a registered name, which takes `options`, or a pattern object: a union such as
            ``SlidingWindow(512) | Strided(64)``, one pattern per query head or one per layer; or the path of a file
            with one (see `load_pattern`), whose layers and backend are used where none are given here.
        backend: "auto" chooses; a name obeys or raises at the first forward.
        layers: indices of the layers to patch, None for all; the others keep dense attention. A mapping of ranges to
            patterns is the option of that name of ``pattern="layered"``, whose other option called ``pattern`` can only
            be given to the object: ``patch_model(model, Layered(pattern="strided", dense_every=2))``.
        seq_len: tokens per sequence for which options that adapt to length are resolved, once and for all.
        learned_sinks: give each query head of the sparse layers a logit that joins its softmax and has no value, so
            that its weights may sum to less than 1 (GPT-OSS, arXiv:2508.10925). The logits are 0 at first, to be
            trained (`learned_sinks.weight` [H] of the attention modules), and saved with the model. A model that came
            with such sinks keeps them without this.
    Raises:
        ValueError: unknown pattern, option, backend or layer, a pattern that does not fit the model's heads and layers
            or answers wrongly, or a model that patterns cannot be put into; the model is left as it was.
    """
    base = unwrap(model)
    # a mapping is an option of the pattern: a pattern for each range of layers
    if isinstance(layers, Mapping) and isinstance(pattern, str) and not is_pattern_file(pattern):
        if "layers" not in (field.name for field in dataclasses.fields(pattern_class(pattern))):
            raise ValueError(
                f"layers={layers!r} gives ranges of layers their patterns, which pattern='layered' does, and "
                f"{pattern!r} is named besides; name 'layered', or give a list of layer indices"
            )
        layers, options = None, {"layers": layers, **options}
    given = settings_of(pattern, **options)
    chosen = given.pattern
    if seq_len is not None:
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
            raise ValueError(f"seq_len must be a whole number of tokens >= 1, got {seq_len!r}")
        chosen = chosen.resolve(seq_len)
    name = attention_name(chosen)
    check_backend(backend)
    refuse_unroutable(base)
    own_layers = _check_layers(layers, base)
    config, causal = base.config.get_text_config(), is_causal(base)
    with naming_its_file(given, base):
        if layers is None:
            own_layers = _check_layers(given.layers, base)
        settings = SparseSettings(
            chosen,
            own_layers,
            given.backend if backend == "auto" else backend,
            given.learned_sinks or learned_sinks,
        )
        check_fit(settings, config)
        check_selecting_layers(settings, config)
        check_comes_back(settings)
        check_predicate(chosen, query_heads(config) or 1, causal, layer_count(config) or 1)
    before = _state(base)
    try:
        if not hasattr(base, _RESTORE):
            own_config(model)
        current = base.config.get_text_config()._attn_implementation
        if not current.startswith(PREFIX):  # someone may have chosen another attention since an earlier patch
            setattr(base, _RESTORE, current)
        elif not hasattr(base, _RESTORE):
            setattr(base, _RESTORE, None)
        _switch(base, name)
        base.config.get_text_config().sparse_attention = settings_to_json(settings)
        _remove_hooks(base)
        set_projections(base, settings, causal)
        add_global_hooks(base, chosen)
        add_forward_hooks(base)
        let_generate_make_caches(base)
        if base.device.type == "meta":  # without weights there is nothing to try
            _refuse_sinks_without_weights(base, settings)
        else:
            add_position_hook(base, verify_routing(base, settings.layers))
            set_positions(base, settings)
            _set_sinks(base, settings)
            if chosen.takes_globals:
                check_globals_arrive(base)
    except BaseException:
        _restore(base, before)
        put_config(model, before["config"])
        raise
    return model


def unpatch_model(model: M) -> M:
    """Give `model` back the attention it had before `patch_model`, and return it; an unpatched model is left alone.

    A model that was loaded with ``attn_implementation="sparse_..."`` gets the default of its class.
    """
    base = unwrap(model)
    if not is_switched(base) and not hasattr(base, _RESTORE):
        return model
    config = base.config.get_text_config()
    if is_switched(base):  # otherwise someone has chosen another attention since
        _switch(base, getattr(base, _RESTORE, None) or base.get_correct_attn_implementation(None))
    _remove_hooks(base)
    remove_positions(base)
    remove_projections(base)
    remove_sinks(base)
    if hasattr(base, _RESTORE):
        delattr(base, _RESTORE)
    if hasattr(config, "sparse_attention"):
        del config.sparse_attention
    return model


@contextlib.contextmanager
def patched(
    model: M, pattern: str | os.PathLike[str] | Pattern | SparseSettings, **settings: Any
) -> Iterator[M]:
    """Patch as `patch_model` does, inside the block; then restore what was there, an earlier patch included.

    With gradient checkpointing, call ``backward()`` inside the block.
    """
    base = unwrap(model)
    refuse_unroutable(base)
    before = _state(base)
    patch_model(model, pattern, **settings)
    try:
        yield model
    finally:
        _restore(base, before)


@contextlib.contextmanager
def unpatched(model: M) -> Iterator[M]:
    """Unpatch inside the block; then restore what was there, trained projections of global queries included."""
    base = unwrap(model)
    before = _state(base)
    unpatch_model(base)
    try:
        yield model
    finally:
        _restore(base, before)


def _check_layers(layers: Iterable[int] | None, model: PreTrainedModel) -> tuple[int, ...] | None:
    if layers is None:
        return None
    count = layer_count(model.config.get_text_config())
    if isinstance(layers, (str, bytes, dict)) or not isinstance(layers, Iterable):
        raise ValueError(f"layers must be a list of layer indices, got {layers!r}")
    indices = list(layers)
    if not indices:
        raise ValueError("layers is empty: no layer would run the pattern; leave it out to patch every layer")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(
                f"layers must hold indices from 0 to {count - 1} of {type(model).__name__}, got {index!r}"
            )
    return tuple(sorted(set(indices)))


def _set_sinks(model: PreTrainedModel, settings: SparseSettings) -> None:
    """Give the model the learned sinks of its settings, and see that they are taken."""
    if not settings.learned_sinks:
        remove_sinks(model)
        return
    set_sinks(model, settings, heads_of_calls(model))
    verify_routing(model, settings.layers)


def _refuse_sinks_without_weights(model: PreTrainedModel, settings: SparseSettings) -> None:
    if settings.learned_sinks:
        raise ValueError(
            f"learned_sinks=True needs a model to try, and {type(model).__name__} has no weights yet (it is on the "
            f"meta device); patch it when they are loaded"
        )


def _switch(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text model; towers of a composite keep theirs."""
    key = text_config_key(model)
    model.set_attn_implementation(name if key is None else {key: name})
    if (
        now := model.config.get_text_config()._attn_implementation
    ) != name:  # transformers only logs a warning
        raise ValueError(
            f"{type(model).__name__} cannot be patched: it keeps its attention implementation {now!r}"
        )


def _state(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {
        "config": model.config,
        "implementation": config._attn_implementation,
        "saved": getattr(config, "sparse_attention", None),
        "marker": {_RESTORE: vars(model)[_RESTORE]} if _RESTORE in vars(model) else {},
        "hooks": find_hooks(model, (*POSITION_HOOKS, *GLOBAL_HOOKS, *FORWARD_HOOKS)),
        "projections": projections(model),
        "sinks": sinks(model),
        "positions": positions_of(mask_owner(model)),
        "makes_caches": "_prepare_cache_for_generation" in vars(model),
        "generates": "prepare_inputs_for_generation" in vars(model),
    }


def _restore(model: PreTrainedModel, state: dict[str, Any]) -> None:
    if model.config.get_text_config()._attn_implementation != state["implementation"]:
        _switch(model, state["implementation"])
    config = model.config.get_text_config()
    if state["saved"] is not None:
        config.sparse_attention = state["saved"]
    elif hasattr(config, "sparse_attention"):
        del config.sparse_attention
    if _RESTORE in vars(model):
        delattr(model, _RESTORE)
    vars(model).update(state["marker"])
    put_projections(model, state["projections"])
    put_sinks(model, state["sinks"])
    _remove_hooks(model)
    for module, hook, after in state["hooks"]:
        add_hook(module, hook, after=after)
    put_positions(model, state["positions"])
    if state["generates"]:
        let_generate_take_globals(model)
    if state["makes_caches"]:
        let_generate_make_caches(model)


def _remove_hooks(model: nn.Module) -> None:
    remove_hooks(model, (*POSITION_HOOKS, *FORWARD_HOOKS))
    remove_global_hooks(model)
    stop_making_caches(model)
