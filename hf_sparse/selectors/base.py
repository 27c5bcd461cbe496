"""What a content-based pattern is: a rule that looks at queries and keys and says which keys are read.

The tokens of a sequence are cut into blocks of `block` tokens, counted from its first one. What a query reads is found
from what lies before it: so a later token never changes what an earlier one reads, and one pass, chunks of a prompt and
single tokens of a generation select the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..patterns.base import Context, Pattern
from ..patterns.checks import check_choice, check_count
from ..patterns.full import Full
from ..patterns.parts import Bound, Every, Part
from .kept import KeptBlocks

if TYPE_CHECKING:
    from .index import Index

SELECTIONS = ("causal", "prompt")


class Selector(Pattern, ABC):
    """A pattern that selects keys by their content, besides those it always keeps.

    A subclass has the options below, and an index that selects. `allows` answers what may be read at all, which is
    everything.
    """

    by_content: ClassVar[bool] = True
    keeps_apart: ClassVar[bool] = True  # what is selected is none of what is kept
    by_key_head: ClassVar[bool] = True  # the query heads of a key head read the same

    block: int  # tokens per block of keys
    sinks: int  # blocks at the beginning that are always kept
    local: int  # blocks before a query's own that are always kept, as its own is
    dense_layers: int  # layers at the bottom that read everything
    reuse: int  # layers, one after the other, that share what the lowest of them selects

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("sinks", self.sinks, 0)
        check_count("local", self.local, 0)
        check_count("dense_layers", self.dense_layers, 0)
        check_count("reuse", self.reuse, 1)
        check_choice("selection", getattr(self, "selection", SELECTIONS[0]), SELECTIONS)

    @property
    def per_layer(self) -> bool:
        return self.dense_layers > 0

    @property
    def looks_ahead(self) -> bool:
        """True where later tokens of a prompt decide what earlier ones read, as some publications have it."""
        return getattr(self, "selection", SELECTIONS[0]) == "prompt"

    @property
    def queries(self) -> int:
        """Queries that share a selection."""
        return self.block

    @property
    def kept(self) -> Pattern:
        """What is read whatever is selected."""
        return KeptBlocks(self.block, self.local * self.block, self.sinks * self.block)

    def check_fit(self, heads: int, layers: int) -> None:
        if self.dense_layers > layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} is more than the {layers} layers of the model; lower it"
            )

    def at_layer(self, layer: int) -> Pattern:
        """Return what one layer runs: this, or dense attention."""
        if layer < self.dense_layers:
            return Full()
        own: Any = self
        return replace(own, dense_layers=0) if self.dense_layers else self

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query == query) & (key == key)

    def parts(self, context: Context) -> Sequence[Part]:
        return [Part(Every())]

    @abstractmethod
    def index(self) -> Index[Any]:
        """Return what selects for one sequence, of which no token has come."""

    @abstractmethod
    def most_pairs(self, begin: int, end: int, starts: tuple[Bound, ...] = ()) -> int:
        """Return the pairs per head that queries at positions begin .. end select at most, besides those kept.

        starts: before which the model itself lets a query see nothing.
        """

    @abstractmethod
    def numbers_per_token(self, head_dim: int) -> float:
        """Return how many numbers an index reads per earlier token for one query, for each key head of this size."""
