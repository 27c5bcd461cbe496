"""What a model imposes on its own attention and how its layers are shaped, read from its config."""

from __future__ import annotations

from typing import Any

from ..plan import Constraint
from .stored_settings import query_heads


def layer_constraint(config: Any, layer: int, causal: bool) -> Constraint:
    """Return what the model itself imposes on a layer."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention"
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    return Constraint(causal, native_window(config) if kind == "sliding_attention" else None, chunk)


def native_window(config: Any) -> int | None:
    """Return the model's own sliding window in keys, the query itself included; None where it has none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if (
        window is None
        or (kinds and "sliding_attention" not in kinds)
        or getattr(config, "use_sliding_window", True) is False
    ):
        return None
    return int(window) + 1 if config.model_type == "modernbert" else int(window)


def key_heads(config: Any, layer: int) -> int:
    """Return the number of key heads of a layer."""
    return int(getattr(_of_layer(config, layer), "num_key_value_heads", None) or query_heads(config))


def head_size(config: Any, layer: int) -> int:
    """Return the channels of a layer's heads."""
    own = getattr(_of_layer(config, layer), "head_dim", None)
    return int(own or config.hidden_size // query_heads(config))


def _of_layer(config: Any, layer: int) -> Any:
    """Return a layer's own config, where they differ (Gemma 4)."""
    # Where no layer differs there may be more layers than it lists: of BART's it takes the encoder's number.
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
