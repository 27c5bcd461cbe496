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
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ..patterns import Pattern, get_pattern
from ..patterns.places import Place
from ..plan import Constraint, Segments
from ..plan.held import SLACK, Held, extend, take_back, take_rows
from .account import Account
from .cache_layer import LinearAndSparseLayer, SparseLayer
from .describe import layer_constraint
from .global_projections import projecting
from .placing import Positions
from .stored_settings import SparseSettings, key_sources, layer_count, query_heads

_ALWAYS = 2**62  # of the tokens seen nothing is ever dropped
_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)


@dataclass(frozen=True, eq=False)
class CacheCall:
    """What a forward pass on a cache is told about the keys.

    tokens: all tokens seen and new; padding is in no sequence.
    layers: for each layer, the sequences in the slots that its `update` returns; None for a layer of another kind.
    base: rotary position 0 is the token at this position of every sequence.
    far_keys: gives a layer's keys [B, H_kv, K, D] as far queries see them, where its cache holds them so; once, after
        the layer's `update`.
    """

    tokens: Segments
    layers: tuple[Segments | None, ...]
    base: int
    far_keys: Callable[[int], Tensor | None]


class SparseCache(Cache):
    """A cache whose layers hold what the pattern of a model leaves to be seen; see `make_cache`.

    A layer with a sliding window or chunks of the model's own holds what both leave to be seen. Latents (MLA) are held
    as keys are. Linear states and other kinds of layers are the model's own.
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
        self._own = [layer for layer in layers if isinstance(layer, SparseLayer)]
        self._accounts = list({id(layer.account): layer.account for layer in self._own}.values())
        self._most = most
        self._shape, self._config = _shape(config), weakref.ref(config)
        self._tokens, self._base, self._broken = Held.nothing(0), 0, False
        self._coming: tuple[Held, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, room for coming tokens included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, SparseLayer):
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
        read = [self.layers[source] for source in self._sources]
        layers = [steps[id(layer.account)].call if isinstance(layer, SparseLayer) else None for layer in read]
        return CacheCall(coming.segments, tuple(layers), base, self._take_far_keys)

    def end(self) -> None:
        """End the forward pass, whether it came to its end or not."""
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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: keys that the shorter sequence needs were dropped; the cache stays as it was.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}")
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
        super().reset()

    def _take_far_keys(self, index: int) -> Tensor | None:
        layer = self.layers[index]
        return layer.take_far_keys() if isinstance(layer, SparseLayer) else None

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
    heads, rotations = query_heads(config), {} if positions is None else positions.rotations
    accounts: dict[Any, Account] = {}
    layers: list[Any] = []
    most: list[int | None] = []
    sources = key_sources(config)
    for index, stock in enumerate(_stock_layers(config)):
        pattern = settings.pattern_at(index)
        # Global queries with projections of their own look at every token.
        own = type(stock) in _REPLACED and projecting(pattern, index, heads) is None
        borrows = sources[index] != index
        if isinstance(stock, DynamicLayer) or borrows:
            most.append(_farthest(pattern, index) if rotations and (own or borrows) else None)
        readers = [reader for reader, source in enumerate(sources) if source == index]
        if len(readers) > 1 and (pattern.per_layer or len({settings.pattern_at(r) for r in readers}) > 1):
            pattern = get_pattern("full")  # holds what any of them may see
        if not own:
            layers.append(stock)
            continue
        limit = Constraint() if not stock.is_sliding else layer_constraint(config, index, causal=True)
        key = (pattern, limit, index if pattern.per_layer else None)
        account = accounts.setdefault(key, Account(pattern, limit, heads, index))
        if isinstance(stock, LinearAttentionAndFullAttentionLayer):
            layers.append(LinearAndSparseLayer(account, rotations.get(index), stock.number_of_states))
        else:
            layers.append(SparseLayer(account, rotations.get(index), stock.is_sliding))
    bounded = [m for m in most if m is not None]
    farthest = max(bounded) if bounded and len(bounded) == len(most) else None
    return SparseCache(layers, sources, settings, config, farthest)


def _stock_layers(config: Any) -> list[Any]:
    """Return the layers that transformers would take, as many as there are."""
    stock: list[Any] = list(DynamicCache(config=config).layers)
    # Of BART's numbers of layers transformers takes the encoder's.
    return [*stock, *(DynamicLayer() for _ in range(layer_count(config) - len(stock)))][: layer_count(config)]


def _farthest(pattern: Pattern, layer: int) -> int | None:
    """Return the farthest place of a query where sinks stay at their own; None where places are not of that kind."""
    places = pattern.places(layer)
    return None if places is None or places.key != Place() else places.query.most


def _shape(config: Any) -> tuple[Any, ...]:
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return (config.model_type, config.num_hidden_layers, *(getattr(config, name, None) for name in names))


def _nobody() -> None:
    """The model of a cache that came from a file."""
