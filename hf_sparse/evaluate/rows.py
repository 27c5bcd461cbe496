"""Rows of sums, one per variant and document, and the runs that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bootstrap import BLOCK_TOKENS
from .counting import Counted
from .results import Run
from .serving import Served
from .tokens import ScoredDocument, ScoredText
from .variants import Variant

Row = dict[str, Any]


def document_row(
    variant: Variant,
    index: int,
    document: ScoredDocument,
    nats: np.ndarray,
    context_nats: Sequence[float] | None,
) -> Row:
    """Return the sums of one document.

    Args:
        nats: [tokens] of every scored token in order.
        context_nats: sums of the curve points, None where the document is too short.
    """
    starts = np.arange(0, len(nats), BLOCK_TOKENS)
    return {
        "run": variant.title,
        "document": index,
        "name": document.name,
        "tokens": document.tokens,
        "bytes": document.text_bytes,
        "words": document.words,
        "truncated_tokens": document.truncated,
        "nats": float(nats.sum()),
        "block_nats": np.add.reduceat(nats, starts).tolist(),
        "position_nats": np.bincount(buckets(document), weights=nats).tolist(),
        "context_nats": None if context_nats is None else list(context_nats),
    }


def order(row: Row) -> tuple[int, str]:
    """Return what a row is of: its document and its run."""
    return row["document"], row["run"]


def buckets(document: ScoredDocument) -> np.ndarray:
    """Return the position bucket of each scored token: floor(log2(tokens before it)), the first of them in bucket 0."""
    before = np.maximum(np.arange(document.context, len(document.ids), dtype=np.float64), 1)
    return np.frexp(before)[1] - 1


def position_tokens(text: ScoredText) -> np.ndarray:
    """Return tokens scored per bucket, [documents, buckets]."""
    found = [np.bincount(buckets(document)) for document in text.documents]
    return _padded(found)


def run_of(
    variant: Variant,
    rows: Sequence[Row],
    text: ScoredText,
    contexts: int,
    served: Served | None,
    memory_since: str,
) -> Run:
    """Return the run that the rows of a variant, one per document in order, are of."""
    counted = Counted.of_rows(rows)
    seconds = sum(row["timing"]["seconds"] for row in rows)
    peaks = [row["timing"]["peak_memory_bytes"] for row in rows]
    missing = [float("nan")] * contexts
    curve = [missing if row["context_nats"] is None else row["context_nats"] for row in rows]
    return Run(
        label=variant.label,
        pattern=variant.pattern,
        adapter=variant.adapter,
        fingerprint=text.fingerprint,
        nats=np.array([row["nats"] for row in rows]),
        block_nats=tuple(np.array(row["block_nats"]) for row in rows),
        position_nats=_padded([np.array(row["position_nats"]) for row in rows]),
        context_nats=np.array(curve).reshape(len(rows), contexts),
        key_nats=np.array([row["key_nats"] for row in rows]) if "key_nats" in rows[0] else None,
        density=counted.density if variant.sparse else 1.0,
        calls=counted.calls,
        layers=len(counted.layers),
        ran=counted.ran,
        served=served,
        seconds=seconds,
        tokens_per_second=text.tokens / seconds if seconds else float("nan"),
        peak_memory=None if None in peaks else max(peaks),
        memory_since=memory_since,
    )


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows [documents, longest], zeros behind the shorter ones."""
    longest = max(len(array) for array in arrays)
    return np.stack([np.pad(array, (0, longest - len(array))) for array in arrays])
