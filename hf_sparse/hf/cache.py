"""Caches implied by patterns: of every layer they hold the keys that later tokens may still see, and no others.

`generate` on a patched model makes one by itself; `make_cache` makes one to be passed as ``past_key_values``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..plan import Segments
from ..plan.held import SLACK, Held, extend, take_back, take_rows
from ..selectors import Index, Selector
from ..selectors.rows import RowIndexes
from .cache_layer import SparseLayer
from .cache_plan import make_layers
from .placing import Positions
from .ragged_layer import HeldHeads, RaggedLayer
from .stored_settings import SparseSettings, key_sources

IndexesOf = Callable[[int, Selector, Segments], list[Index[Any]]]
_ALWAYS = 2**62  # of the tokens seen nothing is ever dropped


@dataclass(frozen=True, eq=False)
class CacheCall:
    """What a forward pass on a cache is told about the keys.

    tokens: all tokens seen and new; padding is in no sequence.
    layers: for each layer, the sequences in the slots that its `update` returns; None for a layer of another kind.
    base: rotary position 0 is the token at this position of every sequence.
    far_keys: gives a layer's keys [B, H_kv, K, D] as far queries see them, where its cache holds them so; once, after
        the layer's `update`.
    held_heads: gives what the call sees of a layer whose key heads hold different lengths, which came by this key and
        value; None for any other layer; once, after the layer's `update`.
    indexes: gives what the earlier tokens of each sequence left behind in a layer that selects by content.
    """

    tokens: Segments
    layers: tuple[Segments | None, ...]
    base: int
    far_keys: Callable[[int], Tensor | None]
    held_heads: Callable[[int, Tensor, Tensor], tuple[HeldHeads, ...] | None]
    indexes: IndexesOf


class SparseCache(Cache):
    """A cache whose layers hold what the pattern of a model leaves to be seen; see `make_cache`.

    A layer with a sliding window or chunks of the model's own holds what both leave to be seen. Where key heads differ
    in what their query heads may see, each holds its own; not so with far keys at places of their own, where layers
    read another's keys, beside a linear part, and where the model changes keys after the cache: there all hold what any
    may see. Latents (MLA) are held as keys are. Linear states and other kinds of layers are the model's own.
    """

    # No limit: peft asks caches other than transformers' own before it puts a prefix in their place.
    max_cache_len = -1

    def __init__(
        self, layers: list[Any], sources: list[int], settings: SparseSettings, config: Any, most: int | None
    ) -> None:
        """Make a cache of these layers.

        sources: for each layer the one whose keys it attends to.
        most: the farthest place of a query, where every layer's pattern keeps rotary positions bounded; else None.
        """
        super().__init__(layers=layers)
        self.settings, self._sources = settings, sources
        self._ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self._own = [own for layer in layers for own in _sparse_layers(layer)]
        self._accounts = list({id(layer.account): layer.account for layer in self._own}.values())
        self._most = most
        self._shape, self._config = _shape(config), weakref.ref(config)
        self._tokens, self._base, self._broken = Held.nothing(0), 0, False
        self._coming: tuple[Held, int] | None = None
        self._indexes: dict[int, RowIndexes] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values and of the summaries of blocks, room for coming tokens included."""
        total = sum(rows.nbytes for rows in self._indexes.values())
        for layer in self.layers:
            if isinstance(layer, (SparseLayer, RaggedLayer)):
                total += layer.nbytes
            elif isinstance(layer, DynamicLayer):
                total += sum(
                    x.untyped_storage().nbytes() for x in (layer.keys, layer.values) if x is not None
                )
        return total

    @property
    def kept(self) -> int:
        """Tokens of which some layer holds keys: those of the layer that holds most."""
        return max((layer.held.length for layer in self._own if layer.held is not None), default=0)

    def text_lengths(self) -> list[int]:
        """Return of each row how many of the tokens seen are no padding."""
        entries = self._tokens.segments.entries
        return [entry.end for entry in entries for _ in range(entry.rows.start, entry.rows.stop)]

    def check(self, settings: SparseSettings, config: Any, batch: int) -> None:
        """Raise ValueError unless the cache fits this model, its present pattern, and a call of `batch` rows."""
        if settings != self.settings:
            raise ValueError(
                f"this cache was made for {self.settings.pattern} but the model runs {settings.pattern}, which may "
                f"need keys that are gone; make a new one with hf_sparse.make_cache(model)"
            )
        made_for = self._config()
        if _shape(config) != self._shape or (made_for is not None and made_for is not config):
            raise ValueError(
                f"this cache was made for another model ({self._shape[0]}, {self._shape[1]} layers) than the one that "
                f"uses it ({config.model_type}, {config.num_hidden_layers} layers); make one for it with "
                f"hf_sparse.make_cache(model)"
            )
        if self._broken:
            raise ValueError(
                "the last call on this cache stopped in the middle of the model, so some layers hold its tokens and "
                "others do not; call cache.reset(), or make a new cache"
            )
        if self._tokens.length and self._tokens.segments.batch != batch:
            raise ValueError(
                f"the cache holds {self._tokens.segments.batch} rows but the call has {batch}; use the batch it was "
                f"filled with, or make a new cache"
            )

    def begin(self, batch: int, q_len: int, real: Tensor | None, chosen: Tensor | None) -> CacheCall:
        """Prepare a forward pass of `q_len` new tokens in each of `batch` rows, and return what its layers are told.

        Args:
            real: bool [B, Q], False = padding among the new tokens; None for none.
            chosen: bool [B, Q], the new tokens that are global; None for none.
        """
        padding = None if real is None or bool(real.all()) else real.cpu().numpy()
        globals_ = None if chosen is None or not bool(chosen.any()) else chosen.cpu().numpy()
        held = self._tokens.segments if self._tokens.length else Held.nothing(batch).segments
        coming = Held(extend(held, q_len, padding, None), 0, _ALWAYS)
        base = self._next_base(coming.segments, q_len)
        record = any(layer.record_past for layer in self._own)
        steps = {
            id(account): account.begin(batch, q_len, padding, globals_, record, self._base - base)
            for account in self._accounts
        }
        self._coming = coming, base
        calls = {id(layer): steps[id(layer.account)].call for layer in self._own}
        if self._ragged:  # the `update` of these returns new tokens alone
            new = coming.segments.after(coming.length - q_len)
            calls |= {id(layer): new for layer in self._ragged}
        layers = tuple(calls.get(id(self.layers[source])) for source in self._sources)
        return CacheCall(
            coming.segments, layers, base, self._take_far_keys, self._take_held_heads, self._indexes_of
        )

    def end(self, finished: bool = False) -> None:
        """End the forward pass, whether it came to its end (`finished`) or not.

        Raises:
            ValueError: it did, but an attention that is not ours saw nothing but the new tokens.
        """
        left = [layer.let_go() for layer in self._ragged]
        if self._coming is None:
            return
        length = self._coming[0].length
        filled = [
            layer.get_seq_length() == length for layer in self.layers if isinstance(layer, DynamicLayer)
        ]
        done = bool(filled) and all(filled)
        self._broken = any(filled) and not done
        if done:
            self._tokens, self._base = self._coming
        for account in self._accounts:
            account.end(done)
        self._coming = None
        self._broken = self._broken or any(left)
        if finished and any(left):
            raise ValueError(
                "a layer attended without asking the cache for its keys, of which it holds more of some heads than of "
                "others; pass past_key_values=DynamicCache()"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: keys that the shorter sequence needs were dropped; the cache stays as it was.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}")
        for indexes in self._indexes.values():
            indexes.check_taken_back(-tokens_to_remove)
        before = [account.held for account in self._accounts]
        try:
            for account in self._accounts:
                account.crop(-tokens_to_remove)
        except ValueError:
            for account, held in zip(self._accounts, before, strict=True):
                account.held = held
            raise
        self._tokens = take_back(self._tokens, -tokens_to_remove)
        super().crop(tokens_to_remove)
        kept = {id(account): account.trim() for account in self._accounts}
        for layer in self._own:
            layer.keep(kept[id(layer.account)])

    def reorder_cache(self, beam_idx: Any) -> None:
        if self._tokens.length:
            rows = beam_idx.tolist()
            self._tokens = take_rows(self._tokens, rows)
            for account in self._accounts:
                account.select(rows)
            for indexes in self._indexes.values():
                indexes.reorder(rows)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._tokens.length:  # which layers of hybrids can only do as a new order
            self.reorder_cache(torch.arange(self._tokens.segments.batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self._tokens.segments.batch).repeat_interleave(repeats))

    def stop_recording(self) -> None:
        """Drop keys again as soon as no token can see them, after `activate_past_recording`."""
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def reset(self) -> None:
        for account in self._accounts:
            account.reset()
        self._tokens, self._base, self._broken, self._coming = Held.nothing(0), 0, False, None
        self._indexes = {}
        super().reset()

    def _take_far_keys(self, index: int) -> Tensor | None:
        layer = self.layers[index]
        return layer.take_far_keys() if isinstance(layer, SparseLayer) else None

    def _take_held_heads(self, index: int, key: Tensor, value: Tensor) -> tuple[HeldHeads, ...] | None:
        layer = self.layers[index]
        return layer.take_held(key, value) if isinstance(layer, RaggedLayer) else None

    def _indexes_of(self, layer: int, selector: Selector, segments: Segments) -> list[Index[Any]]:
        rows = self._indexes.setdefault(layer, RowIndexes(selector))
        return rows.of([segment.rows for segment in segments.entries])

    def _next_base(self, coming: Segments, q_len: int) -> int:
        """Return the base that keeps rotary positions small, where every layer's pattern bounds them.

        Angles of large positions are inexact; keys of the tail are turned back together, once in a window. It waits
        for every row to have its first keys among the columns: in a tail, as long as tokens are recorded and in a row
        that is mostly padding, they would be turned too, and these have to stay at their own places. The shortest row
        counts: some models do to queries what is not defined at positions below 0 (Ministral 3).
        """
        first = min(segment.length for segment in coming.entries) - q_len
        if self._most is None or first - self._base <= 2 * self._most + SLACK:
            return self._base
        held = [account.held.segments.entries for account in self._accounts if account.held is not None]
        if any(segment.length and segment.first <= self._most for entries in held for segment in entries):
            return self._base
        return first - self._most

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_config": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._config is None:
            self._config = _nobody


def cache_for(settings: SparseSettings, config: Any, positions: Positions | None) -> SparseCache:
    """Return an empty cache for a model of this text config that runs `settings`.

    positions: how the model is told places; None where it was not prepared for any.
    """
    layers, most = make_layers(settings, config, {} if positions is None else positions.rotations)
    return SparseCache(layers, key_sources(config), settings, config, most)


def _sparse_layers(layer: Any) -> list[SparseLayer]:
    """Return what holds the keys of a layer of ours; nothing for transformers' own."""
    if isinstance(layer, RaggedLayer):
        return [part.layer for part in layer.parts]
    return [layer] if isinstance(layer, SparseLayer) else []


def _shape(config: Any) -> tuple[Any, ...]:
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return (config.model_type, config.num_hidden_layers, *(getattr(config, name, None) for name in names))


def _nobody() -> None:
    """The model of a cache that came from a file."""
