"""What a choice costs, as a share of what the dense model does: the budgets of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ..hf.kv_bytes import kv_bytes
from ..hf.native import head_size, key_heads, layer_constraint
from ..hf.routing import is_causal
from ..patterns import Pattern
from ..plan.held import SLACK
from ..plan.plan import make_plan
from ..plan.retention import key_groups, keys_held
from .gated import DENSE
from .units import Units

COUNTED = ("density", "kv_bytes")  # read off the plan; the others are timed
MEASURES = {
    "density": "pairs of a query and a key",
    "kv_bytes": "bytes of keys and values held",
    "prefill": "seconds to read the prompt",
    "decode": "seconds per decoded token",
}


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs at `tokens` tokens.

    measure: one of MEASURES.
    shares: float [L, U, C], each unit's part of the cost under each candidate; all units dense are together 1.
    mixed: what a layer costs besides where its units run different candidates (times alone: each is computed apart).
    dense: what the dense model costs, in the unit of the measure.
    """

    measure: str
    tokens: int
    shares: np.ndarray
    dense: float
    mixed: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "shares": self.shares.tolist()
        }

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Costs:
        return Costs(**{**saved, "shares": np.array(saved["shares"])})

    def of(self, choice: np.ndarray) -> float:
        """Return what a choice [L, U] costs, as a share of dense."""
        units = float(np.take_along_axis(self.shares, choice[..., None], -1).sum())
        return units + self.mixed * int((choice != choice[:, :1]).any(1).sum())

    @cached_property
    def cheapest(self) -> np.ndarray:
        """The choice [L, U] in which every unit costs least; of candidates that cost the same, the first."""
        return self.shares.argmin(-1)

    @cached_property
    def openness(self) -> np.ndarray:
        """How far each candidate is from the cheapest (0) to dense (1), by cost, float [L, U, C]."""
        least = self.shares.min(-1, keepdims=True)
        span = self.shares[..., DENSE, None] - least
        return np.divide(self.shares - least, span, out=np.ones_like(self.shares), where=span > 0).clip(0, 1)


def density_costs(base: Any, units: Units, candidates: Sequence[Pattern], tokens: int) -> Costs:
    """Return the pairs that attention computes on a text of `tokens` tokens; the measure of quality per computation."""
    config, causal = base.config.get_text_config(), is_causal(base)
    pairs = np.zeros((*units.shape, len(candidates)))
    for number, layer in enumerate(units.layers):
        constraint = layer_constraint(config, layer, causal)
        for index, candidate in enumerate(candidates):
            plan = make_plan(candidate, constraint, tokens, tokens, heads=units.heads, layer=layer)
            per_head = np.zeros(units.heads)
            for group in plan.groups:
                per_head[list(group.heads)] = group.pairs / len(group.heads)
            pairs[number, :, index] = per_head.reshape(units.count, units.size).sum(1)
    return _shares("density", tokens, pairs)


def kv_byte_costs(base: Any, units: Units, candidates: Sequence[Pattern], tokens: int) -> Costs:
    """Return the bytes that a cache holds after `tokens` tokens, room for coming ones included.

    Raises:
        ValueError: units that share their keys with another, a model without a cache of keys.
    """
    config = base.config.get_text_config()
    if not is_causal(base):
        raise ValueError(
            f"a budget of kv_bytes is for models that decode, and {type(base).__name__} is an encoder; use of='density'"
        )
    if units.kind == "head" and units.kv_heads != units.heads:
        raise ValueError(
            f"a budget of kv_bytes needs units with keys of their own, and {units.heads} query heads share "
            f"{units.kv_heads} key-value heads here; use unit='kv_head'"
        )
    size = next(base.parameters()).element_size()
    held = np.zeros((*units.shape, len(candidates)))
    for number, layer in enumerate(units.layers):
        constraint = layer_constraint(config, layer, True)
        own = key_heads(config, layer)
        for index, candidate in enumerate(candidates):
            per_head = np.zeros(own)
            for group in key_groups(candidate, constraint, units.heads, own, layer):
                per_head[list(group.kv_heads)] = keys_held(group.retention, tokens) + SLACK
            held[number, :, index] = per_head.reshape(units.count, -1).sum(1)
        held[number] *= 2 * head_size(config, layer) * size
    for index, candidate in enumerate(candidates):
        if kv_bytes(candidate, config, tokens, dtype_bytes=size) != held[..., index].sum():
            raise ValueError(
                f"the layers of {type(base).__name__} do not each hold keys of their own, so a budget of kv_bytes "
                "cannot be shared out among them; use of='density'"
            )
    return _shares("kv_bytes", tokens, held)


def _shares(measure: str, tokens: int, amounts: np.ndarray) -> Costs:
    """Return the costs of `amounts` [L, U, C]."""
    dense = float(amounts[..., DENSE].sum())
    return Costs(measure, tokens, amounts / dense, dense)
