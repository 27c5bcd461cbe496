"""Documents read, cut and laid out in rows: the samples of a training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...documents import Document, Skipped, refuse_empty
from .dataset import Samples
from .masking import MaskedWords, Masking
from .packing import check_short, rows_of
from .pieces import Frame, tokens_of

LEAST = 2  # tokens of a document: one of them is predicted from another
_CURE = f"leave such documents out with skip_shorter_than={LEAST}"


def make_samples(
    tokenizer: Any,
    documents: Iterable[Document],
    length: int,
    *,
    short: str = "pack",
    skip_shorter_than: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    masked: MaskedWords | None = None,
    position_start: int = 0,
) -> Samples:
    """Return the documents as rows of at most `length` tokens.

    Each document is cut into pieces of `length` tokens and a shorter rest; every one of its tokens is in one piece.
    A piece begins with the BOS token (EOS where there is no BOS, nothing where there is neither); those of an encoder
    stand between the tokenizer's own special tokens. Pieces never see each other. The documents come in an order drawn
    from `seed`: the same arguments give the same rows. All documents are held in memory until they are read.

    Args:
        short: what becomes of pieces shorter than `length`: "pack" puts several into a row, each with positions of its
            own; "pad" gives each a row of its own, padded; "drop" leaves them out.
        skip_shorter_than: documents of fewer tokens are left out and listed in ``skipped``; None lets none be empty.
        limit: read no further document once the pieces fill that many rows; None reads all.
        masked: how words are masked, for an encoder; None for causal models.
        position_start: the model's first position, see `first_position`.
    Raises:
        ValueError: a document with too little text to learn from, or nothing left to train on; `length` leaves no room
            for a token of text; a tokenizer without the token that padding or masking needs; an unknown `short`.
    """
    check_short(short)
    if short == "pad" and tokenizer.pad_token_id is None:
        raise ValueError(
            "this tokenizer has no pad token, which short=pad needs; use short=pack, which needs none."
        )
    frame = Frame.causal(tokenizer) if masked is None else Frame.encoder(tokenizer)
    if length <= len(frame):
        raise ValueError(
            f"length={length} leaves no room for text beside {len(frame)} special tokens; "
            f"give at least {len(frame) + 1}."
        )
    documents = list(documents)
    if not documents:
        raise ValueError("there are no documents to train on; give at least one.")
    if skip_shorter_than is None:
        refuse_empty(documents, f"give a file with text in it, or {_CURE}")
    random.Random(seed).shuffle(documents)
    pieces: list[np.ndarray] = []
    skipped: list[Skipped] = []
    longest = filled = 0
    for document in documents:
        if limit is not None and filled >= limit * length:
            break
        ids = tokens_of(tokenizer, document.text)
        longest = max(longest, len(ids))
        if skip_shorter_than is not None and len(ids) < skip_shorter_than:
            skipped.append(Skipped(document.name, f"has {len(ids)} of {skip_shorter_than} tokens"))
            continue
        if len(ids) < LEAST:
            raise ValueError(
                f"{document.name} has {len(ids)} tokens, fewer than the {LEAST} there must be to learn from; "
                f"remove it, or {_CURE}."
            )
        own = frame.cut(ids, length)
        pieces += own
        filled += sum(_share(len(piece), length, short) for piece in own)
    rows = list(rows_of(pieces, length, short))
    if not rows:
        raise ValueError(_nothing_left(len(documents), longest, length, short, skip_shorter_than))
    placed = [piece for row in rows for piece in row]
    return Samples(
        ids=np.concatenate(placed),
        piece_starts=_starts([len(piece) for piece in placed]),
        row_starts=_starts([len(row) for row in rows]),
        short=short,
        filler=tokenizer.pad_token_id or 0,  # where there is none, any: packed rows never look at it
        position_start=position_start,
        masking=None if masked is None else Masking.of(tokenizer, masked),
        skipped=tuple(skipped),
        unused=_text_tokens(pieces, frame) - _text_tokens(placed, frame),
    )


def _share(size: int, length: int, short: str) -> int:
    """Return how much of rows of `length` a piece of `size` tokens fills, in tokens."""
    if short == "pack":
        return size
    return length if short == "pad" or size == length else 0


def _text_tokens(pieces: Sequence[np.ndarray], frame: Frame) -> int:
    return sum(len(piece) - len(frame) for piece in pieces)


def _starts(sizes: Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _nothing_left(documents: int, longest: int, length: int, short: str, least: int | None) -> str:
    if least is not None and longest < least:
        return (
            f"skip_shorter_than={least} leaves none of the {documents} documents (the longest has {longest} tokens); "
            "give less, or longer texts."
        )
    assert short == "drop"
    return (
        f"none of the {documents} documents is long enough for a sample of length={length} tokens "
        f"(the longest has {longest}); choose a smaller length, longer texts or short=pack."
    )
