"""The calibration text: windows of one length, each of one document, spread evenly over the documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..documents import Document, named
from ..evaluate.head import ChunkedHead
from ..evaluate.preparation import check_length, trained_length
from ..evaluate.tokens import check_vocabulary, tokenize
from ..evaluate.variants import base_of

LENGTH = 2048  # tokens of a window, where the model was trained for as many
LEAST = 3  # of the text, in a window
MASK_SHARE = 0.15  # of an encoder's tokens are masked, as in its training (Devlin et al. 2018)


@dataclass(frozen=True, eq=False)
class Window:
    """What the model is fed, and the tokens it is to predict.

    ids: int64 [1, N].
    targets: int64 [1, N], for each position the token it is to predict; IGNORED where there is none.
    """

    ids: Tensor
    targets: Tensor


IGNORED = -100


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows that are calibrated on, `length` tokens each, of `documents` documents."""

    entries: tuple[Window, ...]
    length: int
    documents: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every id and target: equal where two calibrations read the same."""
        digest = hashlib.sha256()
        for window in self.entries:
            digest.update(window.ids.numpy().astype("<i4").tobytes())
            digest.update(window.targets.numpy().astype("<i4").tobytes())
        return digest.hexdigest()


def windows_of(
    head: ChunkedHead,
    tokenizer: Any,
    texts: Iterable[Document | str],
    *,
    length: int | None,
    samples: int,
    seed: int,
) -> Windows:
    """Cut documents into windows and return `samples` of them, as many of each document as can be.

    A window begins with the tokenizer's BOS token, where it has one, and a causal model predicts every other token of
    it; of an encoder's window, MASK_SHARE of the tokens are masked. Every window is full: shorter ends are left out.

    Args:
        length: tokens of a window; None is LENGTH, or what the model was trained for where that is less.
    Raises:
        ValueError: a length beyond the model's positions or of too few tokens, fewer than `samples` windows in the
            texts, or a tokenizer that is not the model's.
    """
    base = base_of(head.model)
    if length is None:
        length = min(LENGTH, trained_length(base) or LENGTH)
    if head.masked and tokenizer.mask_token_id is None:
        raise ValueError("this tokenizer has no mask token, which an encoder is calibrated with; set one")
    around = _around(tokenizer, head.masked)
    least = sum(map(len, around)) + LEAST
    if isinstance(length, bool) or not isinstance(length, int) or length < least:
        raise ValueError(f"length must be a whole number >= {least} (tokens of a window), got {length!r}")
    check_length(base, length, "length")
    documents = [
        document.ids for document in tokenize(tokenizer, named(texts), None, False, masked=True).documents
    ]
    # A causal model is not fed the last token of a window, which is only predicted.
    room = length - sum(map(len, around)) + (0 if head.masked else 1)
    cuts = _cuts([len(ids) // room for ids in documents], samples)
    if len(cuts) < samples:
        longest = max(map(len, documents))
        raise ValueError(
            f"the texts hold {len(cuts)} windows of length={length} tokens, and samples={samples} are asked for (the "
            f"longest of {len(documents)} texts has {longest} tokens); give {(samples - len(cuts)) * room} more "
            f"tokens, in texts of {room} or more, or use a shorter length or fewer samples"
        )
    generator = np.random.default_rng(seed)
    entries = []
    for document, cut in cuts:
        own = documents[document][cut * room : (cut + 1) * room].astype(np.int64)
        ids = np.concatenate((around[0], own, around[1])).astype(np.int64)
        entries.append(_masked(ids, around, tokenizer, generator) if head.masked else _causal(ids))
    largest = max(int(window.ids.max()) for window in entries)
    check_vocabulary(max(largest, *(int(window.targets.max()) for window in entries)), base)
    return Windows(tuple(entries), length, len({document for document, _ in cuts}))


def _around(tokenizer: Any, masked: bool) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after the text of a window."""
    before = [tokenizer.cls_token_id] if masked else [tokenizer.bos_token_id]
    after = [tokenizer.sep_token_id] if masked else []
    return [i for i in before if i is not None], [i for i in after if i is not None]


def _cuts(per_document: Sequence[int], samples: int) -> list[tuple[int, int]]:
    """Return `samples` of the (document, window) there are, spread over the documents; all where they are fewer.

    Every document gives its first window before any gives its second; of a round that is not wanted as a whole, the
    documents are taken at equal distances.
    """
    cuts: list[tuple[int, int]] = []
    for number in range(max(per_document, default=0)):
        having = [document for document, count in enumerate(per_document) if count > number]
        wanted = min(samples - len(cuts), len(having))
        cuts += [(having[i * len(having) // wanted], number) for i in range(wanted)]
        if len(cuts) == samples:
            break
    return sorted(cuts)


def _causal(ids: np.ndarray) -> Window:
    whole = torch.from_numpy(ids)[None]
    return Window(whole[:, :-1], whole[:, 1:])


def _masked(
    ids: np.ndarray, around: tuple[list[int], list[int]], tokenizer: Any, generator: np.random.Generator
) -> Window:
    whole = torch.from_numpy(ids)[None]
    first, stop = len(around[0]), len(ids) - len(around[1])
    count = max(1, round(MASK_SHARE * (stop - first)))
    places = torch.from_numpy(first + generator.choice(stop - first, count, replace=False))
    fed, targets = whole.clone(), torch.full_like(whole, IGNORED)
    fed[:, places], targets[:, places] = tokenizer.mask_token_id, whole[:, places]
    return Window(fed, targets)
