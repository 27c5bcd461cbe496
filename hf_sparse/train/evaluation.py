"""Held-out texts, scored dense and sparse while a model is trained and once more at its end."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import IntervalStrategy

from ..documents import Document, read_documents, refuse_empty, standard_library
from ..evaluate.callback import FIGURES, PerplexityCallback
from .config import AdaptationArguments


def held_out(arguments: AdaptationArguments, training: Any) -> list[Document]:
    """Return the documents that are scored, the longest first to be chosen; none where nothing is to be evaluated.

    Raises:
        ValueError: texts of one's own to train on, but none to evaluate on.
    """
    if training.eval_strategy == IntervalStrategy.NO:
        if arguments.eval_text:
            raise ValueError(
                "eval_text is given but eval_strategy is 'no', so it would never be read; set eval_strategy and "
                "eval_steps."
            )
        return []
    if arguments.eval_text:
        documents = read_documents(arguments.eval_text)
        refuse_empty(documents)
    elif arguments.text or getattr(arguments, "dataset", None):
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value!r} needs texts that were not trained on; name them with "
            "eval_text."
        )
    else:
        documents = standard_library("validation")
    longest = sorted(documents, key=lambda document: len(document.text), reverse=True)
    return longest[: arguments.eval_documents]


def check_best(training: Any, *, scored: bool) -> None:
    """Raise ValueError where the best adapter is to be kept by a figure that no evaluation gives.

    Args:
        scored: evaluations score held-out texts, dense and sparse.
    """
    if training.load_best_model_at_end and training.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "load_best_model_at_end=True needs evaluations to choose by; set eval_strategy and eval_steps, or leave it "
            "out."
        )
    if training.metric_for_best_model is None or training.eval_strategy == IntervalStrategy.NO:
        return
    known = ("eval_loss", *(FIGURES if scored else ()))
    metric = f"eval_{str(training.metric_for_best_model).removeprefix('eval_')}"
    if metric not in known:
        raise ValueError(
            f"metric_for_best_model={training.metric_for_best_model} is not among what is measured; give one of "
            f"{', '.join(known)}."
        )


def score_while_training(
    trainer: Any, documents: list[Document], arguments: AdaptationArguments
) -> PerplexityCallback | None:
    """Let every evaluation of the trainer score the documents dense and sparse, and return what does.

    Where the weights are spread over processes (FSDP, DeepSpeed) the trainer's own ``eval_loss``, of the sparse model
    on the same documents, is all there is.
    """
    if not documents or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    length = arguments.eval_length or arguments.length
    scores = PerplexityCallback(trainer, documents, max_length=length)
    # first, so that callbacks which read the figures find them
    trainer.callback_handler.callbacks.insert(0, scores)
    return scores
