"""Which tokens of a document are fed and which of them are scored: pure arithmetic on positions.

A document is the sequence ``ids``: its prefix token (BOS or EOS) where it has one, then its tokens. ``ids[0]`` is
context only; every later one is scored exactly once in every mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MODES = ("full", "strided", "rolling")


@dataclass(frozen=True)
class Window:
    """Feed ``ids[begin : stop - 1]``, score ``ids[first : stop]``, each from all tokens fed before it.

    prefixed: the first token fed is replaced by the document's prefix token: sinks are where a model expects them.
    """

    begin: int
    stop: int
    first: int
    prefixed: bool = False

    @property
    def fed(self) -> int:
        """Tokens the model reads."""
        return self.stop - 1 - self.begin


def full(n: int) -> Iterator[Window]:
    """Yield the one window over all `n` ids."""
    yield Window(0, n, 1)


def strided(n: int, length: int, stride: int, prefixed: bool) -> Iterator[Window]:
    """Yield windows of at most `length` ids that begin `stride` apart; each scores what the one before did not reach.

    As in transformers' guide to the perplexity of fixed-length models: every token but those of the first window sees
    at least ``length - stride`` tokens.
    """
    first = 1
    for begin in range(0, n, stride):
        stop = min(begin + length, n)
        if first < stop:
            yield Window(begin, stop, first, prefixed and begin > 0)
            first = stop


def rolling(n: int, length: int, prefixed: bool) -> Iterator[Window]:
    """Yield disjoint windows that feed and score `length` ids each; the last one is moved back to feed as many.

    What lm-evaluation-harness does for ``loglikelihood_rolling`` (``context_len=1``).
    """
    for first in range(1, n, length):
        stop = min(first + length, n)
        begin = max(0, stop - 1 - length)
        yield Window(begin, stop, first, prefixed and begin > 0)


def last(n: int, length: int, targets: int, prefixed: bool) -> Window:
    """Return the window that scores the last `targets` of `n` ids and spans `length` ids in all."""
    return Window(n - length, n, n - targets, prefixed and n > length)


def windows(mode: str, n: int, length: int, stride: int, prefixed: bool) -> list[Window]:
    """Return the windows of a document of `n` ids in one of MODES."""
    if mode == "full":
        return list(full(n))
    if mode == "strided":
        return list(strided(n, length, stride, prefixed))
    return list(rolling(n, length, prefixed))


def masked(n: int, length: int) -> list[Window]:
    """Return windows of at most `length` of `n` ids that are all scored from both sides, the last one moved back.

    Of these windows ``ids[begin : stop]`` are fed, the masked ones included.
    """
    ends = [(first, min(first + length, n)) for first in range(0, n, length)]
    return [Window(max(0, stop - length), stop, first) for first, stop in ends]
