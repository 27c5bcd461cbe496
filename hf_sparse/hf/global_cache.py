"""A cache that keeps, beside its keys, which of the tokens it has seen are global."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


class _KeepsFlags:
    """What a cache does with its rows and tokens, done to their flags as well."""

    global_flags: Tensor  # [B, tokens seen] bool

    def __reduce__(self) -> Any:
        return _empty, (type(self).__mro__[2],), vars(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.global_flags = self.global_flags[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.global_flags = self.global_flags[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.global_flags = self.global_flags.repeat_interleave(repeats, dim=0)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.global_flags = self.global_flags[:, : int(self.get_seq_length())]  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.global_flags = self.global_flags[:, :0]


@functools.cache
def _remembering(kind: Any) -> Any:
    return type(kind.__name__, (_KeepsFlags, kind), {"__module__": kind.__module__})


def _empty(kind: Any) -> Any:
    """Return a cache that remembers flags, without content: pickle fills it."""
    return object.__new__(_remembering(kind))


def remember(cache: Any, flags: Tensor) -> None:
    """Keep `flags` on the cache, for the tokens it has seen."""
    if not isinstance(cache, _KeepsFlags):
        kind: Any = type(cache)
        cache.__class__ = _remembering(kind)
    cache.global_flags = flags[:, : int(cache.get_seq_length())]
