"""The one function of the package: `analyze`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibrate.gated import Gated
from ..calibrate.run import source_of
from ..calibrate.units import units_of
from ..calibrate.windows import windows_of
from ..documents import Document
from ..evaluate.head import ChunkedHead
from ..evaluate.machine import describe_machine
from ..evaluate.method import check_seed
from ..evaluate.processes import current_processes
from ..evaluate.variants import base_of, measured_in_eval_mode
from ..hf.loading import load_tokenizer
from ..patterns import Pattern, get_pattern
from .candidates import candidates_of, check_density
from .measure import kept_by_window
from .result import Analysis
from .sizes import Scaled

SAMPLES = 8
QUERIES = 32


def analyze(
    model: nn.Module,
    texts: Iterable[Document | str],
    patterns: Sequence[str | Pattern | Scaled] | None = None,
    density: float | None = None,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    samples: int = SAMPLES,
    queries: int = QUERIES,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """Measure for every layer and head how much of the dense attention mass each pattern keeps at one density.

    The model reads windows of the texts with dense attention. In every layer the weights of a few queries of each
    window are computed, and for every pattern the share of them that falls on the keys it would read. Content-based
    patterns select in every layer, from the queries and keys of the dense model. The model is as it was afterwards.
    Under ``accelerate launch`` the processes share the windows, and each gives the whole result.

    Args:
        model: a causal language model, an encoder with a masked-token head, or a PeftModel of either; patched or not.
        texts: documents, or strings; windows are cut from them, each of one document.
        patterns: names, of which `SIZES` in this package says what sets their size, are made as large as the
            density asks for, a `Scaled` too, which has further options; a pattern, and what has no such option, is
            analysed as it is. None are all that have a size and that the model can run.
        density: pairs of a query and a key that a pattern reads, as a share of dense attention's, counted for a window
            with everything that is always kept. None is 0.125, or the highest of the patterns where none is fitted.
        tokenizer: None loads the one saved with the model.
        length: tokens of a window; default 2,048, or what the model was trained for where that is less.
        samples: windows.
        queries: drawn of each window, evenly from all its tokens; all of them where it has no more.
        seed: of the draws, and of what is masked for encoders.
        progress: show a bar on stderr when that is a terminal.
    Raises:
        ValueError: a density that is no share or that no pattern comes down to, an unknown pattern or one that the
            model cannot run, texts too short for the windows, a model without a language-model head, or one whose
            attention is not finite.
    """
    check_density(density)
    check_seed(seed)
    for name, value in (("samples", samples), ("queries", queries)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    head, base = ChunkedHead(model, 1), base_of(model)
    units = units_of(base, "head")
    tokenizer = load_tokenizer(source_of(base)) if tokenizer is None else tokenizer
    windows = windows_of(head, tokenizer, texts, length=length, samples=samples, seed=seed)
    candidates = candidates_of(base, units, patterns, density, windows.length)
    processes, device = current_processes(), base.get_input_embeddings().weight.device
    with (
        measured_in_eval_mode(model),
        tqdm(
            total=samples, desc="analyze", unit="window", disable=_hidden(progress and processes.is_main)
        ) as bar,
    ):
        kept = kept_by_window(
            Gated(model, units, (get_pattern("full"),), "auto"),
            head,
            windows,
            candidates.patterns,
            queries=queries,
            seed=seed,
            device=device,
            processes=processes,
            bar=bar,
        )
    return Analysis(
        patterns=candidates.patterns,
        densities=candidates.densities,
        mass=kept.mean(0),
        layers=units.layers,
        density=candidates.density,
        notes=candidates.notes,
        config={
            "model": getattr(base.config, "_name_or_path", ""),
            "architecture": type(base).__name__,
            "dtype": str(base.dtype).removeprefix("torch."),
            "heads": units.heads,
            "kv_heads": units.kv_heads,
            "length": windows.length,
            "samples": samples,
            "documents": windows.documents,
            "text": windows.fingerprint,
            "queries": min(queries, windows.length),
            "seed": seed,
        },
        machine=describe_machine(device),
    )


def _hidden(progress: bool) -> bool | None:
    """Return what tqdm is told: None hides the bar where stderr is no terminal."""
    return None if progress else True
