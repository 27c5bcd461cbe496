"""The settings of an adaptation on the command line, read off the fields of `AdaptationArguments` and their help."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from ..train.config import AdaptationArguments
from ..train.config.evaluation import EvaluationArguments
from ..train.config.model import ModelArguments
from ..train.config.objective import ObjectiveArguments
from ..train.config.schedule import ScheduleArguments
from ..train.config.text import TextArguments
from ..train.config.trainables import TrainableArguments
from .options import dashed

_GROUPS = {
    "texts": TextArguments,
    "what is trained": TrainableArguments,
    "what is minimised": ObjectiveArguments,
    "from wide to narrow": ScheduleArguments,
    "what is measured on the way": EvaluationArguments,
    "the model": ModelArguments,
}
_OWN = {"model", "pattern", "pattern_options", "plugin"}  # spelled as in every other command
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")  # as transformers calls it, by version
    if name in TrainingArguments.__dataclass_fields__
)
# of TrainingArguments: the option, the setting, its type, its value where it is not given, and what it is
_TRAINING: tuple[tuple[str, str, Any, Any, str], ...] = (
    ("steps", "max_steps", int, 100, "optimizer steps"),
    ("batch-size", "per_device_train_batch_size", int, 2, "samples in a forward pass, of each process"),
    ("accumulate", "gradient_accumulation_steps", int, 1, "forward passes whose gradients make one step"),
    ("lr", "learning_rate", float, 1e-3, "highest learning rate; for a large model start at 1e-4"),
    (
        "lr-schedule",
        "lr_scheduler_type",
        str,
        "cosine",
        "how it goes on: cosine, linear, constant_with_warmup, ...",
    ),
    ("warmup", "warmup_steps", int, 5, "steps until it is reached, by default fewer where --steps is less"),
    ("weight-decay", "weight_decay", float, 0.0, "of the optimizer"),
    ("optimizer", "optim", str, TrainingArguments.optim, "as transformers calls it"),
    ("seed", "seed", int, 0, "of the first LoRA matrices, of dropout, masks and the order of the samples"),
    ("bf16", "bf16", bool, True, "compute in bfloat16 (autocast); the weights keep their type"),
    (
        "gradient-checkpointing",
        _CHECKPOINTING,
        bool,
        False,
        "compute layers again for gradients: less memory",
    ),
    ("save-every", "save_steps", int, 25, "steps from one checkpoint to the next"),
    ("keep", "save_total_limit", int, 2, "checkpoints that are kept"),
    ("log-every", "logging_steps", int, 5, "steps from one line of figures to the next"),
    ("report-to", "report_to", str, "none", "where figures go besides: tensorboard, wandb, trackio, ..."),
    ("push-to-hub", "push_to_hub", bool, False, "upload the finished adapter, and nothing else, to the hub"),
    ("hub-model-id", "hub_model_id", str, None, "repository it goes to (default: the last name of DIR)"),
)


def add_adaptation_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser an option for every setting; one that is not given is None."""
    group = parser.add_argument_group("how it is trained")
    for option, setting, kind, default, text in _TRAINING:
        said = "" if default is None else f" (default {_default(default)})"
        _add(group, option, setting, kind, text + said)
    for title, section in _GROUPS.items():
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if field.name not in _OWN:
                said = "" if field.default is None else f" (default {_default(field.default)})"
                text = field.metadata["help"] + said
                _add(group, dashed(field.name), field.name, hints[field.name], text)


def adaptation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return those settings of `AdaptationArguments` that were given."""
    names = {field.name for field in dataclasses.fields(AdaptationArguments)} - _OWN
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of TrainingArguments, given or not."""
    settings = {}
    for _, setting, _, default, _ in _TRAINING:
        given = getattr(args, setting)
        settings[setting] = default if given is None else given
    if args.warmup_steps is None:  # the rate must be above 0 in some step
        settings["warmup_steps"] = min(settings["warmup_steps"], settings["max_steps"] - 1)
    return settings


def _add(group: Any, option: str, setting: str, hint: Any, text: str) -> None:
    text = text.replace("%", "%%")
    kind, several = _kind(hint)
    if kind is bool:
        group.add_argument(
            f"--{option}", dest=setting, action=argparse.BooleanOptionalAction, default=None, help=text
        )
        return
    more: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {}
    if kind is not str:
        more["type"] = kind
    shown = "X" if kind is float else "N" if kind is int else "VALUE"
    group.add_argument(f"--{option}", dest=setting, metavar=shown, help=text, **more)


def _kind(hint: Any) -> tuple[type, bool]:
    """Return the type of one value of a setting, and whether there may be several."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (choice for choice in typing.get_args(hint) if choice is not types.NoneType)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _default(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


_FLAGS = {
    **{setting: f"--{option}" for option, setting, *_ in _TRAINING},
    **{name: f"--{dashed(name)}" for name in AdaptationArguments.__dataclass_fields__},
    "model": "MODEL",
    "pattern_options": "the options of the pattern",
    "gradient_checkpointing": "--gradient-checkpointing",
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "eval_strategy": "--eval-every",
    "eval_steps": "--eval-every",
}
# A plain word is a setting only where a value or a verb follows: sentences have words of their own, and patterns, as
# they are written out, options of their own: rerope(window=16, pattern=full()).
_SETTING = re.compile(
    r"(?<![\w./-])(?:--)?(?:("
    + "|".join(sorted((n for n in _FLAGS if "_" in n), key=len, reverse=True))
    + r")\b(=)?"
    r"|(?<!\()(?<!, )("
    + "|".join(sorted((n for n in _FLAGS if "_" not in n), key=len, reverse=True))
    + r")(?:(=)(?=\S)|(?= must ))"
    r")(?!\.\w)"
)


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Let an error raised inside the block name the options of the command line, not the settings they became."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, _as_options(error.strerror), error.filename) from None


def _as_options(message: str) -> str:
    return _SETTING.sub(_as_option, message.replace("resume_from_checkpoint=auto", "--resume"))


def _as_option(found: re.Match[str]) -> str:
    return _FLAGS[found[1] or found[3]] + (" " if found[2] or found[4] else "")
