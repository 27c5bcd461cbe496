"""What a pattern is: one predicate on token positions, and optionally the interval parts it consists of.

Positions are places of tokens within their own sequence: padding is not counted and packed samples restart at 0.
Causality, padding, packing and the model's own window are ANDed by the caller (`hf_sparse.plan.constraint`), never
written inside a pattern, and every token sees itself whatever the pattern says.

`window` means the same everywhere: the keys a query sees on its causal side, itself included. `window=1` is self only;
key k is seen by query q when ``0 <= q - k < window``. In bidirectional models it reaches ``window - 1`` to each side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .parts import Part

if TYPE_CHECKING:
    from .algebra import Union


LARGEST = 2**40  # tokens; positions and their sums and products with a stride stay within int64


@dataclass(frozen=True)
class Context:
    """What a position alone cannot know about the call in which a pattern is asked.

    causal: keys after the query are not allowed (the caller ANDs this; a pattern may only use it to save work).
    layer: index of the layer, 0 at the bottom; None unless the pattern declares `per_layer`.
    """

    causal: bool = True
    layer: int | None = None


@dataclass(frozen=True)
class Pattern:
    """A frozen dataclass whose fields are the options; its truth is `allows`."""

    name: ClassVar[str] = ""  # set by register_pattern
    per_layer: ClassVar[bool] = (
        False  # True where `allows` looks at context.layer: each layer then has its own plan
    )

    def allows(self, context: Context, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell which keys each query may attend to.

        Args:
            head: query head indices, int64, broadcastable with the next two.
            query, key: token positions, int64, broadcastable with each other.
        Returns:
            bool tensor of the broadcast shape (or broadcastable to it), True = may attend.
        """
        raise NotImplementedError(f"{type(self).__name__} must define allows(context, head, query, key)")

    def parts(self, context: Context) -> Sequence[Part] | None:
        """Return interval parts whose union is exactly `allows`, or None to be planned from `allows` as tiles."""
        return None

    def resolve(self, seq_len: int) -> Pattern:
        """Return this pattern with options that adapt to the length fixed for sequences of `seq_len` tokens.

        Called once, when a model is patched: nothing may depend on the current length, or decoding would differ from
        one pass. The built-in patterns have no such option.
        """
        return self

    def options(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def __or__(self, other: Pattern) -> Union:
        from .algebra import Union

        return Union.of(self, other)

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name or type(self).__name__}({options})"

    def mask(
        self, q_len: int, k_len: int | None = None, *, heads: int = 1, causal: bool = True, layer: int = 0
    ) -> Tensor:
        """Return the dense mask [H, Q, K], True = may attend: for pictures and tests, quadratic in length.

        The queries sit at the last ``q_len`` of the ``k_len`` positions.
        """
        k_len = q_len if k_len is None else k_len
        query = torch.arange(k_len - q_len, k_len)[None, :, None]
        key = torch.arange(k_len)[None, None, :]
        allowed = self.allows(Context(causal, layer), torch.arange(heads)[:, None, None], query, key) | (
            query == key
        )
        if causal:
            allowed = allowed & (key <= query)
        return allowed.expand(heads, q_len, k_len)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        note = " (1 is the token itself only)" if name == "window" else ""
        raise ValueError(f"{name} must be >= {least}{note}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, more than any sequence has tokens, got {value}")


def check_positions(name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as sorted distinct positions; raise ValueError where it is not a list of whole numbers >= 0."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of token positions such as (0, 64), got {value!r}")
    for position in value:
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= LARGEST:
            raise ValueError(f"{name} must hold whole numbers from 0 to {LARGEST}, got {position!r}")
    return tuple(sorted(set(value)))
