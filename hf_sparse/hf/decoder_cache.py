"""The cache of a decoder that attends to an encoder: its own keys as the pattern leaves them, the encoder's all."""

from __future__ import annotations

from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from .cache import SparseCache


class SparseDecoderCache(EncoderDecoderCache):
    """A `SparseCache` of a decoder's own keys, beside transformers' cache of the encoder's, which never grows."""

    def __init__(self, own: SparseCache) -> None:
        super().__init__(own, DynamicCache())
        self.own = own

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those of the encoder included."""
        total = self.own.nbytes
        for layer in self.cross_attention_cache.layers:
            assert isinstance(layer, DynamicLayer)
            if layer.keys is not None and layer.values is not None:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    @property
    def kept(self) -> int:
        """Tokens of which some layer of the decoder holds its own keys."""
        return self.own.kept

    def check_dynamic_cache(self, method: str) -> None:
        """Let `crop`, `batch_repeat_interleave` and `batch_select_indices` pass: ours has them too."""

    def stop_recording(self) -> None:
        """Drop keys again as soon as no token can see them, after `activate_past_recording`."""
        self.own.stop_recording()
