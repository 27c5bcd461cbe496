"""What a score is, and the catalogue of them by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..trial import Trial

S = TypeVar("S", bound="type[Score]")
SCORES: dict[str, type[Score]] = {}


@dataclass(frozen=True)
class Score:
    """Estimates what the model gains where one unit changes its candidate; fields are the options.

    sees_choice: the estimate depends on what the other units run, so it is worth making again along the way.
    """

    name: ClassVar[str] = ""
    sees_choice: ClassVar[bool] = True

    def __str__(self) -> str:
        """Return the name, with the options that are not at their default."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        options = [f"{field.name}={value!r}" for field, value in values if value != field.default]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def passes(self, shape: tuple[int, int, int]) -> float:
        """Return the forward passes per window of one estimate for [L, U, C]; a backward pass counts as 2."""
        raise NotImplementedError(f"{type(self).__name__} must define passes(shape)")

    def gains(self, trial: Trial, choice: np.ndarray) -> np.ndarray:
        """Return float [L, U, C]: what changing one unit of `choice` [L, U] to each candidate gains, larger is better.

        0 for the candidate that a unit has. Scores that know the loss give nats; the others are comparable among
        themselves alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must define gains(trial, choice)")


def register_score(name: str) -> Callable[[S], S]:
    """Make a score known as ``calibrate(..., score=name)``."""

    def decorate(cls: S) -> S:
        if name in SCORES:
            raise ValueError(f"score {name!r} is already {SCORES[name].__qualname__}; pick another name")
        cls.name = name
        SCORES[name] = cls
        return cls

    return decorate


def score_class(name: str) -> type[Score]:
    """Return the score of that name; raise ValueError with the nearest name where there is none."""
    if name not in SCORES:
        near = difflib.get_close_matches(str(name), SCORES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown score {name!r}.{hint} Available: {', '.join(sorted(SCORES))}.")
    return SCORES[name]


def gained(losses: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Return the gains [L, U, C] over `choice` [L, U] of candidates that lose `losses` [L, U, C]."""
    return np.take_along_axis(losses, choice[..., None], -1) - losses


def share_of(apart: Tensor, whole: Tensor) -> Tensor:
    """Return ``apart / whole``, both >= 0; 0 where there is nothing of the whole, as nothing can be lost of it."""
    return torch.where(whole > 0, apart / whole, 0.0)
