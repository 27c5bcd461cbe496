"""The bytes of keys and values that a model's cache will hold, told without making one."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer

from ..patterns import Pattern
from ..patterns.places import Place
from ..plan.held import SLACK
from ..plan.retention import keys_held
from .cache_plan import LayerPlan, plan_layers
from .native import head_size
from .stored_settings import SparseSettings


def kv_bytes(
    pattern: Pattern | SparseSettings, config: Any, n: int, *, dtype_bytes: int, room: bool = True
) -> int:
    """Return ``cache.nbytes`` of one row after `n` tokens, for the cache that `hf_sparse.make_cache` makes.

    It is exact for a text read at once without gradients. One read in several calls takes as many bytes or fewer, down
    to those without room.

    Args:
        pattern: what every layer runs, or the settings of a patched model.
        config: of the text model.
        dtype_bytes: of one number of its keys and values.
        room: count the 128 slots that each part of a layer has for coming tokens whenever it drops keys.
    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"a cache holds keys after at least 1 token, got n={n}; give the length of a text")
    settings = pattern if isinstance(pattern, SparseSettings) else SparseSettings(pattern)
    plans, slack = plan_layers(settings, config), SLACK if room else 0
    return dtype_bytes * sum(_numbers(plan, config, layer, n, slack) for layer, plan in enumerate(plans))


def _numbers(plan: LayerPlan, config: Any, layer: int, n: int, slack: int) -> int:
    """Return how many numbers a layer holds."""
    if plan.borrows or not plan.kv_heads or not isinstance(plan.stock, DynamicLayer):
        return 0
    if not plan.groups:  # transformers' own layer
        return n * plan.kv_heads * 2 * head_size(config, layer)
    slots = sum(len(group.kv_heads) * (keys_held(group.retention, n) + slack) for group in plan.groups)
    latents = getattr(config, "kv_lora_rank", None)
    if latents is not None:  # one head of them
        return slots // plan.kv_heads * int(latents + config.qk_rope_head_dim)
    places = plan.kept.places(layer)
    turned = places is not None and places.key != Place()  # far keys are held as far queries see them besides
    return slots * (2 + turned) * head_size(config, layer)
