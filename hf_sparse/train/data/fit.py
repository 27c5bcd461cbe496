"""What samples and model must have in common."""

from __future__ import annotations

from typing import Any

import torch

from ...hf.active import settings, unwrap
from ...hf.describe import leaves_out
from ...hf.routing import attention_layers
from .dataset import Samples


def check_reach(samples: Samples, model: Any) -> None:
    """Raise ValueError where a patched model reads even the longest piece as it would read it dense."""
    base, current = unwrap(model), settings(model)
    assert current is not None, "the model is patched first"
    for layer in attention_layers(base.config.get_text_config()):
        pattern = current.pattern_at(layer)
        places = pattern.places(layer)
        if (
            places is not None and samples.longest > places.near
        ):  # it may see all, yet not at the distance it is
            return
        if leaves_out(pattern, layer, samples.longest, base):
            return
    raise ValueError(
        f"{current.pattern} leaves nothing out of the longest piece of text, of {samples.longest} tokens, so there is "
        "nothing to recover; give longer texts, a larger length or a narrower pattern."
    )


def check_apart(samples: Samples, model: Any) -> None:
    """Raise ValueError where a model lets the second piece of a packed row know of the first.

    The attention does not, but in hybrid models recurrent layers and convolutions stand between.
    """
    if samples.short != "pack" or len(samples.piece_starts) == len(samples.row_starts):
        return
    one, other = int(samples.ids.min()), int(samples.ids.max())
    # two pieces of 4 tokens, the second always the same
    rows = torch.tensor([[one] * 8, [other] * 4 + [one] * 4])
    places = torch.arange(4).repeat(1, 2) + samples.position_start
    with torch.no_grad():
        alone, changed = (model(input_ids=row[None], position_ids=places).logits[0, 4:] for row in rows)
    tolerance = (1e-2 if alone.dtype in (torch.float16, torch.bfloat16) else 1e-4) * alone.abs().max()
    if (alone - changed).abs().max() > tolerance:
        raise ValueError(
            f"{type(unwrap(model)).__name__} carries something from one sample of a packed row into the next, as "
            "recurrent layers and convolutions do; set short=pad or short=drop."
        )


def first_position(model: Any) -> int:
    """Return the position of a sequence's first token: 0, or the one behind the padding's in models like RoBERTa."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0
