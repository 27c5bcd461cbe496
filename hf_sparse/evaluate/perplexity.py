"""Perplexity of a causal language model on long documents, dense and sparse on the same tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..backends import check_backend, recording
from ..documents import Document
from ..hf import SparseSettings, patch_model, patched, settings, settings_to_json, unpatch_model
from ..patterns import Pattern, get_pattern
from .bootstrap import BLOCK_TOKENS
from .head import ChunkedHead
from .machine import PeakMemory, describe_machine
from .results import Result, Run
from .tokens import ScoredDocument, ScoredText, check_vocabulary, tokenize

PROBE_TOKENS = 16
ROWS = 128  # positions whose logits are copied to float32 at a time


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[Document | str],
    *,
    max_length: int,
    patterns: Sequence[str | Pattern | SparseSettings] = (),
    backend: str = "auto",
    head_chunk: int = 1024,
    bos: bool = True,
    seed: int = 0,
    without_adapter: bool = False,
    control: str | None = None,
    progress: bool = False,
) -> Result:
    """Score every document with dense attention and with each pattern, one full pass each, on the same tokens.

    Documents are never joined: each is one pass of at most `max_length` tokens, prefix included; `tokens.tokenize` says
    what the prefix is and how bytes are counted. Documents with fewer than 2 tokens to score are skipped and named in
    the result. Logits are held for `head_chunk` positions at a time; the cross-entropy is computed in float32.
    A model that is patched is measured dense too, and is as it was afterwards, training mode included.

    Args:
        model: a causal language model or a PeftModel of one.
        documents: plain strings get their place as a name.
        patterns: what to compare with dense; settings of a patched model also carry its layers and backend.
        backend: for patterns and for settings that leave the choice open.
        seed: for patterns that draw, and for the intervals of the result.
        without_adapter: measure every run of a PeftModel first without its adapter, then with it.
        control: name of a second adapter of the PeftModel, trained the same way on the dense model: measured dense, it
            is what `report.adapter_gaps` holds the first against.
        progress: show a bar on stderr when that is a terminal.
    Raises:
        ValueError: an encoder, a model whose head cannot be run in chunks, an unknown pattern, texts with nothing to
            score, more positions or tokens than the model has, or a sparse run in which no attention call was sparse.
    """
    check_backend(backend)
    has_adapter = hasattr(model, "disable_adapter")
    if (without_adapter or control) and not has_adapter:
        raise ValueError(
            f"only a PeftModel has adapters to compare, got {type(model).__name__}; load the adapter first."
        )
    chosen = [
        p if isinstance(p, SparseSettings) else SparseSettings(get_pattern(p), backend=backend)
        for p in patterns
    ]
    head = ChunkedHead(model, head_chunk)
    base: Any = model.get_base_model() if has_adapter else model  # type: ignore[operator]
    _check_length(base, max_length)
    named = [Document(f"document {i}", d) if isinstance(d, str) else d for i, d in enumerate(documents)]
    text = tokenize(tokenizer, named, max_length, bos)
    check_vocabulary(max(max(document.ids) for document in text.documents), base)
    device = base.get_input_embeddings().weight.device

    adapters = [None, "adapter"] if without_adapter else ["adapter"] if has_adapter else [None]
    plan = [(sparse, adapter) for adapter in adapters for sparse in (None, *chosen)]
    plan += [(None, "control")] if control else []
    runs = []
    with _measured_in_eval_mode(model, base), torch.inference_mode():
        head.check(text.documents[0].ids[:PROBE_TOKENS], device)
        with tqdm(
            total=text.tokens * len(plan), unit="tok", unit_scale=True, disable=None if progress else True
        ) as bar:
            for sparse, adapter in plan:
                bar.set_description(_label(sparse) + (f" + {adapter}" if adapter else ""))
                torch.manual_seed(seed)
                with _adapter_state(model, adapter, control), _attention(base, sparse):
                    runs.append(_run(head, text, sparse, adapter, device, bar))
    config = {
        "mode": "full",
        "model": getattr(base.config, "_name_or_path", ""),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "max_length": max_length,
        "trained_length": getattr(base.config, "max_position_embeddings", None),
        "backend": backend,
        "head_chunk": head_chunk,
        "prefix": text.prefix,
        "seed": seed,
    }
    return Result(text, tuple(runs), _position_tokens(text), config, describe_machine(device))


def _run(
    head: ChunkedHead,
    text: ScoredText,
    sparse: SparseSettings | None,
    adapter: str | None,
    device: torch.device,
    bar: Any,
) -> Run:
    """Score every document once, in the state the model is in."""
    _nats(head, text.documents[0], device)  # warm-up: plans are built, kernels chosen
    memory = PeakMemory(device)
    sums, blocks, positions = [], [], []
    seconds = 0.0
    with recording() as recorder:
        for document in text.documents:
            start = time.perf_counter()
            nats = _nats(head, document, device)
            seconds += time.perf_counter() - start
            sums.append(nats.sum())
            blocks.append(np.add.reduceat(nats, np.arange(0, len(nats), BLOCK_TOKENS)))
            positions.append(np.bincount(_buckets(len(nats)), weights=nats, minlength=_bucket_count(text)))
            bar.update(len(nats))
    if sparse is not None and not recorder.calls:
        raise ValueError(
            f"no attention call of {head.name} went through {sparse.pattern}: these would be dense figures; "
            "check with hf_sparse.describe(model) which layers are patched."
        )
    return Run(
        label=_label(sparse),
        pattern=settings_to_json(sparse) if sparse else None,
        adapter=adapter,
        fingerprint=text.fingerprint,
        nats=np.array(sums),
        block_nats=tuple(blocks),
        position_nats=np.stack(positions),
        density=recorder.density if sparse else 1.0,
        calls=len(recorder.calls),
        layers=len({call.layer for call in recorder.calls}),
        ran=dict(Counter(f"{call.backend}/{call.operator}" for call in recorder.calls)),
        seconds=seconds,
        tokens_per_second=text.tokens / seconds,
        peak_memory=memory.bytes(),
        memory_since=memory.since,
    )


def _nats(head: ChunkedHead, document: ScoredDocument, device: torch.device) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first, float64 [N - 1]."""
    ids = torch.tensor([document.ids], device=device)
    targets = ids[0, 1:]
    parts: list[Tensor] = []
    for first, logits in head.chunks(ids):
        wanted = targets[first : first + len(logits)].to(logits.device)  # the last position has no target
        for few, ids_of_few in zip(logits[: len(wanted)].split(ROWS), wanted.split(ROWS), strict=True):
            parts.append(nn.functional.cross_entropy(few.float(), ids_of_few, reduction="none"))
        del logits, few  # or they would lie beside the next chunk's
    return torch.cat(parts).double().cpu().numpy()


def _buckets(tokens: int) -> np.ndarray:
    """Return the position bucket of each scored token: floor(log2(tokens before it))."""
    return np.frexp(np.arange(1, tokens + 1, dtype=np.float64))[1] - 1


def _bucket_count(text: ScoredText) -> int:
    return max(document.tokens for document in text.documents).bit_length()


def _position_tokens(text: ScoredText) -> np.ndarray:
    count = _bucket_count(text)
    return np.stack([np.bincount(_buckets(document.tokens), minlength=count) for document in text.documents])


def _label(sparse: SparseSettings | None) -> str:
    if sparse is None:
        return "dense"
    where = "" if sparse.layers is None else f" in layers {','.join(map(str, sparse.layers))}"
    return f"{sparse.pattern}{where}"


def _attention(base: Any, sparse: SparseSettings | None) -> AbstractContextManager[Any]:
    if sparse is None:
        return nullcontext()
    return patched(base, sparse.pattern, backend=sparse.backend, layers=sparse.layers)


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


@contextmanager
def _measured_in_eval_mode(model: nn.Module, base: Any) -> Iterator[None]:
    """Put the model in eval mode and unpatch it; put both back afterwards."""
    training = {name for name, module in model.named_modules() if module.training}
    before = settings(base)
    if before is not None:
        unpatch_model(base)
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = name in training
        if before is not None:
            patch_model(base, before.pattern, backend=before.backend, layers=before.layers)


def _check_length(base: Any, max_length: int) -> None:
    """Raise ValueError where learned positions end before `max_length`; rotary models may be asked to go on."""
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit and max_length > limit and getattr(base.config, "rope_parameters", None) is None:
        raise ValueError(
            f"max_length={max_length} is beyond the {limit} positions of {type(base).__name__}; "
            f"use max_length={limit} or less."
        )
