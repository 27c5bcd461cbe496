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
from .places import Places

if TYPE_CHECKING:
    from .algebra import Union


_LISTED = 12  # values of an option that are written out


@dataclass(frozen=True)
class Context:
    """What a position alone cannot know about the call in which a pattern is asked.

    causal: keys after the query are not allowed (the caller ANDs this; a pattern may only use it to save work).
    layer: index of the layer, 0 at the bottom; None unless the pattern declares `per_layer`.
    heads: query heads of the call, for patterns that divide them.
    length: tokens of the sequence, None in causal models, where later tokens must not change what earlier ones see.
    chosen: the positions that this sequence's `global_attention_mask` or special tokens made global, ascending; empty
        unless the pattern declares `takes_globals`.
    """

    causal: bool = True
    layer: int | None = None
    heads: int = 1
    length: int | None = None
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pattern:
    """A frozen dataclass whose fields are the options; its truth is `allows`."""

    name: ClassVar[str] = ""  # set by register_pattern
    by_content: ClassVar[bool] = False  # queries and keys decide what is read; see `hf_sparse.selectors`
    sees_itself: ClassVar[bool] = True  # False only where what is selected beside it holds the token itself

    @property
    def members(self) -> tuple[Pattern, ...]:
        """The patterns this one is made of; none unless it is composed."""
        return ()

    @property
    def per_layer(self) -> bool:
        """True where `allows` looks at context.layer: each layer then has its own plan."""
        return any(member.per_layer for member in self.members)

    @property
    def content_based(self) -> bool:
        """True where queries and keys decide what is read here or in a member, not positions alone."""
        return self.by_content or any(member.content_based for member in self.members)

    @property
    def takes_globals(self) -> bool:
        """True where `allows` looks at context.chosen: `forward` then takes a `global_attention_mask`."""
        return any(member.takes_globals for member in self.members)

    @property
    def global_token_ids(self) -> tuple[int, ...]:
        """Vocabulary ids whose tokens become global wherever they occur in the input; see `takes_globals`."""
        return tuple(sorted({i for member in self.members for i in member.global_token_ids}))

    def check_fit(self, heads: int, layers: int) -> None:
        """Raise ValueError unless the options fit a model of `layers` layers with `heads` query heads each."""
        for member in self.members:
            member.check_fit(heads, layers)

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
        """Return parts whose union is exactly what `allows` allows and, for every token, itself.

        None where the pattern has no such form: it is then planned from `allows` as tiles, block by block.
        """
        return None

    def places(self, layer: int | None) -> Places | None:
        """Return at which distance far keys are scored in causal models; None where all keep their own.

        layer: index of the layer; None asks for those of any layer that has them.
        """
        return None

    def resolve(self, seq_len: int) -> Pattern:
        """Return this pattern with options that adapt to the length fixed for sequences of `seq_len` tokens.

        Called once, when a model is patched: nothing may depend on the current length, or decoding would differ from
        one pass.
        """
        return self

    def options(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def __or__(self, other: Pattern) -> Union:
        from .algebra import Union

        return Union.of(self, other)

    def __str__(self) -> str:
        options = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        # An option that is off (None, False, nothing) and stays off goes without saying.
        said = ", ".join(
            f"{n}={short(v)}"
            for n, v, default in options
            if v != default or not (v is None or v is False or v == ())
        )
        return f"{self.name or type(self).__name__}({said})"

    def mask(
        self,
        q_len: int,
        k_len: int | None = None,
        *,
        heads: int = 1,
        causal: bool = True,
        layer: int = 0,
        chosen: Sequence[int] = (),
    ) -> Tensor:
        """Return the dense mask [H, Q, K], True = may attend: for pictures and tests, quadratic in length.

        The queries sit at the last ``q_len`` of the ``k_len`` positions.
        """
        if self.content_based:
            raise ValueError(
                f"what {self} reads depends on queries and keys, so positions alone give no mask"
            )
        k_len = q_len if k_len is None else k_len
        query = torch.arange(k_len - q_len, k_len)[None, :, None]
        key = torch.arange(k_len)[None, None, :]
        context = Context(causal, layer, heads, None if causal else k_len, tuple(chosen))
        allowed = self.allows(context, torch.arange(heads)[:, None, None], query, key) | (query == key)
        if causal:
            allowed = allowed & (key <= query)
        return allowed.expand(heads, q_len, k_len)


def short(value: Any) -> str:
    """Return the text of an option, long lists cut in the middle."""
    if isinstance(value, tuple) and len(value) > _LISTED:
        shown = ", ".join(map(repr, value[: _LISTED // 2]))
        return f"({shown}, ... {value[-1]!r}: {len(value)} in all)"
    return str(value) if isinstance(value, Pattern) else repr(value)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
