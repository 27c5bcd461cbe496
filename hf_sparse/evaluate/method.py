"""How perplexity is measured: everything that decides which tokens are fed together and which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from . import windows
from .windows import MODES, Window

KEY_LOSS = (
    2.0  # nats: LongPPL's alpha and beta; a key token gains more, and costs less, with the whole context
)


@dataclass(frozen=True)
class Method:
    """The settings of one evaluation, checked.

    mode: "full" reads each document in one pass, cut to `max_length`; "strided" in overlapping windows `stride` apart;
        "rolling" in disjoint ones, as lm-evaluation-harness.
    max_length: tokens the model reads at once, the prefix included.
    stride: tokens from one window to the next, of "strided"; None is half of `max_length`.
    bos: documents begin with the BOS token, else the EOS token.
    bos_each_window: so does every later window, in place of its first token; None is False for "rolling" only.
        Windows of the context curve and of key tokens begin with it unless this is False.
    contexts: tokens that the last `context_targets` tokens of every long document are scored from, one point of a curve
        each.
    key_tokens: tokens of the short context that key tokens are found with (LongPPL, arXiv:2410.23771); None leaves it.
    mask_share: share of the tokens that an encoder has masked at once.
    batch_size: windows in one forward pass.
    prefill_chunk: tokens fed at a time, the earlier ones in a cache; None as `scoring.fed_at_once` says.
    head_chunk: positions whose logits are held at a time.

    Raises:
        ValueError: a setting that cannot work, alone or with another.
    """

    max_length: int
    mode: str = "full"
    stride: int | None = None
    bos: bool = True
    bos_each_window: bool | None = None
    contexts: tuple[int, ...] = ()
    context_targets: int = 256
    key_tokens: int | None = None
    mask_share: float = 0.15
    batch_size: int = 1
    prefill_chunk: int | None = None
    head_chunk: int = 1024

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}. Available: {', '.join(MODES)}.")
        _check_whole("max_length", self.max_length, 3, "two tokens to score")
        _check_whole("context_targets", self.context_targets, 1, "tokens scored per curve point")
        _check_whole("batch_size", self.batch_size, 1, "windows in one forward pass")
        _check_whole("head_chunk", self.head_chunk, 1, "positions per chunk")
        if self.prefill_chunk is not None:
            _check_whole("prefill_chunk", self.prefill_chunk, 1, "tokens fed at a time")
            if self.batch_size > 1:
                raise ValueError(
                    f"prefill_chunk={self.prefill_chunk} reads one window at a time, got batch_size={self.batch_size}; "
                    "use batch_size=1."
                )
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share must be in (0, 1], got {self.mask_share}; 0.15 is usual.")
        self._check_stride()
        self._check_contexts()
        self._check_key_tokens()

    @property
    def step(self) -> int:
        """Tokens from one strided window to the next."""
        return self.max_length // 2 if self.stride is None else self.stride

    @property
    def prefixed(self) -> bool:
        """True where later windows begin with the prefix token too."""
        if not self.bos:
            return False
        return self.mode != "rolling" if self.bos_each_window is None else self.bos_each_window

    @property
    def prefixed_short(self) -> bool:
        """True where the windows of the context curve and of key tokens begin with the prefix token, in every mode."""
        return self.bos and self.bos_each_window is not False

    @property
    def cut(self) -> int | None:
        """Tokens that documents are cut to; None keeps them whole."""
        return self.max_length if self.mode == "full" else None

    def windows(self, n: int) -> list[Window]:
        """Return what is fed and scored of a document of `n` ids."""
        return windows.windows(self.mode, n, self.max_length, self.step, self.prefixed)

    def context_windows(self, n: int) -> list[Window]:
        """Return one window per curve point, none where the document is too short for the longest."""
        if not self.contexts or n < max(self.contexts):
            return []
        return [
            windows.last(n, context, self.context_targets, self.prefixed_short) for context in self.contexts
        ]

    def short_windows(self, n: int) -> list[Window]:
        """Return the windows that score every token from at most `key_tokens` tokens."""
        assert self.key_tokens is not None
        return list(windows.strided(n, self.key_tokens, max(1, self.key_tokens // 4), self.prefixed_short))

    def without_prefix(self) -> Method:
        """Return the same for a tokenizer that has neither BOS nor EOS, or is not asked for them.

        Raises:
            ValueError: later windows were to begin with one.
        """
        if self.bos_each_window:
            raise ValueError(
                "bos_each_window=True asks for a token that this tokenizer lacks: it has neither BOS nor EOS; "
                "leave it out."
            )
        return replace(self, bos=False, bos_each_window=None)

    def for_encoder(self) -> Method:
        """Return the same where it makes sense for masked-token models.

        Raises:
            ValueError: settings that only causal models have.
        """
        if self.mode == "strided":
            raise ValueError(
                "mode='strided' is for causal models; an encoder sees both sides: use full or rolling."
            )
        for name in ("bos", "bos_each_window", "contexts", "key_tokens", "prefill_chunk"):
            if (value := getattr(self, name)) != getattr(Method, name):
                raise ValueError(f"{name}={value} is for causal models, this is an encoder; leave it out.")
        return self

    def for_causal(self) -> Method:
        """Return the same where it makes sense for causal models.

        Raises:
            ValueError: settings that only encoders have.
        """
        if self.mask_share != Method.mask_share:
            raise ValueError(
                f"mask_share={self.mask_share} is for encoders, this is a causal model; leave it out."
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **found,
            "contexts": list(self.contexts),
            "stride": self.step if self.mode == "strided" else None,
        }

    def _check_stride(self) -> None:
        if self.stride is not None and self.mode != "strided":
            raise ValueError(f"stride={self.stride} goes with mode='strided', got mode={self.mode!r}.")
        if self.mode == "strided":
            _check_whole("stride", self.step, 1, "tokens from one window to the next")
            if self.step >= self.max_length:
                raise ValueError(
                    f"stride must be below max_length={self.max_length}, got {self.step}; "
                    "for windows that do not overlap use mode='rolling'."
                )
        if self.bos_each_window and not self.bos:
            raise ValueError(
                "bos_each_window=True with bos=False: no window gets a BOS token; drop one of the two."
            )

    def _check_contexts(self) -> None:
        if not self.contexts and self.context_targets != Method.context_targets:
            raise ValueError(
                f"context_targets={self.context_targets} is of the context curve, and there is none; "
                "name contexts, or leave it out."
            )
        for context in self.contexts:
            _check_whole("contexts", context, 2, "tokens")
            if context <= self.context_targets:
                raise ValueError(
                    f"a context of {context} tokens must hold more than the {self.context_targets} that are scored; "
                    "use a longer one, or fewer context_targets."
                )
            if context > self.max_length:
                raise ValueError(
                    f"a context of {context} tokens is beyond max_length={self.max_length}; raise that, or drop it."
                )
        if len(set(self.contexts)) < len(self.contexts):
            raise ValueError(f"contexts has one length twice: {list(self.contexts)}; name each once.")

    def _check_key_tokens(self) -> None:
        if self.key_tokens is not None:
            _check_whole("key_tokens", self.key_tokens, 8, "tokens of the short context")
            if self.mode != "full" or self.key_tokens >= self.max_length:
                raise ValueError(
                    f"key_tokens={self.key_tokens} is the short context that the full one is held against, so it goes "
                    f"with mode='full' and a larger max_length, got mode={self.mode!r}, max_length={self.max_length}."
                )


def key_positions(whole: np.ndarray, short: np.ndarray) -> np.ndarray:
    """Return which tokens are key: predicted well with the whole context, badly with the short one.

    Args:
        whole, short: [tokens] nats of dense attention on both.
    """
    return np.flatnonzero((short - whole > KEY_LOSS) & (whole < KEY_LOSS))


def as_contexts(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths as the sorted tuple that a Method takes."""
    return tuple(sorted(lengths))


def check_seed(seed: Any) -> None:
    """Raise ValueError for what no generator of random numbers can begin with."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")


def _check_whole(name: str, value: Any, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least} ({unit}), got {value!r}")
