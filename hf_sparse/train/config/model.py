"""Which model is adapted, and to which pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from ...backends import BACKENDS, check_backend
from ...hf import SparseSettings
from ...hf.extension import METHODS
from ...hf.pattern_file import is_pattern_file, settings_of
from ...patterns import Pattern, Union, get_pattern, load_plugin
from .fields import Section, check_filled, option

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments(Section):
    """The base model and its pattern."""

    model: str = option(
        "recipes/tiny_base",
        "hub id or folder of a causal language model, or of an encoder with a head for masked words",
    )
    pattern: str = option(
        "sliding_window",
        "a pattern (hf-sparse patterns lists them), a union: 'strided | longformer', or a JSON file with a stored "
        "pattern such as {per_head: [...]}",
    )
    pattern_options: dict[str, Any] | str | None = option(
        None,
        "options of the pattern as a YAML or JSON mapping, e.g. '{window: 128}', the rest keep their defaults; "
        "for a union one mapping per member, e.g. '{strided: {stride: 8}}'",
    )
    plugin: list[str] | None = option(
        None, "Python files that register patterns of your own; only name files you trust: they are run"
    )
    layers: list[int] | None = option(
        None, "layers that get the pattern, the others stay dense; default: all"
    )
    learned_sinks: bool = option(
        False,
        "give each query head of the sparse layers a logit that joins its softmax and has no value, trained beside "
        "LoRA, so that a head may attend to nothing (as GPT-OSS has them)",
    )
    backend: str = option("auto", f"how attention is computed: {', '.join(BACKENDS)}")
    dense_control: bool = option(
        False,
        "train the same with dense attention instead: what the data alone, without the pattern, is worth",
    )
    extend_positions: str | None = option(
        None,
        "how a model is made to read more tokens than it was trained for: linear, dynamic, ntk or yarn for rotary "
        "positions, copy for learned ones; default: not at all",
    )
    dtype: str = option("float32", "type the base weights are held in: float32, bfloat16 or float16")

    def __post_init__(self) -> None:
        self.pattern_options = _mapping(self.pattern_options)
        if isinstance(self.plugin, str):
            self.plugin = [self.plugin]
        for file in self.plugin or ():  # before the pattern, which may come from one
            load_plugin(file)
        self.chosen_pattern()
        check_backend(self.backend)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.extend_positions is not None and self.extend_positions not in METHODS:
            raise ValueError(
                f"extend_positions must be one of {', '.join(METHODS)}, got {self.extend_positions!r}."
            )
        for name in ("layers", "plugin"):
            check_filled(name, getattr(self, name))
        super().__post_init__()

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
