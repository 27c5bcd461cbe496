"""Locality-sensitive hashing of Reformer (Kitaev et al., 2020, arXiv:2001.04451).

In each of several rounds every token falls into a bucket: the direction it points to most, of random ones and their
opposites. The tokens of a bucket stand in chunks of `block`, in the order of the text, and a query reads the chunk that
it falls into itself, the latest of its bucket, and the one before. Each query head hashes its queries by the directions
of its key head.

The publication sorts all tokens by their buckets and cuts the whole row into chunks, so that what a query reads depends
on later tokens: ``selection="prompt"`` does so for the prompt of a generation. As published, queries are keys there
(``shared_qk=True``): a token then sees itself only if it sees nothing else, a pair that several rounds find counts as
often, and nothing is kept besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..patterns.base import Pattern
from ..patterns.checks import LARGEST_SEED, check_count, check_flag
from ..patterns.parts import Bound
from ..patterns.registry import register_pattern
from .base import Selector
from .kept import Nothing

if TYPE_CHECKING:
    from .bucket_index import BucketIndex

_MOST_BUCKETS = 2**20


@register_pattern("lsh")
@dataclass(frozen=True)
class LSH(Selector):
    """The keys that fall into the buckets of the query."""

    keeps_apart: ClassVar[bool] = False
    by_key_head: ClassVar[bool] = False

    rounds: int = 4  # of hashing
    block: int = 64  # tokens per chunk of a bucket; a query reads two in each round
    buckets: int | None = (
        None  # in each round, even; None is 64, or for a prompt that decides for itself Reformer's
    )
    shared_qk: bool = (
        False  # the model's queries are its keys, as in Reformer: hash them once, and count pairs
    )
    seed: int = 0  # of the random directions
    sinks: int = 1  # blocks at the beginning that are always kept
    local: int = 2  # blocks before a query's own that are always kept, as its own is
    dense_layers: int = 0  # layers at the bottom that read everything
    reuse: int = 1  # layers, one after the other, that share what the lowest of them selects
    selection: str = "causal"  # or "prompt": the whole prompt of a generation is sorted, as published

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds, 1, 64)
        check_count("seed", self.seed, 0, LARGEST_SEED)
        check_flag("shared_qk", self.shared_qk)
        if self.buckets is not None:
            check_count("buckets", self.buckets, 2, _MOST_BUCKETS)
            if self.buckets % 2:
                raise ValueError(
                    f"buckets must be even, as each direction has an opposite, got {self.buckets}; choose "
                    f"{self.buckets + 1}"
                )
        if self.looks_ahead and not self.shared_qk:
            raise ValueError(
                "selection='prompt' sorts queries and keys together, so it needs shared_qk=True; leave selection at "
                "'causal' for models with keys of their own"
            )
        if self.shared_qk and (self.sinks or self.local):
            raise ValueError(
                f"shared_qk=True reads what is in the buckets and nothing else, got sinks={self.sinks} and "
                f"local={self.local}; pass sinks=0, local=0, and put a pattern of your choice beside it"
            )

    @property
    def kept(self) -> Pattern:
        return Nothing() if self.shared_qk else super().kept

    def buckets_of(self, length: int) -> int:
        """Return the number of buckets for a sequence whose first call has `length` tokens."""
        if self.buckets is not None:
            return self.buckets
        if not self.looks_ahead:
            return 64
        return max(2, 1 << ((2 * (length // self.block)).bit_length() - 1)) if length >= self.block else 2

    def index(self) -> BucketIndex:
        from .bucket_index import BucketIndex

        return BucketIndex(self)

    def most_pairs(self, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> int:
        query = np.arange(begin, end)
        least = np.zeros_like(query)
        for start in starts:
            least = np.maximum(least, start.at(query))
        return int(np.minimum(2 * self.block * self.rounds, query + 1 - np.minimum(least, query)).sum())

    def numbers_per_token(self, head_dim: int) -> float:
        return 2.0 * self.rounds  # a code of 8 bytes
