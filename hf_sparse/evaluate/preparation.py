"""Texts and settings fitted to a model before anything is measured: what it can read, or why it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..documents import Document, named
from ..hf.extension import readable_tokens
from .head import ChunkedHead
from .method import Method
from .tokens import ScoredText, check_vocabulary, tokenize
from .variants import base_of

LEAST_WINDOW = 3  # tokens of an encoder's window besides the special ones


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is scored, and how.

    around: the special tokens before and after every window of an encoder; causal models have none.
    """

    text: ScoredText
    method: Method
    around: tuple[list[int], list[int]]


def prepare(
    head: ChunkedHead, tokenizer: Any, documents: Iterable[Document | str], method: Method
) -> Prepared:
    """Tokenize the documents for the model of `head`, and return them with the settings that hold for it.

    Raises:
        ValueError: settings that this kind of model does not have, more positions or tokens than it has, texts with
            nothing to score or too short for the context curve.
    """
    base = base_of(head.model)
    method = method.for_encoder() if head.masked else method.for_causal()
    check_length(base, method.max_length, "max_length")
    around = _special_tokens(tokenizer, method) if head.masked else ([], [])
    cut = None if method.cut is None else method.cut - len(around[0]) - len(around[1])
    check_cache(head, method.prefill_chunk)
    text = tokenize(tokenizer, named(documents), cut, method.bos, masked=head.masked)
    if text.prefix == "none":
        method = method.without_prefix()
    _check_contexts(text, method)
    largest = max(int(document.ids.max()) for document in text.documents)
    special = [*around[0], *around[1], tokenizer.mask_token_id] if head.masked else []
    check_vocabulary(max(largest, *special) if special else largest, base)
    return Prepared(text, method, around)


def trained_length(base: Any) -> int | None:
    """Return the tokens a model was trained, or extended, to read at once, None where its config does not say."""
    return readable_tokens(base)


def _special_tokens(tokenizer: Any, method: Method) -> tuple[list[int], list[int]]:
    """Return the special tokens an encoder expects before and after its text."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "this tokenizer has no mask token, which a masked-token model is scored with; set one."
        )
    before = [token for token in (tokenizer.cls_token_id,) if token is not None]
    after = [token for token in (tokenizer.sep_token_id,) if token is not None]
    least = len(before) + len(after) + LEAST_WINDOW
    if method.max_length < least:
        raise ValueError(
            f"max_length={method.max_length} leaves too little room beside the encoder's special tokens; "
            f"use max_length={least} or more."
        )
    return before, after


def check_cache(head: ChunkedHead, prefill_chunk: int | None) -> None:
    """Raise ValueError where tokens are to be fed in chunks and the model has no cache to join them."""
    if prefill_chunk is not None and not head.cached:
        raise ValueError(
            f"prefill_chunk={prefill_chunk} needs a cache of earlier tokens, and {head.name} has none; leave it out."
        )


def check_length(base: Any, tokens: int, setting: str) -> None:
    """Raise ValueError where learned positions end before `tokens`; rotary models may be asked to go on.

    Args:
        setting: what the user calls it, to be named in the message.
    """
    limit = trained_length(base)
    rotary = getattr(base.config.get_text_config(), "rope_parameters", None) is not None
    if limit and tokens > limit and not rotary:
        raise ValueError(
            f"{setting}={tokens} is beyond the {limit} positions of {type(base).__name__}; "
            f"use {setting}={limit} or less."
        )


def _check_contexts(text: ScoredText, method: Method) -> None:
    """Raise ValueError where no document is long enough for the context curve."""
    longest = max(len(document.ids) for document in text.documents)
    if method.contexts and longest < max(method.contexts):
        raise ValueError(
            f"no document reaches the {max(method.contexts)} tokens of the longest context, the longest has {longest}; "
            "name shorter contexts, or longer texts."
        )
