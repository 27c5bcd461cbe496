"""One layer of a cache that drops what no later query may see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ..patterns.places import Place
from ..plan.held import Held, Step
from .account import Account
from .far import new_tokens
from .rotary import Rotation


class SparseLayer(DynamicLayer):
    """Keys and values in a buffer with a little room, written in place and moved together when keys are dropped.

    keys, values: [B, H_kv, T, D], the slots in use: views of the buffers. Which token is in which slot, its account
    tells.
    far_keys: the keys of a call in progress [B, H_kv, K, D] as far queries see them, where those are turned.
    """

    is_croppable = True

    def __init__(self, account: Account, rotation: Rotation | None = None, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding  # transformers makes one mask for such layers and one for the others
        self.account = account
        self.rotation = rotation
        places = account.pattern.places(account.layer)
        self.far_place = None if places is None or rotation is None or places.key == Place() else places.key
        self.record_past = False
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.held: Held | None = None
        self.seen = 0
        self.far_keys: Tensor | None = None
        self.buffers: list[Tensor] = []
        self.keys = self.values = None
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys [B, H_kv, Q, D] and values [B, H_kv, Q, Dv], and return all that the call may see.

        Raises:
            ValueError: no call was begun: the model has no pattern, or another one than the cache was made for.
        """
        step = self.account.step
        if step is None or (self.held is not None and self.held is not step.before):
            raise ValueError(
                "a cache made by hf_sparse.make_cache is being filled outside a call of its patched model; use it with "
                "the model it was made for, patched with the same pattern"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.account.shift and self.rotation is not None and self.buffers:
            self._turn(step.before, self.account.shift)
        full, buffers = [], []
        for number, new in enumerate((key_states, value_states, *self._far(key_states, step))):
            buffer = self.buffers[number] if self.buffers else new[:, :, :0]
            whole, buffer = _append(buffer, step.before.length, new, step.after.room)
            if step.kept is not None:
                buffer = _moved(_taken(whole, step.kept), step.after.room)
            full.append(whole)
            buffers.append(buffer)
        self.buffers, self.held = buffers, step.after
        self.seen += key_states.shape[2]
        self._show()
        self.far_keys = full[2] if len(full) > 2 else None
        return full[0], full[1]

    def take_far_keys(self) -> Tensor | None:
        """Hand `far_keys` over to the attention of the call, and let go of them."""
        taken, self.far_keys = self.far_keys, None
        return taken

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included; how many are held is another matter."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the room for coming tokens included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers)

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; the cache crops the account of the layer."""
        if self.held is not None:
            assert self.account.held is not None
            self.seen += tokens_to_remove
            self._follow()

    def keep(self, kept: Tensor | None) -> None:
        """Move the slots `kept` together, which the account has; None where there is nothing to move."""
        if kept is not None and self.held is not None and self.account.held is not None:
            length, room = self.held.length, self.account.held.room
            self.buffers = [_moved(_taken(buffer[:, :, :length], kept), room) for buffer in self.buffers]
            self._follow()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.buffers:
            self.buffers = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self.buffers]
            self._follow()

    def offload(self) -> None:
        self.buffers = [buffer.to("cpu", non_blocking=True) for buffer in self.buffers]
        self._show()

    def prefetch(self) -> None:
        if self.is_initialized:
            self.buffers = [buffer.to(self.device, non_blocking=True) for buffer in self.buffers]
            self._show()

    def _follow(self) -> None:
        """Hold what the account says, once it and the buffers have changed alike."""
        self.held = self.account.held
        self._show()

    def _show(self) -> None:
        if self.buffers and self.held is not None:
            self.keys, self.values = (buffer[:, :, : self.held.length] for buffer in self.buffers[:2])

    def _far(self, keys: Tensor, step: Step) -> list[Tensor]:
        """Return new keys [B, H_kv, Q, D] at the places where far queries see them; nothing where they stay."""
        if self.far_place is None or self.rotation is None:
            return []
        tokens = new_tokens(step.call, keys.shape[2]).to(keys.device, non_blocking=True)
        angles = self.rotation.angles(self.far_place.at(tokens) - tokens, keys, tokens)
        return [self.rotation.turn(keys, angles)]

    def _turn(self, held: Held, shift: int) -> None:
        """Turn the keys of every tail by `shift` rotary positions; columns stay at their own places."""
        assert self.rotation is not None
        keys = self.buffers[0]
        if keys.requires_grad or (keys.is_inference() and not torch.is_inference_mode_enabled()):
            keys = keys.clone()
        for segment in held.segments.entries:
            early = 0 if segment.columns is None else len(segment.columns)
            slots = segment.slots
            tail = slice(slots.start + early, slots.stop) if isinstance(slots, slice) else slots[early:]
            own = keys[segment.rows, :, tail]
            if own.shape[2]:
                by = torch.full((1, own.shape[2]), shift, device=own.device)
                keys[segment.rows, :, tail] = self.rotation.turn(own, self.rotation.angles(by, own))
        self.buffers[0] = keys


# The two bases declare a few attributes differently, as those of transformers' own such classes do.
class LinearAndSparseLayer(LinearAttentionAndFullAttentionLayer, SparseLayer):  # type: ignore[misc,override]
    """A layer of a hybrid that has a linear part beside its attention."""

    def __init__(self, account: Account, rotation: Rotation | None, number_of_states: int) -> None:
        SparseLayer.__init__(self, account, rotation)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if args:
            SparseLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SparseLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SparseLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SparseLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        SparseLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        SparseLayer.prefetch(self)


def _append(buffer: Tensor, used: int, new: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return the first `used` slots of `buffer` with `new` behind them, and the buffer that now holds both.

    A view of the buffer where there is room; where gradients are wanted nothing is written in place.
    """
    length = used + new.shape[2]
    differentiable = torch.is_grad_enabled()  # a graph may hold the keys even where they need no gradient
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    if differentiable or length > buffer.shape[2] or frozen:
        whole = new if used == 0 else torch.cat((buffer[:, :, :used], new), 2)
        if differentiable or length > room:
            return whole, whole
        buffer = _moved(whole, room)
        return buffer[:, :, :length], buffer
    buffer[:, :, used:length] = new
    return buffer[:, :, :length], buffer


def _moved(slots: Tensor, room: int) -> Tensor:
    """Return a buffer of `room` slots that begins with these [B, H, T, D]; where gradients flow, without room."""
    if slots.requires_grad:
        return slots
    batch, heads, length, size = slots.shape
    buffer = slots.new_empty((batch, heads, room, size))
    buffer[:, :, :length] = slots
    return buffer


def _taken(whole: Tensor, kept: Tensor) -> Tensor:
    """Return the slots `kept` [T], or [B, T] where rows differ, of [B, H, K, D]."""
    kept = kept.to(whole.device, non_blocking=True)
    if kept.ndim == 1:
        return whole.index_select(2, kept)
    return whole.take_along_dim(kept[:, None, :, None], 2)
