"""The settings of a patched model: what is stored as plain JSON under ``config.sparse_attention``."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

from ..backends import check_backend
from ..patterns import Pattern, get_pattern, pattern_class
from ..patterns.written import pattern_from_json, pattern_to_json

VERSION = 1
PREFIX = "sparse_"
CUSTOM = "sparse_custom"
_FULL = get_pattern("full")


@dataclass(frozen=True)
class SparseSettings:
    """Which pattern runs where, and on what.

    layers: indices of the layers that run the pattern, ascending; None is all. The others run dense attention.
    backend: a name of `hf_sparse.backends.BACKENDS`.
    learned_sinks: each query head of a sparse layer has a logit of its own that joins its softmax.
    source: the file they were read from, to be named where they do not fit.
    """

    pattern: Pattern
    layers: tuple[int, ...] | None = None
    backend: str = "auto"
    learned_sinks: bool = False
    source: str | None = field(default=None, compare=False)

    def pattern_at(self, layer: int | None) -> Pattern:
        return self.pattern if self.layers is None or layer in self.layers else _FULL


def attention_name(pattern: Pattern) -> str:
    """Return the attention implementation of a pattern: ``sparse_<name>``, or ``sparse_custom`` for a composed one."""
    if not pattern.name and pattern.members:
        for member in pattern.members:
            attention_name(member)
        return CUSTOM
    # A subclass inherits the name of what it derives from, and would come back as that.
    if not pattern.name or pattern_class(pattern.name) is not type(pattern):
        raise ValueError(
            f"{type(pattern).__name__} has no name of its own to be saved under; decorate it with "
            f"@hf_sparse.register_pattern('a_name')"
        )
    return PREFIX + pattern.name


def pattern_of_layer(settings: SparseSettings, layer: int | None, name: str) -> Pattern:
    """Return the pattern of the attention module `name` at `layer`.

    Raises:
        ValueError: the layers differ and the module does not know which one it is (`layer` is None).
    """
    if layer is None and (settings.layers is not None or settings.pattern.per_layer):
        which = str(settings.pattern) if settings.layers is None else f"layers={list(settings.layers)}"
        raise ValueError(
            f"{name} does not know which layer it is, so {which} cannot be told apart; patch every layer alike"
        )
    return settings.pattern_at(layer)


def check_fit(settings: SparseSettings, config: Any) -> None:
    """Raise ValueError unless the pattern fits the heads and layers of a text model's config; some have no heads."""
    if heads := query_heads(config):
        _check_fit(settings.pattern, heads, layer_count(config))
    vocabulary = getattr(config, "decoder_vocab_size", None) or getattr(config, "vocab_size", None)
    if vocabulary and (beyond := [i for i in settings.pattern.global_token_ids if i >= vocabulary]):
        raise ValueError(
            f"token_ids holds {beyond[0]}, and the vocabulary of the model ends at {vocabulary - 1}: no input has it; "
            f"look ids up with the model's own tokenizer"
        )


def query_heads(config: Any) -> int:
    """Return the number of query heads in a text model's config, the decoder's; 0 for a model without attention."""
    return int(
        getattr(config, "decoder_attention_heads", None) or getattr(config, "num_attention_heads", None) or 0
    )


def layer_count(config: Any) -> int:
    """Return the number of layers in a text model's config; num_hidden_layers may be those of the encoder."""
    return int(getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None) or 0)


