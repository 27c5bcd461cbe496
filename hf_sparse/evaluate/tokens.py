"""Documents turned into the tokens that are scored: the same for every run that is compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..documents import Document


@dataclass(frozen=True, eq=False)
class ScoredDocument:
    """One document as the model sees it.

    ids: the input, the prefix token included; every token but the first is scored, each once.
    text_bytes: UTF-8 bytes of the text whose tokens are scored.
    truncated: tokens of the document that were cut off at the end.
    """

    name: str
    ids: tuple[int, ...]
    text_bytes: int
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return len(self.ids) - 1


@dataclass(frozen=True, eq=False)
class ScoredText:
    """All documents of an evaluation.

    documents: those that are scored, in the order given.
    skipped: names of documents with fewer than 2 tokens to score.
    prefix: what stands before each document: "bos", "eos" (the tokenizer has no BOS) or "none" (scored from token 2).
    """

    documents: tuple[ScoredDocument, ...]
    skipped: tuple[str, ...]
    prefix: str

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def truncated(self) -> int:
        return sum(document.truncated for document in self.documents)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token id: equal where two evaluations scored the same tokens."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(repr(document.ids).encode())
        return digest.hexdigest()


def tokenize(tokenizer: Any, documents: Iterable[Document], max_length: int, bos: bool = True) -> ScoredText:
    """Tokenize each document on its own, never joined with another, and cut it to `max_length` tokens.

    With `bos` the input starts with the tokenizer's BOS token, else its EOS token, and every kept token of the document
    is scored; where there is neither, or without `bos`, the document's first token is context only. The prefix counts
    towards `max_length`.

    The bytes are those of the scored text itself. A fast tokenizer says where each token lies in the document: the text
    runs from the end of the first token that is context only (or from the start) to the end of the last one kept, so
    a character cut in two by the truncation counts whole. A slow one has no offsets: its scored tokens are decoded.

    Raises:
        ValueError: `max_length` < 3, no documents, a text that is not valid Unicode, or nothing left to score.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3:
        raise ValueError(f"max_length must be a whole number >= 3 (two tokens to score), got {max_length!r}")
    prefix, kind = _prefix(tokenizer, bos)
    kept: list[ScoredDocument] = []
    skipped: list[str] = []
    for document in documents:
        scored = _tokenize_one(tokenizer, document, max_length, prefix)
        if scored is None:
            skipped.append(document.name)
        else:
            kept.append(scored)
    if not kept:
        raise ValueError(
            f"none of the {len(skipped)} documents has 2 tokens to score; give longer texts."
            if skipped
            else "there are no documents to evaluate; give at least one."
        )
    return ScoredText(tuple(kept), tuple(skipped), kind)


def check_vocabulary(largest: int, model: Any) -> None:
    """Raise ValueError where a token id lies beyond the rows of the model's input embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives the token {largest}, but {type(model).__name__} knows only 0 to {rows - 1}; "
            "use the tokenizer that belongs to the model."
        )


def _prefix(tokenizer: Any, bos: bool) -> tuple[list[int], str]:
    if bos and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], "bos"
    if bos and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id], "eos"
    return [], "none"


def _tokenize_one(
    tokenizer: Any, document: Document, max_length: int, prefix: list[int]
) -> ScoredDocument | None:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"document {document.name} is not valid Unicode (a lone surrogate at character {error.start}); "
            "read the file as UTF-8."
        ) from None
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids: list[int] = encoded["input_ids"]
    kept = min(len(ids), max_length - len(prefix))
    first = 0 if prefix else 1  # the first token that is scored
    if kept - first < 2:
        return None
    if fast:
        text = _between(document.text, encoded["offset_mapping"], first, kept)
    else:
        text = tokenizer.decode(
            ids[first:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return ScoredDocument(document.name, tuple(prefix + ids[:kept]), len(text.encode()), len(ids) - kept)


def _between(text: str, offsets: Sequence[tuple[int, int]], first: int, kept: int) -> str:
    start = offsets[first - 1][1] if first else 0
    stop = len(text) if kept == len(offsets) else offsets[kept - 1][1]
    return text[start:stop]
