"""The model type "hf-sparse" of lm-evaluation-harness: transformers models under a pattern, with proof that it ran.

Importing this module registers it: ``lm_eval.simple_evaluate("hf-sparse", "pretrained=X,pattern=longformer", ...)``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..backends import check_backend
from ..backends.call import Recorder, recording
from ..hf import SparseSettings, attention_name, patch_model, read_sidecar, settings, settings_to_json
from ..hf.added_weights import read_added_weights
from ..hf.loading import base_of, patch_as_saved, put_adapter, read_adapter_config, reason, stored_settings
from ..hf.pattern_file import is_pattern_file, settings_of
from ..hf.sources import SIDECAR, is_adapter
from ..hf.stored_settings import PREFIX, settings_from_json
from ..patterns import Pattern, get_pattern, pattern_class
from ..patterns.written import pattern_from_json
from .counting import Counted

_loading: list[list[SparseHFLM]] = []  # the lists of the open `loaded_models`


@contextmanager
def loaded_models() -> Iterator[list[SparseHFLM]]:
    """Collect the models of this type that are made inside the block: the command of lm_eval hands none back."""
    models: list[SparseHFLM] = []
    _loading.append(models)
    try:
        yield models
    finally:
        _loading.remove(models)


@register_model("hf-sparse")
class SparseHFLM(HFLM):
    """lm_eval's ``hf`` with attention under a pattern; what its attention calls computed is counted.

    The pattern is, of these, the first that there is: the argument `pattern`, the one saved with the adapter ``peft``,
    the one saved in the model's config, and ``attn_implementation="sparse_<name>"``. A dense model is refused; the
    pattern "full" is dense attention.

    Args:
        pretrained: hub id or folder; a model that is patched already is taken as it is.
        pattern: a registered name, whose options are arguments too (``pattern=longformer,window=512``), the path of a
            pattern file, or what one holds. Options that adapt to the length are resolved for
            `max_length`.
        sparse_backend: what computes the attention, instead of the backend in the settings.
        kwargs: of ``hf``.
    Raises:
        ValueError: no pattern at all, one that does not fit, or an adapter whose pattern is unknown.
    """

    _model: Any

    def __init__(
        self,
        pretrained: Any,
        *,
        pattern: str | dict[str, Any] | Pattern | None = None,
        sparse_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._sparse_backend = None if sparse_backend is None else check_backend(sparse_backend)
        self._given = None if pattern is None else _given(pattern, kwargs)
        self._max_length = kwargs.get("max_length")  # set by lm_eval too late for patching
        self.counted = Counted()
        if not isinstance(pretrained, str) and (pattern or sparse_backend or kwargs.get("peft")):
            raise ValueError(
                "a model that is loaded already keeps its attention, got pattern, sparse_backend or peft besides; call "
                "hf_sparse.patch_model, or put the adapter on it, before"
            )
        if isinstance(pretrained, str) and is_adapter(pretrained):
            base = base_of(pretrained, read_adapter_config(pretrained))
            raise ValueError(
                f"pretrained={pretrained} is an adapter; write pretrained={base},peft={pretrained}"
            )
        super().__init__(pretrained, **kwargs)
        found = settings(self.model)
        if found is None:
            raise _nothing_sparse(type(self.model).__name__)
        self.settings = found
        for models in _loading:
            models.append(self)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes of a model into its results, with what its attention computed.

        Raises:
            ValueError: no attention call went through the pattern: these would be dense figures.
        """
        if not self.counted.calls:
            raise ValueError(
                f"no attention call of {type(self.model).__name__} went through {self.settings.pattern}: these would "
                "be dense figures, or answers kept by an earlier run; run without use_cache, and check with "
                "hf_sparse.describe(model) which layers are patched"
            )
        return {**super().get_model_info(), "sparse_attention": self.proof()}

    def proof(self) -> dict[str, Any]:
        """Return the settings the model was loaded with and what was counted, as plain JSON values."""
        return {
            "settings": settings_to_json(self.settings),
            "density": self.counted.density,
            **self.counted.as_row(),
        }

    def barrier(self) -> None:
        """Wait for every process; lm_eval does after each kind of request. The first one then has the counts of all."""
        super().barrier()
        rows = self.gather_object(self.counted.as_row())
        self.counted = Counted.of_rows(rows or ())

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs: Any) -> None:
        base = stored_settings(self.config, pretrained)
        saved, where = (None, "") if self._given else _saved(self.config, pretrained, peft)
        implementation = str(kwargs.get("attn_implementation"))
        if implementation.startswith(PREFIX):
            _check_same(implementation, self._given or saved, where or "the argument pattern")
        elif not self._given and not saved:
            raise _nothing_sparse(pretrained)
        try:
            super()._create_model(pretrained=pretrained, **kwargs)
        except TypeError as error:  # of an argument that neither lm_eval nor transformers knows
            raise ValueError(
                f"{pretrained} cannot be loaded with these arguments ({reason(error)}); check the names in model_args"
            ) from error
        self._patch(saved, where)
        if base is not None:
            read_added_weights(self._model, pretrained, required=bool(saved) and not peft)
        if peft:
            self._model = put_adapter(self._model, peft)

    def _patch(self, saved: SparseSettings | None, where: str) -> None:
        chosen = self._given or saved or settings(self._model)
        assert chosen is not None  # attn_implementation says so where nothing else does
        if self._sparse_backend:
            chosen = dataclasses.replace(chosen, backend=self._sparse_backend)
        if saved:
            patch_as_saved(self._model, chosen, where)
        else:
            patch_model(self._model, chosen, seq_len=self.max_length)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        counted = self.counted
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self.counted = (
                counted  # batches of equal tokens, tried out for their size, are no part of the figures
            )

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with recording() as recorder:
            logits = super()._model_call(*args, **kwargs)
        self._count(recorder)
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with recording() as recorder:
            tokens = super()._model_generate(*args, **kwargs)
        self._count(recorder)
        return tokens

    def _count(self, recorder: Recorder) -> None:
        rows = self.counted.as_row(), Counted.of(recorder.calls).as_row()
        self.counted = Counted.of_rows(rows)


