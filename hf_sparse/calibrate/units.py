"""What a calibration chooses for: every head, every key-value head with its query heads, or every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hf.native import key_heads
from ..hf.routing import attention_layers
from ..hf.stored_settings import layer_count, query_heads
from ..patterns import Pattern, PerHead, PerLayer

KINDS = ("head", "kv_head", "layer")


@dataclass(frozen=True)
class Units:
    """The units of a model: `count` in each of its attention layers, each a run of `size` query heads.

    layers: indices of the layers that have attention; of_layers: all layers the model counts.
    heads, kv_heads: query and key-value heads of a layer.
    """

    kind: str
    layers: tuple[int, ...]
    of_layers: int
    heads: int
    kv_heads: int

    @property
    def size(self) -> int:
        """Query heads of a unit."""
        return {"head": 1, "kv_head": self.heads // self.kv_heads, "layer": self.heads}[self.kind]

    @property
    def count(self) -> int:
        """Units of a layer."""
        return self.heads // self.size

    @property
    def shape(self) -> tuple[int, int]:
        """[L, U]: attention layers and units of each."""
        return len(self.layers), self.count

    def name(self, layer: int, unit: int) -> str:
        """Return how a unit is called in reports; `layer` counts attention layers."""
        where = f"layer {self.layers[layer]}"
        return where if self.kind == "layer" else f"{where} {self.kind.replace('_', '-')} {unit}"

    def pattern(self, choice: np.ndarray, candidates: Sequence[Pattern]) -> Pattern:
        """Return the pattern of a choice: int [L, U], for each unit the number of its candidate.

        Layers without attention get the first candidate, which none of them runs.
        """
        layers = [candidates[0]] * self.of_layers
        for layer, row in zip(self.layers, choice, strict=True):
            layers[layer] = self.layer_pattern(row, candidates)
        return PerLayer(tuple(layers))

    def layer_pattern(self, row: np.ndarray, candidates: Sequence[Pattern]) -> Pattern:
        """Return the pattern of one layer, whose units run the candidates numbered in `row`, int [U]."""
        if (row == row[0]).all():
            return candidates[row[0]]
        return PerHead(tuple(candidates[number] for number in row for _ in range(self.size)))


def units_of(base: Any, kind: str) -> Units:
    """Return the units of a transformers model.

    Raises:
        ValueError: an unknown kind, or heads that the kind does not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"unit must be one of {', '.join(KINDS)}, got {kind!r}")
    config = base.config.get_text_config()
    heads = query_heads(config)
    layers = attention_layers(config)
    if not heads or not layers:
        raise ValueError(f"{type(base).__name__} has no attention heads to choose for; use another model")
    kv_heads = {key_heads(config, layer) for layer in layers}
    if kind == "kv_head" and (len(kv_heads) > 1 or heads % min(kv_heads)):
        raise ValueError(
            f"the layers of {type(base).__name__} differ in their key-value heads ({sorted(kv_heads)}); "
            "use unit='head' or 'layer'"
        )
    return Units(kind, layers, layer_count(config), heads, min(kv_heads))
