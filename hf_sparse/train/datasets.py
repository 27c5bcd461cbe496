"""The rows that an adaptation trains on, and those it is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers import TrainingArguments

from ..documents import Document
from ..evaluate.head import is_masked
from ..evaluate.tokens import check_vocabulary
from ..hf.active import unwrap
from .config import AdaptationArguments
from .course import samples_wanted
from .data import MaskedWords, Samples, check_apart, check_reach, first_position, make_samples


def make_datasets(
    arguments: AdaptationArguments,
    training: TrainingArguments,
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    unseen: Sequence[Document],
) -> tuple[Samples, Subset[Any] | None]:
    """Return the rows of `documents`, and as many rows of `unseen` as it has documents, from all over them.

    Raises:
        ValueError: texts that a row cannot be made of, tokens that the patched `model` does not know, packed rows
            that it cannot keep apart, or pieces of text so short that its pattern leaves nothing out.
    """
    default = type(arguments).mask_share
    if not is_masked(model) and arguments.mask_share != default:
        raise ValueError(
            f"mask_share={arguments.mask_share} is for encoders, and {type(unwrap(model)).__name__} predicts every "
            "next token; leave it out."
        )
    masked = MaskedWords(arguments.mask_share, training.seed) if is_masked(model) else None
    layout: dict[str, Any] = {
        "short": arguments.short,
        "skip_shorter_than": arguments.skip_shorter_than,
        "seed": training.seed,
        "position_start": first_position(model),
    }
    limit = samples_wanted(training)
    samples = make_samples(tokenizer, documents, arguments.length, limit=limit, masked=masked, **layout)
    check_vocabulary(samples.largest, model)
    check_apart(samples, model)
    if not arguments.dense_control:
        check_reach(samples, model)
    if not unseen:
        return samples, None
    same = None if masked is None else replace(masked, renewed=False)
    rows = make_samples(tokenizer, unseen, arguments.length, masked=same, **layout)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), len(unseen)), dtype=int)
    return samples, Subset(rows, chosen.tolist())
