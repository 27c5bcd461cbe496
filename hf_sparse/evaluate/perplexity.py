"""Perplexity of a language model on long documents, dense and sparse on the same tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..documents import Document, Skipped
from ..hf import SparseSettings
from ..patterns import Pattern
from .counting import Counted
from .evaluation import Evaluation
from .head import ChunkedHead
from .journal import Journal
from .machine import PeakMemory, describe_machine
from .method import Method, as_contexts, check_seed
from .preparation import prepare, trained_length
from .processes import current_processes
from .results import Result
from .rows import order, position_tokens, run_of
from .scoring import CausalScorer, MaskedScorer, Scorer
from .serving import Served
from .tokens import ScoredText
from .variants import (
    base_of,
    check_sparse,
    check_variants,
    chosen_variants,
    entered,
    measured_in_eval_mode,
    weights_fingerprint,
)

PROBE_TOKENS = 16
ROWS_FILE = "per_document"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[Document | str],
    *,
    max_length: int,
    mode: str = "full",
    stride: int | None = None,
    bos: bool = True,
    bos_each_window: bool | None = None,
    patterns: Sequence[str | os.PathLike[str] | Pattern | SparseSettings] = (),
    backend: str = "auto",
    dense: bool = True,
    contexts: Sequence[int] = (),
    context_targets: int = 256,
    key_tokens: int | None = None,
    mask_share: float = 0.15,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    head_chunk: int = 1024,
    seed: int = 0,
    without_adapter: bool = False,
    control: str | None = None,
    left_out: Sequence[Skipped] = (),
    prompt: bool = True,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Result:
    """Score every document with dense attention and with each pattern, on the same tokens.

    Documents are never joined: `Method` has the ways they are read, `tokens.tokenize` says what the prefix is and how
    bytes and words are counted. Documents without text, or with fewer than 2 tokens to score, are skipped and named in
    the result. Logits are held for `head_chunk` positions at a time; the cross-entropy is computed in float32. An
    encoder with a masked-token head is scored by its pseudo-log-likelihood. A model that is patched is measured dense
    too, and is as it was afterwards, training mode included. Under ``accelerate launch`` the processes share the
    documents, and each gives the whole result.

    Args:
        model: a causal or masked language model, or a PeftModel of one.
        documents: plain strings get their place as a name.
        max_length, mode, stride, bos, bos_each_window, contexts, context_targets, key_tokens, mask_share, batch_size,
            prefill_chunk, head_chunk: see `Method`.
        patterns: what to compare with dense: names, patterns, paths of pattern files, or settings of a patched model,
            which also carry its layers and backend.
        dense: False leaves dense attention out, with which texts of 100,000 tokens take too long.
        backend: for patterns and for settings that leave the choice open.
        seed: for patterns that draw, for what is masked, and for the intervals of the result.
        without_adapter: measure every run of a PeftModel first without its adapter, then with it.
        control: name of a second adapter of the PeftModel, trained the same way on the dense model: measured dense, it
            is what `report.adapter_gaps` holds the first against.
        prompt: also read the longest document as a prompt, for its latency and the bytes of its cache.
        left_out: documents that could not be read, to be named in the result beside those that cannot be scored.
        output: folder whose per_document.jsonl gets every row as it is made; called again with the same arguments, an
            interrupted evaluation goes on behind the last complete row.
        overwrite: start anew where `output` holds another evaluation.
        progress: show a bar on stderr when that is a terminal.
    Raises:
        ValueError: a model without a language-model head or whose head cannot be run in chunks, an unknown pattern,
            texts with nothing to score, more positions or tokens than the model has, settings that contradict each
            other or that this kind of model does not have, an output folder of another evaluation, or a sparse run in
            which no attention call was sparse.
    """
    variants = chosen_variants(model, patterns, backend, without_adapter, control, dense)
    if key_tokens is not None and not dense:
        raise ValueError(f"key_tokens={key_tokens} are found with dense attention; measure dense too.")
    method = Method(
        max_length=max_length,
        mode=mode,
        stride=stride,
        bos=bos,
        bos_each_window=bos_each_window,
        contexts=as_contexts(contexts),
        context_targets=context_targets,
        key_tokens=key_tokens,
        mask_share=mask_share,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        head_chunk=head_chunk,
    )
    check_seed(seed)
    head = ChunkedHead(model, head_chunk)
    base = base_of(model)
    prepared = prepare(head, tokenizer, documents, method)
    method = prepared.method
    text = replace(prepared.text, skipped=(*left_out, *prepared.text.skipped))
    device = base.get_input_embeddings().weight.device
    config = {
        **method.as_json(),
        "model": getattr(base.config, "_name_or_path", ""),
        "architecture": type(base).__name__,
        "measure": "pseudo-log-likelihood" if head.masked else "log-likelihood",
        "dtype": str(base.dtype).removeprefix("torch."),
        "trained_length": trained_length(base),
        "backend": backend,
        "prefix": text.prefix,
        "seed": seed,
    }
    machine = describe_machine(device)
    processes = current_processes()
    identity = {
        **config,
        "text": text.fingerprint,
        "names": text.names_fingerprint,
        "weights": weights_fingerprint(model),
        "runs": [[variant.title, variant.pattern] for variant in variants],
        "versions": machine["versions"],
        "device": device.type,
    }
    scorer = _scorer(head, tokenizer, text, method, device, prepared.around, seed)
    served: list[Served | None] = []
    with measured_in_eval_mode(model), torch.inference_mode():
        head.check(text.documents[0].ids[:PROBE_TOKENS].tolist(), device)
        if isinstance(scorer, CausalScorer):
            longest = max((document.ids for document in text.documents), key=len)
            scorer.check_chunks(longest, method.max_length, any(variant.sparse for variant in variants))
        check_variants(model, variants, control)
        journal = Journal(output, ROWS_FILE, identity, processes, overwrite)
        evaluation = Evaluation(head, scorer, text, method, device, journal, processes, progress)
        with evaluation.bar(len(variants)) as bar:
            for variant in variants:
                bar.set_description(variant.title)
                torch.manual_seed(seed)
                with entered(model, variant, control):
                    evaluation.run(variant, variants[0], bar)
                    served.append(evaluation.serve() if prompt and processes.is_main else None)
    rows = journal.finish(order)
    served = processes.gather([served])[0]  # what the main process measured
    runs = []
    for variant, read in zip(variants, served, strict=True):
        own = [row for row in rows if row["run"] == variant.title]
        check_sparse(variant, Counted.of_rows(own), head.name)
        since = PeakMemory(device).since
        runs.append(run_of(variant, own, text, len(method.contexts), read, since))
    keys = [len(row["key_positions"]) for row in rows if "key_positions" in row] or None
    counts = None if keys is None else np.array(keys)
    return Result(text, tuple(runs), position_tokens(text), counts, config, machine, identity, tuple(rows))


def _scorer(
    head: ChunkedHead,
    tokenizer: Any,
    text: ScoredText,
    method: Method,
    device: torch.device,
    around: tuple[list[int], list[int]],
    seed: int,
) -> Scorer:
    if head.masked:
        return MaskedScorer(
            head,
            device,
            batch_size=method.batch_size,
            mask_token=tokenizer.mask_token_id,
            mask_share=method.mask_share,
            around=around,
            seed=seed,
        )
    prefix = int(text.documents[0].ids[0]) if text.prefix != "none" else None
    return CausalScorer(
        head, device, batch_size=method.batch_size, prefill_chunk=method.prefill_chunk, prefix=prefix
    )
