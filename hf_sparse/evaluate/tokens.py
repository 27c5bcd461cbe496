"""Documents turned into the tokens that are scored: the same for every variant that is compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..documents import Document, Skipped

_BLANK = re.compile(r"[\s\0\ufeff]*")


@dataclass(frozen=True, eq=False)
class ScoredDocument:
    """One document as the model sees it.

    ids: int32 [N], in front of the document's own tokens its prefix token, if any; the first `context` of them are not
        scored, all others once.
    text_bytes, words: of the text whose tokens are scored; a word is what stands between runs of white space.
    truncated: tokens of the document that were cut off at the end.
    """

    name: str
    ids: np.ndarray
    text_bytes: int
    words: int
    truncated: int
    context: int = 1

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return len(self.ids) - self.context


@dataclass(frozen=True, eq=False)
class ScoredText:
    """All documents of an evaluation.

    documents: those that are scored, in the order given; skipped: the others.
    prefix: what stands before each document: "bos", "eos" (the tokenizer has no BOS), "none" (scored from token 2) or,
        for masked-token models, "special tokens".
    """

    documents: tuple[ScoredDocument, ...]
    skipped: tuple[Skipped, ...]
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
            digest.update(f"{document.context},{len(document.ids)};".encode())
            digest.update(document.ids.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def names_fingerprint(self) -> str:
        """SHA-256 of the documents' names, which go into the rows."""
        return hashlib.sha256("\0".join(document.name for document in self.documents).encode()).hexdigest()


def tokenize(
    tokenizer: Any,
    documents: Iterable[Document],
    max_length: int | None,
    bos: bool = True,
    *,
    masked: bool = False,
) -> ScoredText:
    """Tokenize each document on its own, never joined with another, and cut it to `max_length` tokens; None keeps all.

    With `bos` the input starts with the tokenizer's BOS token, else its EOS token, and every kept token of the document
    is scored; where there is neither, or without `bos`, the document's first token is context only. The prefix counts
    towards `max_length`. For `masked` models every token is scored, and none stands in front.

    The bytes are those of the scored text itself. A fast tokenizer says where each token lies in the document: the text
    runs from the end of the first token that is context only (or from the start) to the end of the last one kept, so
    a character cut in two by the truncation counts whole. A slow one has no offsets: of a document that is not scored
    as a whole, the scored tokens are decoded.
    Documents without text, or with fewer than 2 tokens to score, are skipped.

    Raises:
        ValueError: `max_length` < 3, no documents, a text that is not valid Unicode, or nothing left to score.
    """
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 3
    ):
        raise ValueError(f"max_length must be a whole number >= 3 (two tokens to score), got {max_length!r}")
    prefix, kind = ([], "special tokens") if masked else _prefix(tokenizer, bos)
    kept: list[ScoredDocument] = []
    skipped: list[Skipped] = []
    for document in documents:
        if _BLANK.fullmatch(document.text):
            skipped.append(Skipped(document.name, "no text"))
            continue
        scored = _tokenize_one(tokenizer, document, max_length, prefix, 0 if prefix or masked else 1)
        if scored is None:
            skipped.append(Skipped(document.name, "fewer than 2 tokens to score"))
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


def check_unicode(document: Document) -> None:
    """Raise ValueError for a text with half a character, which tokenizers stumble over."""
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"document {document.name} is not valid Unicode (a lone surrogate at character {error.start}); "
            "read the file as UTF-8."
        ) from None


def _prefix(tokenizer: Any, bos: bool) -> tuple[list[int], str]:
    if bos and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], "bos"
    if bos and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id], "eos"
    return [], "none"


def _tokenize_one(
    tokenizer: Any, document: Document, max_length: int | None, prefix: list[int], first: int
) -> ScoredDocument | None:
    """Return the document's tokens, of which the first `first` are not scored; None where fewer than 2 are."""
    check_unicode(document)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids: list[int] = encoded["input_ids"]
    kept = len(ids) if max_length is None else min(len(ids), max_length - len(prefix))
    if kept - first < 2:
        return None
    if first == 0 and kept == len(ids):
        text = document.text
    elif fast:
        text = _between(document.text, encoded["offset_mapping"], first, kept)
    else:
        text = tokenizer.decode(
            ids[first:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return ScoredDocument(
        document.name,
        np.array(prefix + ids[:kept], dtype=np.int32),
        len(text.encode()),
        len(re.split(r"\s+", text)),  # as lm-evaluation-harness counts: white space at an end adds one
        len(ids) - kept,
        len(prefix) + first,
    )


def _between(text: str, offsets: Sequence[tuple[int, int]], first: int, kept: int) -> str:
    start = offsets[first - 1][1] if first else 0
    stop = len(text) if kept == len(offsets) else offsets[kept - 1][1]
    return text[start:stop]
