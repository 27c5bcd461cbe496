"""A text that a model goes on with, call after call, on one cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache, StoppingCriteria

from ..evaluate.tokens import check_vocabulary
from ..hf import make_cache
from .meter import Meter

CACHES = ("sparse", "dynamic", "static")


@dataclass(frozen=True)
class Writing:
    """How a model goes on: settings of generate, which cache, and what is said on stderr."""

    generate: dict[str, Any]
    cache: str = "sparse"
    stats: bool = False
    quiet: bool = False


class RunningText:
    """The tokens of a text, and the cache that has read all of them but the newest."""

    def __init__(self, model: Any, tokenizer: Any, writing: Writing) -> None:
        make_cache(model)  # refuses models that have no use for one
        self.model, self.tokenizer, self.writing = model, tokenizer, writing
        # The cache is passed to generate, which takes no second word on it, nor beams that a stream cannot show.
        model.generation_config.cache_implementation = None
        self.ids: list[int] = []
        self.cache: Cache | None = None

    def encode(self, text: str, *, as_written: bool = False) -> list[int]:
        """Return the tokens of what is added to the text; the first begin with BOS, where the tokenizer has one.

        as_written: special tokens are in the text already.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not as_written and not self.ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        if ids:
            check_vocabulary(max(ids), self.model)
        return ids

    def go_on(self, added: list[int], stop: StoppingCriteria | None = None) -> None:
        """Add tokens, and what the model writes after them, without the token that ends it; stream that to stdout."""
        ids = torch.tensor([self.ids + added], device=self.model.device)
        if self.cache is None:
            self.cache = self._new_cache(ids.shape[1])
        meter = Meter(self.tokenizer, self.cache, stats=self.writing.stats, quiet=self.writing.quiet)
        written = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # a padding token in the text is part of it
            past_key_values=self.cache,
            streamer=meter,
            stopping_criteria=None if stop is None else [stop],
            num_beams=1,
            **self.writing.generate,
        )
        meter.report()
        self.ids = written[0].tolist()
        if self.ids[-1] in self._ends():  # which no cache has read: it is the newest
            self.ids.pop()

    def read_again(self) -> None:
        """Give the cache up: the next call reads the whole text."""
        self.cache = None

    def _new_cache(self, length: int) -> Cache:
        config = self.model.config.get_text_config()
        if self.writing.cache == "dynamic":
            return DynamicCache(config=config)
        if self.writing.cache == "static":
            return StaticCache(config=config, max_cache_len=length + self.writing.generate["max_new_tokens"])
        return make_cache(self.model)

    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]