def _given(pattern: str | dict[str, Any] | Pattern, kwargs: dict[str, Any]) -> SparseSettings:
    """Return the settings that `pattern` stands for; options of a named one are taken out of `kwargs`."""
    if isinstance(pattern, dict):
        return (
            settings_from_json(pattern)
            if "version" in pattern
            else SparseSettings(pattern_from_json(pattern))
        )
    if isinstance(pattern, Pattern) or is_pattern_file(pattern):
        return settings_of(pattern)
    names = [field.name for field in dataclasses.fields(pattern_class(pattern))]
    return SparseSettings(
        get_pattern(pattern, **{name: kwargs.pop(name) for name in names if name in kwargs})
    )


def _saved(config: Any, pretrained: str, peft: str | None) -> tuple[SparseSettings | None, str]:
    """Return the settings saved with the adapter, or else in the model's config, and where they were found."""
    if peft is None:
        where = f"the config of {pretrained}"
        return stored_settings(config, pretrained), where
    if not os.path.exists(os.path.join(peft, SIDECAR)):
        raise ValueError(
            f"adapter {peft} has no {SIDECAR}; name the pattern to run it with, as in pattern=strided"
        )
    return read_sidecar(peft), os.path.join(peft, SIDECAR)


def _check_same(implementation: str, other: SparseSettings | None, where: str) -> None:
    """Raise ValueError where ``attn_implementation`` asks for another pattern than the one that is to run."""
    if other is not None and attention_name(other.pattern) != implementation:
        raise ValueError(
            f"attn_implementation={implementation} is not {other.pattern} of {where}; leave attn_implementation out"
        )


def _nothing_sparse(name: str) -> ValueError:
    return ValueError(
        f"nothing sparse was asked for: {name} has no pattern saved with it; name one with --pattern or in model_args "
        "(pattern=longformer), or pattern=full for dense attention"
    )
