"""Pieces: consecutive tokens of one document, between the special tokens that the model expects around a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Frame:
    """The special tokens before and after the text of every piece."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    @staticmethod
    def causal(tokenizer: Any) -> Frame:
        """Return BOS before each piece; EOS where there is no BOS, nothing where there is neither."""
        found = (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None)
        return Frame(before=tuple(found)[:1])

    @staticmethod
    def encoder(tokenizer: Any) -> Frame:
        """Return what the tokenizer itself puts around a text, such as [CLS] and [SEP].

        Raises:
            ValueError: a text's own tokens are not found among those of the same text with special ones.
        """
        text = tokens_of(tokenizer, "a")
        whole = tokenizer("a", verbose=False)["input_ids"]
        starts = [i for i in range(len(whole)) if text and whole[i : i + len(text)] == text]
        if not starts:
            raise ValueError(
                f"the special tokens of {type(tokenizer).__name__} cannot be told from the text's: it makes {text} of "
                f"'a', and {whole} with special tokens; use the tokenizer that the encoder was trained with."
            )
        return Frame(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(text) :]))

    def cut(self, ids: Sequence[int], length: int) -> list[np.ndarray]:
        """Return pieces of at most `length` tokens, int32, that together hold every one of `ids` once, in order."""
        room = length - len(self)
        return [
            np.array([*self.before, *ids[i : i + room], *self.after], np.int32)
            for i in range(0, len(ids), room)
        ]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without special ones; a text of white space alone has none."""
    if not text.strip():
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
