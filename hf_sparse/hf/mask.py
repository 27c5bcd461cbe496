"""The mask of one forward pass: a small object instead of an n x n tensor, shared by all layers of a kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends import Call
from ..backends.reference import allowed_pairs
from ..patterns import get_pattern
from ..plan import Constraint, Segments
from .overlays import read_mask_function
from .stand_in import StandIn
from .stored_settings import PREFIX, SparseSettings, settings_for

if TYPE_CHECKING:
    from .cache import CacheCall, IndexesOf
    from .placing import Positions
    from .ragged_layer import HeldHeads


class SparseMask(StandIn):
    """What the attention calls of one forward pass share: sequences, their global tokens, and the host's constraint.

    It holds no reference to a cache, and nothing that grows with n x n.

    layers: for each layer whose cache drops keys, the sequences in its slots; see `held`.
    base: the position in its sequence of the token at rotary position 0.
    far_keys: gives a layer's keys as far queries see them, where its cache holds them so; see `CacheCall`.
    held_heads: gives what a call sees of a layer whose key heads hold different lengths; see `CacheCall`.
    indexes: gives what earlier tokens left behind in a layer that selects by content; see `CacheCall`.
    positions: how the model is told the places of tokens, where it has been prepared.
    tokens: [B or 1, Q] int64, the caller's position_ids, or places of new tokens, where the model is given others.
    memo: what the layers of one forward pass share.
    """

    __slots__ = (
        "_chosen",
        "_recovered",
        "base",
        "constraint",
        "far_keys",
        "first_slot",
        "flags",
        "globals_known",
        "held_heads",
        "indexes",
        "k_len",
        "layers",
        "may_be_packed",
        "memo",
        "positions",
        "q_len",
        "segments",
        "settings",
        "tokens",
    )

    def __init__(
        self,
        settings: SparseSettings,
        constraint: Constraint,
        segments: Segments,
        q_len: int,
        buffer: int,
        device: torch.device,
        may_be_packed: bool = False,
        first_slot: int = 0,
    ) -> None:
        """Describe a call of the last `q_len` of the ``segments.k_len`` keys, held in `buffer` >= that many slots.

        may_be_packed: position ids that restart may still divide the rows: nothing is padded, packed or cached.
        first_slot: place of key slot 0 among all tokens seen.
        """
        super().__init__((segments.batch, 1, q_len, buffer), device)
        self.settings = settings
        self.constraint = constraint
        self.segments = segments
        self.q_len = q_len
        self.k_len = segments.k_len
        self.may_be_packed = may_be_packed
        self.first_slot = first_slot
        self.globals_known = False
        self.flags: Tensor | None = None
        self.layers: tuple[Segments | None, ...] = ()
        self.base = 0
        self.far_keys: Callable[[int], Tensor | None] | None = None
        self.held_heads: Callable[[int, Tensor, Tensor], tuple[HeldHeads, ...] | None] | None = None
        self.indexes: IndexesOf | None = None
        self.positions: Positions | None = None
        self.tokens: Tensor | None = None
        self.memo: dict[Any, Any] = {}
        self._recovered: tuple[Tensor, Segments] | None = None
        self._chosen: tuple[Segments, Segments] | None = None

    def __getitem__(self, index: Any) -> Any:
        """Return the mask of the last queries, with which alone Gemma 4 goes on; anything else as of a tensor."""
        rows = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        count = -rows.start if isinstance(rows, slice) and isinstance(rows.start, int) else -1
        if count < 0 or index != (slice(None), slice(None), slice(-count, None), slice(None)):
            return super().__getitem__(index)
        copy: SparseMask = self.to()
        copy.q_len, copy.memo = min(self.q_len, count) or self.q_len, {}  # the last 0 are all
        copy.shape = torch.Size((self.shape[0], 1, copy.q_len, self.shape[-1]))
        return copy

    def of(self, forward: Forward) -> SparseMask:
        """Return a copy that knows what the call brings along."""
        copy: SparseMask = self.to()
        flags = forward.flags
        copy.globals_known, copy._chosen, copy.memo = True, None, {}
        stop = self.first_slot + self.k_len
        copy.flags = None if flags is None or not bool(flags.any()) else flags[:, self.first_slot : stop]
        copy.positions, copy.tokens = forward.positions, forward.tokens
        if forward.call is not None:
            copy.layers, copy.base = forward.call.layers, forward.call.base
            copy.far_keys, copy.held_heads = forward.call.far_keys, forward.call.held_heads
            copy.indexes = forward.call.indexes
        return copy

    def held(self, layer: int | None) -> Segments | None:
        """Return the sequences in the slots of a layer whose cache drops keys; None for any other layer."""
        return self.layers[layer] if layer is not None and layer < len(self.layers) else None

    def dense(self) -> Tensor:
        """Return the host's own mask [B, 1, Q, K], without the pattern; quadratic, for code that needs a tensor."""
        allowed = allowed_pairs(Call(get_pattern("full"), self.constraint), self.segments, 1, self.q_len)
        return torch.nn.functional.pad(allowed, (0, self.shape[-1] - self.k_len)).to(self.device)

    def sequences(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Segments:
        """Return the segments with their global tokens, divided where the call's own arguments show packed samples.

        Transformers looks for packed samples only where there is no cache and no mask, yet makes a cache by default.

        Args:
            position_ids: [B or 1, Q] int64; a sample begins wherever they do not go up by 1.
            cu_seq_lens: [samples + 1] int32, first slots of the samples of the only row.
        Raises:
            ValueError: the pattern looks for tokens in the input and nothing has looked.
        """
        if not self.globals_known and (wanted := self.settings.pattern.global_token_ids):
            raise ValueError(
                f"token_ids={wanted} are found by a model that hf_sparse.patch_model or hf_sparse.load has prepared; "
                f"attn_implementation={PREFIX + self.settings.pattern.name!r} alone does not look for them"
            )
        segments = self._divided(position_ids, cu_seq_lens)
        if self.flags is None:
            return segments
        if self._chosen is None or self._chosen[0] is not segments:
            self._chosen = (segments, segments.choose(self.flags))
        return self._chosen[1]

    def is_packed(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> bool:
        """True where the call's own arguments show several samples in a row."""
        return self._divided(position_ids, cu_seq_lens) is not self.segments

    def _divided(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Segments:
        position_ids = position_ids if self.tokens is None else self.tokens
        source = cu_seq_lens if cu_seq_lens is not None and self.segments.batch == 1 else position_ids
        if source is None or not self.may_be_packed:
            return self.segments
        if self._recovered is None or self._recovered[0] is not source:
            labels = _sample_labels(source, source is cu_seq_lens, self.segments.batch, self.q_len)
            self._recovered = (source, self.segments if labels is None else Segments.from_labels(labels))
        return self._recovered[1]


@dataclass
class Forward:
    """A forward in progress of a model that makes masks.

    flags: [B, tokens seen and new] bool, its global tokens; None for none.
    call: what its cache says of the keys, where that is one of ours.
    positions: how the model is told the places of tokens.
    cache: the cache it was given, if any.
    tokens: [B or 1, Q] int64, the caller's position_ids, or places of new tokens, where the model is given others.
    """

    module: nn.Module
    flags: Tensor | None = None
    call: CacheCall | None = None
    positions: Positions | None = None
    cache: Any = None
    tokens: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.module.config


_running = threading.local()


def running_forwards() -> list[Forward]:
    """Return the forwards in progress in this thread, the innermost last."""
    return _running.__dict__.setdefault("forwards", [])


def _sample_labels(source: Tensor, cumulative: bool, batch: int, q_len: int) -> Tensor | None:
    """Return the sample number of each slot [B, Q], None where there is one sample per row."""
    if cumulative:
        inner = source[1:-1].to(torch.int64)
        labels = torch.bucketize(torch.arange(q_len, device=source.device), inner, right=True)[None]
    elif source.ndim == 2 and source.shape[1] == q_len and source.shape[0] in (1, batch):
        restart = torch.nn.functional.pad(source.diff(dim=-1) != 1, (1, 0))
        labels = restart.cumsum(-1)
    else:  # [3, B, Q] positions repeat for image tokens and restart nothing
        return None
    return labels.expand(batch, q_len) if bool(labels.any()) else None


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Any,
    config: Any,
    device: Any,
    **host: Any,
) -> SparseMask:
    """Return the mask of calls that run the pattern, from what transformers gives to any mask function.

    Args:
        attention_mask: [B, tokens seen] bool, True = a real token; None; or a mask made here before.
        q_offset, kv_offset: places of the first query and of key slot 0 among all tokens seen.
        kv_length: key slots, those not yet filled by a static cache included.
    Raises:
        ValueError: a mask function that no pattern can be combined with, or an `attention_mask` shorter than the keys.
    """
    if isinstance(attention_mask, SparseMask):
        return attention_mask
    settings = settings_for(config)
    host_mask = read_mask_function(mask_function)
    # A static cache's offset is its live counter, which update() moves before attention runs.
    seen = int(q_offset) + q_length
    k_len = seen - kv_offset
    if k_len > kv_length or (k_len < kv_length and not host_mask.constraint.causal and int(q_offset) == 0):
        raise ValueError(
            f"the queries end at token {seen} but the keys hold tokens {kv_offset} to {kv_offset + kv_length}: "
            f"make a static cache longer (max_cache_len); cross-attention of this model, or prefix tuning, cannot run "
            f"under a sparse pattern, use dense attention there"
        )
    forwards = running_forwards()
    forward = forwards[-1] if forwards and forwards[-1].config is config else None
    # The places of a call are no positions of a text: where they repeat no sample begins.
    labels = host_mask.labels if forward is None or forward.tokens is None else None
    if forward is not None and forward.call is not None and labels is None:
        segments = forward.call.tokens.after(kv_offset)  # nothing on a device has to be looked at
        padded = not segments.is_whole
    else:
        segments, padded = _segments(attention_mask, labels, batch_size, kv_offset, k_len)
    mask = SparseMask(
        settings,
        host_mask.constraint,
        segments,
        q_length,
        kv_length,
        device,
        may_be_packed=not padded and labels is None and q_length == k_len,
        first_slot=kv_offset,
    )
    return mask if forward is None else mask.of(forward)


def _segments(
    attention_mask: Tensor | None, labels: Tensor | None, batch: int, first: int, k_len: int
) -> tuple[Segments, bool]:
    """Return the sequences of the batch, and whether there is padding."""
    if labels is not None:
        return Segments.from_labels(labels), False
    if attention_mask is None:
        return Segments.whole(batch, k_len, first), False
    if attention_mask.shape[-1] < first + k_len:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens but {first + k_len} have been seen: pass the "
            f"mask of all of them, cached tokens included"
        )
    mask = attention_mask.to(torch.bool)
    if bool(mask[:, : first + k_len].all()):
        return Segments.whole(batch, k_len, first), False
    dropped = mask[:, :first].sum(-1) if first else None
    return Segments.from_mask(mask[:, first : first + k_len], dropped), True
