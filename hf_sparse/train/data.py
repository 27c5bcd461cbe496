"""Documents cut into training samples of one length, each from a single document."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..documents import Document

if TYPE_CHECKING:
    import datasets


def make_samples(
    tokenizer: Any, documents: Iterable[Document], length: int, *, seed: int = 0, limit: int | None = None
) -> datasets.Dataset:
    """Return samples of exactly `length` tokens, in the column ``input_ids``.

    Every sample starts with the tokenizer's BOS token (its EOS token where it has no BOS, nothing where it has
    neither), followed by consecutive tokens of one document; documents are never joined. A document's samples do not
    overlap. What is left at its end, and a document too short for one sample, is not used. The documents come in an
    order drawn from `seed`, the samples of one document in reading order: the same arguments give the same samples.

    Args:
        limit: stop reading documents once there are that many samples; None reads all.
    Raises:
        ValueError: no document is long enough for one sample, or `length` leaves no room for a token of text.
    """
    import datasets

    prefix = _prefix(tokenizer)
    room = length - len(prefix)
    if room < 1:
        raise ValueError(f"length={length} leaves no room for text behind the BOS token; give at least 2.")
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    rows: list[np.ndarray] = []
    longest = 0
    for document in documents:
        if limit is not None and len(rows) >= limit:
            break
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        rows += [np.array(prefix + ids[i : i + room], np.int32) for i in range(0, len(ids) - room + 1, room)]
    if not rows:
        raise ValueError(
            f"none of the {len(documents)} documents is long enough for a sample of length={length} tokens "
            f"(the longest has {longest}); choose a smaller length or longer texts."
        )
    return datasets.Dataset.from_dict({"input_ids": np.stack(rows[:limit])})


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack samples to ``input_ids`` [B, length] and ``labels`` [B, length]; the model shifts the labels itself."""
    input_ids = torch.tensor([sample["input_ids"] for sample in samples])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _prefix(tokenizer: Any) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []
