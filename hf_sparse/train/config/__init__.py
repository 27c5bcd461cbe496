"""What a person chooses when adapting a model to a pattern: one dataclass for that, one for the Trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .evaluation import EvaluationArguments
from .model import ModelArguments
from .objective import ObjectiveArguments
from .schedule import ScheduleArguments
from .text import TextArguments
from .trainables import TrainableArguments
from .training import SparseTrainingArguments

__all__ = ["AdaptationArguments", "SparseTrainingArguments"]


@dataclass
class AdaptationArguments(
    ModelArguments,
    TextArguments,
    TrainableArguments,
    ObjectiveArguments,
    ScheduleArguments,
    EvaluationArguments,
):
    """The model, its pattern, the text, and what is trained.

    Raises:
        ValueError: a setting that cannot work, as soon as the object is made.
    """

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)

    def decides_weights(self) -> dict[str, Any]:
        """Return those of the settings, as plain JSON values, that two runs must share to end with the same weights."""
        measured = {field.name for field in dataclasses.fields(EvaluationArguments)}
        return {name: value for name, value in self.as_json().items() if name not in measured}
