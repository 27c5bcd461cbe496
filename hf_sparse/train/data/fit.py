"""What samples and model must have in common."""

from __future__ import annotations

from typing import Any

from ...hf.active import settings, unwrap
from ...hf.describe import leaves_out
from ...hf.routing import attention_layers
from .dataset import Samples


def check_reach(samples: Samples, model: Any) -> None:
    """Raise ValueError where the pattern of a patched model leaves out nothing, even in the longest piece."""
    base, current = unwrap(model), settings(model)
    assert current is not None, "the model is patched first"
    for layer in attention_layers(base.config.get_text_config()):
        if leaves_out(current.pattern_at(layer), layer, samples.longest, base):
            return
    raise ValueError(
        f"{current.pattern} leaves nothing out of the longest piece of text, of {samples.longest} tokens, so there is "
        "nothing to recover; give longer texts, a larger length or a narrower pattern."
    )


def first_position(model: Any) -> int:
    """Return the position of a sequence's first token: 0, or the one behind the padding's in models like RoBERTa."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0
