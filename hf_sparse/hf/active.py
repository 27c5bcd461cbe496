"""What a model runs now, whoever set it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .stored_settings import PREFIX, SparseSettings, settings_for


def settings(model: nn.Module) -> SparseSettings | None:
    """Return what `model` runs now; None where it is not patched."""
    base = unwrap(model)
    return settings_for(base.config.get_text_config()) if is_switched(base) else None


def is_switched(model: Any) -> bool:
    """True where the model's attention runs through a pattern, however it was set."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    return str(config.get_text_config()._attn_implementation).startswith(PREFIX)


def unwrap(model: Any) -> Any:
    """Return the transformers model inside a PeftModel; anything else as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
