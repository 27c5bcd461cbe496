"""An answer on stdout as it comes, and on stderr how fast it came and how much the cache holds."""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor
from transformers import Cache, TextStreamer

from ..hf.cache import SparseCache

REFRESH = 0.2  # seconds between two states of the line that is written over
CLEAR = "\r\033[K"  # to the start of the line, and what is there away
EVERY = 2.0  # seconds between two lines of --stats


class Meter(TextStreamer):
    """Streams the text of one call of generate, and counts its tokens.

    Where stderr is a terminal and the text goes elsewhere, a line on stderr is written over while it runs.

    Args:
        stats: lines on stderr while it runs, also where it is no terminal.
    """

    def __init__(self, tokenizer: Any, cache: Cache, *, stats: bool, quiet: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache, self.quiet = cache, quiet
        self.over = sys.stderr.isatty() and not sys.stdout.isatty() and not quiet
        self.lines = stats and not self.over
        self.known = cache.get_seq_length()  # tokens, read in earlier calls
        self.count = 0  # tokens written
        self.begun = self.first = self.last = self.shown = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.read = value.numel() - self.known
        else:
            self.count += 1
            self.last = time.perf_counter()
            self.first = self.first if self.count > 1 else self.last
        super().put(value)
        if (self.over or self.lines) and self.last - self.shown >= (REFRESH if self.over else EVERY):
            self.shown = self.last
            begin, end = (CLEAR, "") if self.over else ("", "\n")
            print(f"{begin}{self.state()}", end=end, file=sys.stderr, flush=True)

    def report(self) -> None:
        """Write the last line, over the one that ran."""
        if not self.quiet:
            clear = CLEAR if self.over else ""
            seconds = self.first - self.begun
            print(f"{clear}{self.read:,} tokens read in {seconds:.2f} s, {self.state()}", file=sys.stderr)

    def state(self) -> str:
        """Return tokens written, tokens per second after the first, and what the cache holds."""
        seconds = self.last - self.first
        rate = f" at {(self.count - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
        size, kept, seen = cache_bytes(self.cache), tokens_kept(self.cache), self.cache.get_seq_length()
        return f"{self.count:,} written{rate}, cache {size / 2**20:.2f} MiB, {kept:,} of {seen:,} tokens kept"


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values, those of the cache's empty slots included."""
    if isinstance(cache, SparseCache):
        return cache.nbytes
    return sum(
        states.untyped_storage().nbytes()
        for layer in cache.layers
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if states is not None
    )


def tokens_kept(cache: Cache) -> int:
    """Return the tokens of which some layer holds keys."""
    if isinstance(cache, SparseCache):
        return cache.kept
    slots = [keys.shape[2] for layer in cache.layers if (keys := getattr(layer, "keys", None)) is not None]
    return min(cache.get_seq_length(), max(slots, default=0))
