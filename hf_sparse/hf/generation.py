"""What `generate` on a patched model does by itself: of the text it holds what the pattern leaves to be seen."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel

from .active import is_switched, settings, unwrap
from .cache import SparseCache, cache_for
from .decoder_cache import SparseDecoderCache
from .hooks import mask_owner
from .placing import positions_of
from .routing import is_causal

_PREPARE = "_prepare_cache_for_generation"


def make_cache(model: nn.Module) -> SparseCache | SparseDecoderCache:
    """Return an empty cache for `model` that holds what its pattern leaves to be seen.

    To be passed as ``past_key_values`` to the model's forward or to `generate`, again and again for a text or dialogue
    that goes on. It belongs to this model and its present pattern. ``cache.nbytes`` are the bytes it holds,
    ``cache.kept`` the tokens, ``cache.get_seq_length()`` those it has seen. In a model with an encoder it also holds
    all keys of the encoder.

    Raises:
        ValueError: the model is not patched, or has no use for a cache.
    """
    base = unwrap(model)
    current = settings(base) if hasattr(base, "config") else None
    if current is None:
        raise ValueError(
            f"make_cache needs a patched model, this {type(base).__name__} is dense; call hf_sparse.patch_model first"
        )
    if not is_causal(base):
        raise ValueError(
            f"{type(base).__name__} is bidirectional: it has no use for a cache of earlier tokens"
        )
    owner = mask_owner(base)
    cache = cache_for(current, owner.config, positions_of(owner))
    return SparseDecoderCache(cache) if base.config.is_encoder_decoder else cache


class PrepareCache:
    """What generate() runs to make its cache: the model class's own, then a `SparseCache` in place of the default.

    An object and no bound method, which a pickled model would look for in its class.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        getattr(type(self.model), _PREPARE)(self.model, generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        if isinstance(given, (SparseCache, SparseDecoderCache)):
            if not generation_config.is_assistant:
                given.stop_recording()  # an earlier assisted generation may have begun it
        elif given is None and generation_config.cache_implementation is None and is_switched(self.model):
            if type(made) in (DynamicCache, EncoderDecoderCache):
                model_kwargs["past_key_values"] = make_cache(self.model)
            if made is not None and generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()


def let_generate_make_caches(model: PreTrainedModel) -> None:
    """Let generate() hold what the model's pattern leaves to be seen, unless it is told which cache to use."""
    if isinstance(model, GenerationMixin) and _PREPARE not in vars(model):
        setattr(model, _PREPARE, PrepareCache(model))


def stop_making_caches(model: nn.Module) -> None:
    """Undo `let_generate_make_caches`, also on a copy of the model."""
    if isinstance(vars(model).get(_PREPARE), PrepareCache):
        delattr(model, _PREPARE)
