"""One layer of a cache whose key heads hold different lengths: full length where it is needed, a ring elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..patterns import Pattern
from ..plan import Segments
from .cache_layer import SparseLayer


@dataclass(frozen=True, eq=False)
class HeldHeads:
    """What a call sees of some key heads of a layer, h of them.

    at: which key heads of the layer, a slice or int64 [h].
    pattern: the layer's, as their query heads see it.
    segments: the sequences in the K slots of these heads.
    key, value: [B, h, K, D] and [B, h, K, Dv].
    """

    at: slice | Tensor
    pattern: Pattern
    segments: Segments
    key: Tensor
    value: Tensor


@dataclass(eq=False)
class HeadPart:
    """Key heads that hold the same, the pattern of their query heads, and the layer that holds them."""

    kv_heads: tuple[int, ...]
    pattern: Pattern
    layer: SparseLayer


class RaggedLayer(DynamicLayer):
    """Key heads in parts, each with a `SparseLayer` of its own.

    `update` returns the new tokens alone: no tensor could hold all heads. The attention of the call takes what it may
    see of each part from here, once. `keys` and `values` stay None.
    """

    is_croppable = True

    def __init__(self, parts: Sequence[HeadPart], is_sliding: bool = False) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.is_sliding = is_sliding
        self.kv_heads = sum(len(part.kv_heads) for part in parts)
        self.coming: tuple[Tensor, Tensor, tuple[HeldHeads, ...]] | None = None

    @property
    def record_past(self) -> bool:
        return self.parts[0].layer.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        for part in self.parts:
            part.layer.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.at = [_places(part.kv_heads, self.device) for part in self.parts]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys [B, H_kv, Q, D] and values [B, H_kv, Q, Dv] to each part, and return these alone.

        Raises:
            ValueError: another number of key heads than the config names, or as `SparseLayer.update`.
        """
        if key_states.shape[1] != self.kv_heads or value_states.shape[1] != self.kv_heads:
            raise ValueError(
                f"the model gives its cache {key_states.shape[1]} key heads but its config names {self.kv_heads}, so "
                f"heads that keep more than others cannot be told apart; pass past_key_values=DynamicCache()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = []
        for part, at in zip(self.parts, self.at, strict=True):
            key, value = part.layer.update(key_states[:, at], value_states[:, at])
            step = part.layer.account.step
            assert step is not None
            seen.append(HeldHeads(at, part.pattern, step.call, key, value))
        self.coming = key_states, value_states, tuple(seen)
        return key_states, value_states

    def take_held(self, key: Tensor, value: Tensor) -> tuple[HeldHeads, ...]:
        """Hand what a call sees over to its attention, which came by `key` and `value`, and let go of it.

        Raises:
            ValueError: these are not what `update` returned: the model does something to keys between the two.
        """
        given, self.coming = self.coming, None
        if given is None or key is not given[0] or value is not given[1]:
            raise ValueError(
                "the model changes keys or values between its cache and its attention, which a cache whose heads hold "
                "different lengths cannot follow; pass past_key_values=DynamicCache()"
            )
        return given[2]

    def let_go(self) -> bool:
        """Let go of what no attention has taken; True where there was any."""
        left, self.coming = self.coming is not None, None
        return left

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included."""
        return self.parts[0].layer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.parts[0].layer.get_mask_sizes(query_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all parts, the room for coming tokens included."""
        return sum(part.layer.nbytes for part in self.parts)

    def reset(self) -> None:
        self.coming, self.is_initialized = None, False
        for part in self.parts:
            part.layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; the cache crops the accounts of the parts."""
        for part in self.parts:
            part.layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in self.parts:
            part.layer.reorder_cache(beam_idx)

    def offload(self) -> None:
        for part in self.parts:
            part.layer.offload()

    def prefetch(self) -> None:
        for part in self.parts:
            part.layer.prefetch()


def _places(numbers: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Return these ascending numbers as a slice, which makes views, where they are evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if numbers == tuple(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, device=device)
