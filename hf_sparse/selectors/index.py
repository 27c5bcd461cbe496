"""What tokens leave behind for those that come later.

A cache keeps an index for each sequence of a layer; a call without a cache makes one for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from ..patterns.parts import Bound
from .base import Selector
from .selection import AnySelection

S = TypeVar("S", bound=Selector)


class Index(ABC, Generic[S]):
    """Selects for the new queries of a sequence, in as many calls as its tokens come in.

    selector: its budget may be another from call to call.
    length: tokens seen.
    """

    _tensors: ClassVar[tuple[str, ...]]  # attributes [R, ...] or None, of which each row has its own

    def __init__(self, selector: S) -> None:
        self.selector = selector
        self.length = 0

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor, first: int = 0, starts: tuple[Bound, ...] = ()
    ) -> AnySelection:
        """Return what new causal queries read.

        Args:
            query: [R, H, Q, D], the last Q of the keys, all of them new.
            key: [R, H_kv, K, D], the keys of the sequence from position `first` on; those before it are seen no more.
            starts: before which the model itself lets a query see nothing.
        Raises:
            ValueError: tokens came in between that this index has not seen.
        """
        end = first + key.shape[2]
        begin = end - query.shape[2]
        if begin < self.length:
            self.check_taken_back(begin)
            self._take_back(begin)
            self.length = begin
        if begin != self.length:
            raise ValueError(
                f"{self.selector} knows the first {self.length} tokens of a sequence and is asked to go on after "
                f"{begin}; use a cache made by hf_sparse.make_cache, or pass use_cache=False with the whole text"
            )
        exact = torch.promote_types(query.dtype, torch.float32)
        found = self._select(query.detach().to(exact), key.detach(), first, starts)
        self.length = end
        return found

    def check_taken_back(self, length: int) -> None:
        """Raise ValueError if it cannot go on after the first `length` of the tokens seen."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows that go on alike; 0 before the first token."""

    def taken(self, rows: Tensor | None) -> Self:
        """Return an index of its own for some rows, int64; None for all."""
        made = copy(self)
        for name in self._tensors:
            if (x := getattr(self, name)) is not None:
                setattr(made, name, x.clone() if rows is None else x.index_select(0, rows.to(x.device)))
        return made

    def joined(self, others: Sequence[Self]) -> Self:
        """Return one index for the rows of this and of others that have seen equally many tokens."""
        made, indexes = copy(self), [self, *others]
        for name in self._tensors:
            parts = [x for index in indexes if (x := getattr(index, name)) is not None]
            setattr(made, name, torch.cat(self._alike(name, parts)) if parts else None)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held, the room for coming tokens included."""
        held = (getattr(self, name) for name in self._tensors)
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    @abstractmethod
    def _select(self, query: Tensor, key: Tensor, first: int, starts: tuple[Bound, ...]) -> AnySelection:
        """Return what the queries, in float32 at least, read, and keep what later ones need; `length` is as before."""

    @abstractmethod
    def _take_back(self, length: int) -> None:
        """Forget the tokens from `length` on."""

    def _alike(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        """Return an attribute of several indexes in shapes that differ in the rows alone."""
        return parts
