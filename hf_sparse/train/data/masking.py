"""Masked words: what an encoder is fed and predicts (Devlin et al. 2018, arXiv:1810.04805), new in each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

IGNORED = -100  # label of a token that is not predicted
_MASKED, _SWAPPED = 0.8, 0.1  # shares of the chosen tokens; the rest stay as they are


@dataclass(frozen=True)
class MaskedWords:
    """Train an encoder to predict masked words.

    share: of a row's tokens, special ones not counted, that are chosen to be predicted; at least one of them.
    seed: with the epoch and the number of the row, decides which.
    renewed: other words in every epoch; the same ones always, where samples are evaluated.

    Raises:
        ValueError: a share outside (0, 1].
    """

    share: float = 0.15
    seed: int = 0
    renewed: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share!r}.")


@dataclass(frozen=True, eq=False)
class Masking:
    """Masked words of one tokenizer.

    special: int64 ids that are never chosen.
    words: int64 ids that may stand in for another.
    epoch: int64 scalar in memory that worker processes share, since those that outlive an epoch keep their dataset.
    """

    wanted: MaskedWords
    mask_token: int
    special: np.ndarray
    words: np.ndarray
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    @staticmethod
    def of(tokenizer: Any, wanted: MaskedWords) -> Masking:
        """Raise ValueError where the tokenizer has no mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "this tokenizer has no mask token, which an encoder is trained with; give the tokenizer of a model "
                "that was pretrained with masked words."
            )
        special = np.array(sorted(tokenizer.all_special_ids), np.int64)
        words = np.setdiff1d(np.array(sorted(tokenizer.get_vocab().values()), np.int64), special)
        return Masking(wanted, tokenizer.mask_token_id, special, words)

    @property
    def largest(self) -> int:
        """The largest token that it may feed."""
        return int(max(self.mask_token, self.words.max()))

    def mask(self, ids: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the model is fed in place of `ids` [N], and the labels [N]; both depend on the epoch.

        Of the chosen tokens 80 % become the mask token, 10 % a random word, and 10 % stay.
        """
        fed, labels = ids.copy(), np.full_like(ids, IGNORED)
        eligible = np.flatnonzero(~np.isin(ids, self.special))
        if not len(eligible):
            return fed, labels
        generator = np.random.default_rng([self.wanted.seed, int(self.epoch), row])
        chosen = generator.choice(eligible, max(1, round(self.wanted.share * len(eligible))), replace=False)
        fate, words = generator.random(len(chosen)), generator.choice(self.words, len(chosen))
        labels[chosen] = ids[chosen]
        swapped = np.where(fate < _MASKED + _SWAPPED, words, ids[chosen])
        fed[chosen] = np.where(fate < _MASKED, self.mask_token, swapped)
        return fed, labels


class MaskEpochs(TrainerCallback):
    """Tells the training dataset which epoch begins.

    The dataloader does so by itself only in some cases: not with several processes, and not in the epoch in which an
    interrupted run goes on.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))
