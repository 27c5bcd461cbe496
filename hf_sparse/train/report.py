"""What a person is told of an adaptation: before it starts, on the way, and at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..hf import describe
from .config import AdaptationArguments


def check_report_to(training: TrainingArguments) -> None:
    """Raise ValueError where figures are to go to what is not installed here; the Trainer raises a RuntimeError."""
    available = get_available_reporting_integrations()
    for name in list(training.report_to or ()):
        if name not in available:
            raise ValueError(
                f"report_to={name} is not installed here or not known to transformers; install it, or use "
                f"{' or '.join([*available, 'none'])}."
            )


def start_report(trainer: Any, arguments: AdaptationArguments) -> str:
    """Return what is about to be trained, on what, and where the pattern runs."""
    trained, total = trainer.model.get_nb_trainable_parameters()
    samples, left_out = trainer.adaptation.samples, trainer.adaptation.left_out
    lines = [
        describe(trainer.model.get_base_model(), seq_len=arguments.length),
        f"trained   {trained:,} of {total:,} parameters ({trained / total:.1%})",
        f"samples   {len(samples):,} of up to {arguments.length:,} tokens, {samples.tokens:,} tokens in all",
    ]
    if left_out:
        first, count = left_out[0], len(left_out)
        what = "document" if count == 1 else "documents, first"
        lines.append(f"left out  {count:,} {what}: {first.name} {first.reason}")
    if trainer.args.resume_from_checkpoint:
        lines.append(f"resuming  {trainer.args.resume_from_checkpoint}")
    return "\n".join(lines)


def end_report(folder: str | os.PathLike[str], plugins: Iterable[str] | None = None) -> str:
    """Return where the finished adapter is, and the commands that go on with it."""
    name = shlex.quote(os.fspath(folder))
    own = "".join(f" --plugin {shlex.quote(file)}" for file in plugins or ())
    return "\n".join(
        [
            f"adapter   {os.fspath(folder)}",
            f"evaluate  hf-sparse eval {name}{own}",
            f"merge     hf-sparse merge {name} --output DIR{own}",
        ]
    )
