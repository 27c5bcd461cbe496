"""From a wide window to the pattern alone, over the first part of a training.

Longformer's language models were trained from short to long; a pretrained model that loses its distance goes the other
way: what it saw at once it sees less of, an octave at a time.
"""

from __future__ import annotations

from typing import Any

from ..hf import SparseSettings
from ..hf.native import layer_constraint
from ..hf.routing import attention_layers, is_causal
from ..hf.stored_settings import query_heads
from ..patterns import Pattern, Union
from ..patterns.sliding_window import SlidingWindow
from ..plan import cost


class Narrowing:
    """Which window stands beside the pattern at a step.

    windows: from the first, each half of the one before; those that add no pair to the pattern are left out.
    share: of the steps, in (0, 1], that they divide among them equally; then the pattern is alone.
    """

    def __init__(self, windows: tuple[int, ...], share: float) -> None:
        self.windows, self.share = windows, share

    @classmethod
    def of(
        cls, model: Any, settings: SparseSettings, narrow_from: int | None, share: float, length: int
    ) -> Narrowing:
        """Return the narrowing of a patched model on samples of `length` tokens; None never widens.

        Raises:
            ValueError: a first window that adds nothing to the pattern, or a pattern that no window may stand beside.
        """
        if narrow_from is None:
            return cls((), share)
        if any(settings.pattern_at(n).places(n) for n in attention_layers(model.config.get_text_config())):
            raise ValueError(
                f"narrow_from={narrow_from} needs a pattern that sees keys at their own distances, which "
                f"{settings.pattern} does not; leave it out."
            )
        windows, window = [], min(narrow_from, length)
        while window > 1 and _adds(model, settings, window, length):
            windows.append(window)
            window //= 2
        if not windows:
            raise ValueError(
                f"narrow_from={narrow_from} adds nothing to {settings.pattern} on samples of {length} tokens; give a "
                "wider window, or leave it out."
            )
        return cls(tuple(windows), share)

    def window_at(self, step: int, steps: int) -> int | None:
        """Return the window beside the pattern in a step, counted from 0 of `steps`; None for none."""
        place = int(step * len(self.windows) / (self.share * steps)) if steps else len(self.windows)
        return self.windows[place] if place < len(self.windows) else None


def _adds(model: Any, settings: SparseSettings, window: int, length: int) -> bool:
    """True where a window shows some query of some layer a key that the layer's pattern does not."""
    return any(
        _pairs(model, Union.of(pattern, SlidingWindow(window)), layer, length)
        > _pairs(model, pattern, layer, length)
        for layer in attention_layers(model.config.get_text_config())
        for pattern in [settings.pattern_at(layer)]
    )


def _pairs(model: Any, pattern: Pattern, layer: int, length: int) -> float:
    config = model.config.get_text_config()
    constraint = layer_constraint(config, layer, is_causal(model))
    return cost(pattern, length, constraint=constraint, heads=query_heads(config) or 1, layer=layer).pairs
