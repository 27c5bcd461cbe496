"""Perplexity while a model is trained: dense and as it is patched, among the Trainer's own figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..documents import Document, named
from ..hf import settings
from .head import ChunkedHead
from .method import Method
from .perplexity import perplexity
from .preparation import prepare
from .results import Result
from .variants import chosen_variants

if TYPE_CHECKING:
    from transformers import Trainer


LOWER_IS_BETTER = ("perplexity", "nats_per_token", "nats_above_dense")  # how the names of such figures end
FIGURES = (  # of a patched model, without those of `without_adapter`
    *("eval_dense_perplexity", "eval_dense_nats_per_token"),
    *("eval_sparse_perplexity", "eval_sparse_nats_per_token"),
    *("eval_sparse_nats_above_dense", "eval_sparse_density"),
)


class PerplexityCallback(TrainerCallback):
    """Scores documents at every evaluation of the Trainer, and every so many steps.

    The figures are ``eval_dense_perplexity`` and ``eval_sparse_perplexity``, the same with ``nats_per_token``,
    ``eval_sparse_nats_above_dense`` and ``eval_sparse_density``, counted while it ran; with `without_adapter` the same
    for the model without its adapter as ``eval_base_dense_...`` and ``eval_base_sparse_...``. An unpatched model has
    the dense ones only. They are logged as the Trainer logs, into ``log_history`` and to all it reports to, and those
    of an evaluation may be the ``metric_for_best_model``, with ``greater_is_better=False``; callbacks that read that,
    such as EarlyStoppingCallback, are added after this one. Measured is the model in the precision it is trained in; it
    and the random numbers of the training are as they were afterwards. Processes share the documents.

    Used as ``trainer.add_callback(PerplexityCallback(trainer, documents, max_length=4096))``.

    Args:
        documents: plain strings get their place as a name.
        max_length: tokens of each document; `method`: further settings of `Method`, such as ``mode="rolling"``.
        every: steps from one measurement to the next besides the Trainer's evaluations; None measures at these only.
        without_adapter: measure a PeftModel without its adapter too.
    Raises:
        ValueError: no documents, or none long enough, settings that cannot work, no tokenizer (the Trainer's
            `processing_class`), weights that are spread over several processes, or, when the training begins, nothing
            that would be measured in it.
    """

    def __init__(
        self,
        trainer: Trainer,
        documents: Iterable[Document | str],
        *,
        max_length: int,
        every: int | None = None,
        without_adapter: bool = False,
        **method: Any,
    ) -> None:
        self.trainer = trainer
        self.documents = tuple(named(documents))
        self.every, self.without_adapter = every, without_adapter
        self.method = {"max_length": max_length, **method}
        self._figures: dict[str, float] = {}  # of the weights between two steps
        self._check()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every is None and args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "no perplexity would be measured: the Trainer never evaluates (eval_strategy='no') and every=None; "
                "set one of the two."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._figures = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._measure()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = self._measure()
        if metrics is not None:
            metrics.update(figures)  # the dict the best model is chosen by

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._figures = {}  # from here on the weights may change at any time

    def _measure(self) -> dict[str, float]:
        """Return the figures of the weights as they are, measured and logged once per step."""
        if self._figures and self.trainer.is_in_train:
            return self._figures
        self._figures = self.figures(without_adapter=self.without_adapter)
        control = self.trainer.control
        should_log = (
            control.should_log
        )  # the loss of this step may still wait, and logging says that all is logged
        self.trainer.log(dict(self._figures))
        control.should_log = should_log
        return self._figures

    def figures(self, *, without_adapter: bool) -> dict[str, float]:
        """Return what is logged of the weights as they are, measured now; nothing is logged."""
        return _figures(self._perplexity(without_adapter))

    def _perplexity(self, without_adapter: bool) -> Result:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        own = settings(model)
        return perplexity(
            model,
            self.trainer.processing_class,
            self.documents,
            patterns=[] if own is None else [own],
            seed=self.trainer.args.seed,
            without_adapter=without_adapter,
            prompt=False,
            **self.method,
        )

    def _check(self) -> None:
        """Raise ValueError for what would otherwise end the training at its first evaluation."""
        trainer = self.trainer
        assert trainer.model is not None
        if self.every is not None and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise ValueError(f"every must be a whole number of steps >= 1, got {self.every!r}")
        if trainer.processing_class is None:
            raise ValueError(
                "the Trainer has no tokenizer; give it one: Trainer(processing_class=tokenizer)."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed spread the weights over processes that would each score other documents; "
                "train without them, or evaluate the saved model."
            )
        chosen_variants(trainer.model, [], "auto", self.without_adapter)
        method = Method(**self.method)
        prepare(
            ChunkedHead(trainer.model, method.head_chunk), trainer.processing_class, self.documents, method
        )


def _figures(result: Result) -> dict[str, float]:
    """Return what is logged of each run."""
    found: dict[str, float] = {}
    adapters = {run.adapter for run in result.runs}
    for run in result.runs:
        base = "base_" if run.adapter is None and len(adapters) > 1 else ""
        name = f"eval_{base}{'sparse' if run.sparse else 'dense'}"
        found[f"{name}_perplexity"] = result.perplexity(run)
        found[f"{name}_nats_per_token"] = result.nats_per_token(run)
        if run.sparse:
            dense = result.nats_per_token(result.dense_of(run))
            found[f"{name}_nats_above_dense"] = result.nats_per_token(run) - dense
            found[f"{name}_density"] = run.density
    return found
