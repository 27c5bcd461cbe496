"""Which held-out texts are scored, dense and sparse, while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Section, check_filled, check_least, option


@dataclass
class EvaluationArguments(Section):
    """The held-out texts; when they are scored is up to ``eval_strategy`` and ``eval_steps`` of TrainingArguments."""

    eval_text: list[str] | None = option(
        None,
        "held-out UTF-8 text files; default: the validation split of the Python standard library where text is its "
        "train split",
    )
    eval_documents: int = option(8, "held-out documents scored, the longest")
    eval_length: int | None = option(None, "tokens of each that are scored; default: length")

    def __post_init__(self) -> None:
        check_filled("eval_text", self.eval_text)
        check_least("eval_documents", self.eval_documents, 1)
        if self.eval_length is not None:
            check_least("eval_length", self.eval_length, 2)
        super().__post_init__()
