"""What one evaluation compares: dense and each pattern, without and with the model's adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..backends import check_backend
from ..hf import SparseSettings, patched, settings, settings_to_json, unpatched
from ..hf.pattern_file import settings_of
from ..patterns import Pattern
from ..selectors import refuse_looking_ahead
from .counting import Counted

_SAMPLE = 64  # values of each weight that go into its fingerprint


@dataclass(frozen=True)
class Variant:
    """One way to run the model: dense (`sparse` None) or with a pattern.

    adapter: "adapter" where the active one is on, "control" where the one of that name is, else None.
    """

    sparse: SparseSettings | None
    adapter: str | None = None

    @property
    def label(self) -> str:
        """The pattern, or "dense"."""
        if self.sparse is None:
            return "dense"
        where = "" if self.sparse.layers is None else f" in layers {','.join(map(str, self.sparse.layers))}"
        return f"{self.sparse.pattern}{where}"

    @property
    def title(self) -> str:
        return self.label if self.adapter is None else f"{self.label} + {self.adapter}"

    @property
    def pattern(self) -> dict[str, Any] | None:
        """How the pattern is saved; None is dense."""
        return settings_to_json(self.sparse) if self.sparse else None


def chosen_variants(
    model: nn.Module,
    patterns: Sequence[str | os.PathLike[str] | Pattern | SparseSettings],
    backend: str,
    without_adapter: bool = False,
    control: str | None = None,
    dense: bool = True,
) -> list[Variant]:
    """Return dense and every pattern, first without and then with the adapter; the dense control comes last.

    Without `dense` there are only the patterns. Settings that leave their backend open get `backend`.

    Raises:
        ValueError: an unknown pattern or backend, a pattern given twice or one that looks ahead, or adapters asked of a
            model that has none.
    """
    check_backend(backend)
    has_adapter = hasattr(model, "disable_adapter")
    if (without_adapter or control) and not has_adapter:
        raise ValueError(
            f"only a PeftModel has adapters to compare, got {type(model).__name__}; load the adapter first."
        )
    sparse = [settings_of(pattern) for pattern in patterns]
    sparse = [
        replace(setting, backend=backend) if setting.backend == "auto" else setting for setting in sparse
    ]
    for setting in sparse:
        refuse_looking_ahead(setting.pattern, "not for a measure that tokens to come must not help")
    if not dense and (control or not sparse):
        raise ValueError(
            "without dense attention there is nothing to measure; name a pattern."
            if not sparse
            else "the dense control is held against dense attention; measure dense too."
        )
    adapters = [None, "adapter"] if without_adapter else ["adapter"] if has_adapter else [None]
    found = [Variant(setting, adapter) for adapter in adapters for setting in ([None] * dense + sparse)]
    found += [Variant(None, "control")] if control else []
    titles = [variant.title for variant in found]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"{twice[0]} is to be measured twice; name every pattern once.")
    return found


@contextmanager
def entered(model: Any, variant: Variant, control: str | None = None) -> Iterator[None]:
    """Run the model as `variant` says inside the block; it is to be in `measured_in_eval_mode` around it."""
    base = base_of(model)
    attention: AbstractContextManager[Any] = nullcontext()
    if (sparse := variant.sparse) is not None:
        attention = patched(base, sparse)
    elif settings(base) is not None:
        attention = unpatched(base)
    with _adapter_state(model, variant.adapter, control), attention:
        yield


def check_variants(model: Any, variants: Sequence[Variant], control: str | None = None) -> None:
    """Raise ValueError where the model cannot run one of them, before any of them is measured."""
    for variant in variants:
        with entered(model, variant, control):
            pass


@contextmanager
def measured_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block; afterwards its modules and torch's random state are as before.

    So is which weights are trained: peft marks those of every adapter that it switches.
    """
    training = {name for name, module in model.named_modules() if module.training}
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    model.eval()
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = name in training
        for name, weight in model.named_parameters():
            weight.requires_grad = trained.get(name, weight.requires_grad)


def check_sparse(variant: Variant, counted: Counted, name: str) -> None:
    """Raise ValueError where a pattern was to be measured and no attention call was sparse."""
    if variant.sparse is not None and not counted.calls:
        raise ValueError(
            f"no attention call of {name} went through {variant.sparse.pattern}: these would be dense figures; "
            "check with hf_sparse.describe(model) which layers are patched."
        )


def base_of(model: Any) -> Any:
    """Return the model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def weights_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over names, shapes and a sample of every weight: it tells a trained model from its base."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):
            continue
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _adapter_state(model: Any, adapter: str | None, control: str | None) -> Iterator[None]:
    """Have no adapter, the active one or the control on inside the block."""
    if adapter is None:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            yield
    elif adapter == "control":
        active = model.active_adapter
        model.set_adapter(control)
        try:
            yield
        finally:
            model.set_adapter(active)
    else:
        yield
