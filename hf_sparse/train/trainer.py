"""The Trainer that distils: its loss is ours, everything around the loss is transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..documents import Skipped
from ..evaluate.callback import PerplexityCallback
from .checkpoints import CheckpointTrainer
from .config import AdaptationArguments
from .data import Samples
from .objective import Objective
from .schedule import Narrowing
from .student import StudentAttention


@dataclass(frozen=True)
class Adaptation:
    """What a training belongs to.

    left_out: documents that nothing is trained on, and why.
    scores: scores held-out texts at every evaluation; None where there are none.
    pushes: upload the finished adapter.
    """

    arguments: AdaptationArguments
    samples: Samples
    left_out: tuple[Skipped, ...]
    scores: PerplexityCallback | None
    pushes: bool


class SparseTrainer(CheckpointTrainer):
    """Trains a patched PeftModel on an `Objective`.

    The parts of the loss are logged beside it as ``kl_loss``, ``lm_loss`` and ``attention_loss``, and the window that
    stands beside the pattern as ``window``.

    Args:
        objective: what a step minimises; `student`: the attention it runs; `narrowing`: how wide.
        kwargs: as for `CheckpointTrainer`.
    """

    def __init__(
        self, *, objective: Objective, student: StudentAttention, narrowing: Narrowing, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.student, self.narrowing = student, narrowing
        # The batches of a step are counted together, and the loss is a mean over all their tokens.
        self.model_accepts_loss_kwargs = True
        self.adaptation: Adaptation | None = None
        self._parts: dict[str, Tensor] = {}
        self._logged_at = 0
        self._window: int | None = None  # of the last step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._parts:
            self._logged_at = self.state.global_step
        self._window = self.narrowing.window_at(self.state.global_step, self.state.max_steps)
        with self.student.widened(self._window):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = self.objective(model, inputs, num_items_in_batch)
        counts_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        # tokens were counted over all processes, whose gradients are then averaged
        factor = self.accelerator.num_processes if counts_all else 1
        if model.training:
            for name, part in loss.parts.items():
                self._parts[name] = self._parts.get(name, 0.0) + part * factor
        total = loss.total * factor
        return (total, {"loss": total}) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._logged_at)
            for name, part in self._parts.items():
                mean = self.accelerator.reduce(part.float(), "mean")
                logs[f"{name}_loss"] = float(mean) / steps
            if self.narrowing.windows:
                logs["window"] = float(self._window or 0)  # 0 is the pattern alone
            self._parts = {}
        super().log(logs, *args, **kwargs)
