"""What a person chooses when adapting a model to a pattern: one dataclass for that, one for the Trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from ..backends import BACKENDS, check_backend
from ..hf import SparseSettings
from ..hf.pattern_file import is_pattern_file, settings_of
from ..patterns import Pattern, Union, get_pattern, load_plugin


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class AdaptationArguments:
    """The model, its pattern, the text, and what is trained.

    Raises:
        ValueError: a setting that cannot work, as soon as the object is made.
    """

    model: str = _option("recipes/tiny_base", "hub id or folder of a causal language model")
    pattern: str = _option(
        "sliding_window",
        "a pattern (hf-sparse patterns lists them), a union: 'strided | longformer', or a JSON file with a stored "
        "pattern such as {per_head: [...]}",
    )
    pattern_options: dict[str, Any] | str | None = _option(
        None,
        "options of the pattern as a YAML or JSON mapping, e.g. '{window: 128}', the rest keep their defaults; "
        "for a union one mapping per member, e.g. '{strided: {stride: 8}}'",
    )
    plugin: list[str] | None = _option(
        None, "Python files that register patterns of your own; only name files you trust: they are run"
    )
    layers: list[int] | None = _option(
        None, "layers that get the pattern, the others stay dense; default: all"
    )
    backend: str = _option("auto", f"how attention is computed: {', '.join(BACKENDS)}")
    dense_control: bool = _option(
        False,
        "train the same with dense attention instead: what the data alone, without the pattern, is worth",
    )
    text: list[str] | None = _option(
        None, "UTF-8 text files, one document each; default: the train split of the Python standard library"
    )
    length: int = _option(2048, "tokens of a training sample, BOS included, all from one document")
    lora_r: int = _option(16, "rank of the LoRA matrices")
    lora_alpha: int = _option(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "share of the LoRA inputs dropped in training")
    lora_targets: list[str] | None = _option(
        None, "names of the linear layers LoRA is added to, or all-linear; default: those of the attention"
    )
    train_norms: bool = _option(True, "train the normalisation layers as well, in full")
    dtype: str = _option("float32", "type the base weights are held in: float32, bfloat16 or float16")

    def __post_init__(self) -> None:
        self.pattern_options = _mapping(self.pattern_options)
        if isinstance(self.plugin, str):
            self.plugin = [self.plugin]
        for file in self.plugin or ():  # before the pattern, which may come from one
            load_plugin(file)
        self.chosen_pattern()
        check_backend(self.backend)
        _check_least("length", self.length, 2)
        _check_least("lora_r", self.lora_r, 1)
        _check_least("lora_alpha", self.lora_alpha, 1)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}; 0 is a good start.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")
        for name in ("text", "lora_targets", "layers", "plugin"):
            if getattr(self, name) == []:
                raise ValueError(
                    f"{name} is an empty list; name at least one, or leave it out for the default."
                )

    def chosen_pattern(self) -> Pattern | SparseSettings:
        """Return what is trained: `full` for the dense control, else the named pattern or what its file holds."""
        options = _mapping(self.pattern_options)
        names = [name.strip() for name in str(self.pattern).split("|")]
        pattern: Pattern | SparseSettings
        if is_pattern_file(str(self.pattern)):
            if options:
                raise ValueError(
                    f"pattern_options go with a named pattern, got {options!r}; write them into {self.pattern}."
                )
            pattern = settings_of(str(self.pattern))
        elif len(names) == 1:
            pattern = get_pattern(names[0], **options)
        else:
            if stray := [
                key for key, value in options.items() if key not in names or not isinstance(value, dict)
            ]:
                raise ValueError(
                    f"the pattern_options of {self.pattern!r} need one mapping per member, such as "
                    f"{{{names[0]}: {{...}}}}; got {stray[0]!r}."
                )
            pattern = Union.of(*(get_pattern(name, **options.get(name, {})) for name in names))
        return get_pattern("full") if self.dense_control else pattern

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments with every column kept: a patched model may read columns the Trainer would drop."""

    remove_unused_columns: bool = _option(False, "drop the columns that the model's forward does not name")

    def __post_init__(self) -> None:
        _check_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        _check_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {self.seed}.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, transformers refuses bf16 on a machine that has only its CPU
        super().__post_init__()


def _mapping(options: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(options, str):
        try:
            options = yaml.safe_load(options)
        except yaml.YAMLError:
            raise ValueError(
                f"pattern_options must be a YAML or JSON mapping such as '{{window: 128}}', got {options!r}."
            ) from None
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(f"pattern_options must be a mapping such as {{window: 128}}, got {options!r}.")
    return options


def _check_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")