def key_sources(config: Any) -> list[int]:
    """Return for each layer the one whose keys it attends to: itself, but for the last layers of Gemma 3n and 4."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:
        return list(range(layer_count(config)))
    stored = {config.layer_types[index]: index for index, mode in enumerate(modes) if mode == "store"}
    return [
        stored[config.layer_types[index]] if mode == "reuse" else index for index, mode in enumerate(modes)
    ]


@functools.lru_cache(maxsize=256)
def _check_fit(pattern: Pattern, heads: int, layers: int) -> None:
    pattern.check_fit(heads, layers)


def settings_to_json(settings: SparseSettings) -> dict[str, Any]:
    """Return the settings as plain JSON values that `settings_from_json` reads back."""
    attention_name(settings.pattern)
    written = {
        "version": VERSION,
        "pattern": pattern_to_json(settings.pattern),
        "layers": None if settings.layers is None else list(settings.layers),
        "backend": settings.backend,
    }
    # left out where there are none: releases that know no sinks read such settings too
    return {**written, "learned_sinks": True} if settings.learned_sinks else written


def check_comes_back(settings: SparseSettings) -> None:
    """Raise ValueError unless the settings are the same after being saved and read."""
    try:
        same = settings_from_json(settings_to_json(settings)) == settings
    except (TypeError, RuntimeError) as error:  # tensors and arrays have no truth as a whole
        raise ValueError(
            f"the options of {settings.pattern} cannot be saved ({error}); make them numbers, words and tuples of these"
        ) from None
    if not same:
        raise ValueError(
            f"the options of {settings.pattern} are not the same after being saved as JSON; make them numbers, words "
            f"and tuples of these"
        )


def settings_from_json(saved: Any) -> SparseSettings:
    """Return the settings that were saved.

    Raises:
        ValueError: not what `settings_to_json` writes, a version or pattern this installation does not know, or
            options the pattern refuses.
    """
    try:
        text = json.dumps(saved, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"the saved sparse_attention is not plain JSON ({error}); make every option a number, a word, or a tuple "
            f"of these, and patch the model again"
        ) from None
    return _parse(text)


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> SparseSettings:
    saved = json.loads(text)
    if not isinstance(saved, dict) or not {"version", "pattern"} <= saved.keys():
        raise ValueError(
            f"the saved sparse_attention must hold 'version' and 'pattern', got {text[:80]}; patch again"
        )
    if saved["version"] != VERSION:
        raise ValueError(
            f"the saved sparse_attention has version {saved['version']!r}, this hf_sparse reads version {VERSION}; "
            f"update hf_sparse"
        )
    if unknown := saved.keys() - {"version", "pattern", "layers", "backend", "learned_sinks"}:
        raise ValueError(f"the saved sparse_attention has unknown keys {sorted(unknown)}; update hf_sparse")
    layers, backend = saved.get("layers"), saved.get("backend", "auto")
    if layers is not None and not (
        isinstance(layers, list) and layers and all(type(i) is int and i >= 0 for i in layers)
    ):
        raise ValueError(
            f"the saved sparse_attention must list layer indices, got layers={layers!r}; patch again"
        )
    if not isinstance(sinks := saved.get("learned_sinks", False), bool):
        raise ValueError(
            f"the saved sparse_attention must have learned_sinks true or false, got {sinks!r}; patch again"
        )
    return SparseSettings(
        pattern_from_json(saved["pattern"]),
        None if layers is None else tuple(layers),
        check_backend(backend),
        sinks,
    )


def settings_for(config: Any) -> SparseSettings:
    """Return what a config whose attention implementation is a ``sparse_`` name asks for.

    Raises:
        ValueError: the config was saved with another pattern than the implementation names, needs saved options and
            has none, or does not fit the config's heads and layers.
    """
    implementation = config._attn_implementation
    saved = getattr(config, "sparse_attention", None)
    if saved is not None:
        settings = settings_from_json(saved)
        if (expected := attention_name(settings.pattern)) != implementation:
            raise ValueError(
                f"attn_implementation={implementation!r} but the model was saved with {expected!r} "
                f"({settings.pattern}); load it with that name, or use hf_sparse.patch_model to change the pattern"
            )
        check_fit(settings, config)
        return settings
    if implementation == CUSTOM:
        raise ValueError(
            f"attn_implementation={CUSTOM!r} has no saved pattern here; use hf_sparse.patch_model"
        )
    settings = SparseSettings(get_pattern(implementation.removeprefix(PREFIX)))
    check_fit(settings, config)
    return settings
