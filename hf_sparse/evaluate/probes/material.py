"""What samples are made of: a tokenizer's tokens, and the haystack that hides what is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...documents import Document

# The filler of Mohtashami & Jaggi, 2023 (arXiv:2305.16300), repeated as often as needed.
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SPARE = 4  # tokens of haystack documents that are read, in lengths of the longest sample


@dataclass(frozen=True, eq=False)
class Material:
    """Tokens for samples of up to some length.

    prefix: the BOS token, nothing where the tokenizer has none.
    haystack: int32 [tokens], a ring that samples cut their filling from.
    """

    tokenizer: Any
    prefix: list[int]
    haystack: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, documents: Iterable[Document | str] | None, longest: int) -> Material:
        """Return the material for samples of up to `longest` tokens; without documents the filler is the haystack.

        Of the documents no more than is needed is read.

        Raises:
            ValueError: documents without a token.
        """
        prefix = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        if documents is None:
            return cls(tokenizer, prefix, np.array(_encode(tokenizer, " " + FILLER), dtype=np.int32))
        tokens: list[int] = []
        for document in documents:
            tokens += _encode(tokenizer, document if isinstance(document, str) else document.text)
            if len(tokens) >= _SPARE * longest:
                break
        if not tokens:
            raise ValueError("the haystack holds no text; give documents with text in them.")
        return cls(tokenizer, prefix, np.array(tokens, dtype=np.int32))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, no special ones added."""
        return _encode(self.tokenizer, text)

    def split(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both texts as they stand together, cut where the answer begins to decide them."""
        whole, alone = self.encode(question + answer), self.encode(question)
        same = 0
        while same < min(len(whole), len(alone)) and whole[same] == alone[same]:
            same += 1
        return whole[:same], whole[same:]

    def filling(self, count: int, start: int) -> np.ndarray:
        """Return `count` tokens of the haystack from token `start` on, int32 [count]."""
        return self.haystack[(start + np.arange(count)) % len(self.haystack)]

    @cached_property
    def ordinary(self) -> np.ndarray:
        """The tokens that are neither special nor added to the vocabulary later, sorted, int32 [tokens]."""
        left_out = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return np.array(sorted(set(self.tokenizer.get_vocab().values()) - left_out), dtype=np.int32)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
