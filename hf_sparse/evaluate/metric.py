"""Perplexity as a metric of the library `evaluate`, from sums per document; importing this module imports that library.

Instantiate it directly; `evaluate.load` would copy and run a file.

    from hf_sparse.evaluate.metric import SparsePerplexity
    metric = SparsePerplexity(keep_in_memory=True)
    metric.add_batch(nats=[41.2], tokens=[16], bytes=[61], words=[10])
    metric.compute()
"""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

_INPUTS = """
Args:
    nats: summed negative log-likelihood of each document, in nats.
    tokens, bytes, words: what of each document was scored, in tokens, UTF-8 bytes and words.
Returns:
    nats_per_token, perplexity, byte_perplexity, word_perplexity and bits_per_byte of all documents together, so that
    each counts by its length; macro_perplexity, exp of the mean of nats/token, where all count the same; and how many
    tokens and documents there were.
"""


class SparsePerplexity(evaluate.Metric):
    """Perplexity per token, byte and word of documents given by their sums; the same however they are batched.

    With ``num_process`` and ``process_id`` the rows of all processes are put together: process 0 gets the figures of
    all of them, the others get None.
    """

    def _info(self) -> evaluate.MetricInfo:
        counts = {name: datasets.Value("int64") for name in ("tokens", "bytes", "words")}
        return evaluate.MetricInfo(
            description="Perplexity per token, byte and word from sums per document.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"nats": datasets.Value("float64"), **counts}),
        )

    def _compute(
        self, *, nats: list[float], tokens: list[int], bytes: list[int], words: list[int]
    ) -> dict[str, float]:
        """Return the figures of `_INPUTS`; ValueError where a row cannot be scored or there is nothing to divide by."""
        for row, (loss, count) in enumerate(zip(nats, tokens, strict=True)):
            if count < 1:
                raise ValueError(f"row {row} has {count} tokens; leave out documents without scored tokens.")
            if not math.isfinite(loss):
                raise ValueError(f"row {row} has {loss} nats; give the finite sum of its tokens' losses.")
        for name, counts in {"tokens": tokens, "bytes": bytes, "words": words}.items():
            if sum(counts) < 1:
                raise ValueError(
                    f"all {len(counts)} rows together have {sum(counts)} {name}; give at least one."
                )
        total = math.fsum(nats)  # exact, hence the same in any order
        nats_per_token = total / sum(tokens)
        means = [loss / count for loss, count in zip(nats, tokens, strict=True)]
        return {
            "nats_per_token": nats_per_token,
            "perplexity": _exp(nats_per_token),
            "byte_perplexity": _exp(total / sum(bytes)),
            "word_perplexity": _exp(total / sum(words)),
            "bits_per_byte": total / math.log(2) / sum(bytes),
            "macro_perplexity": _exp(math.fsum(means) / len(means)),
            "tokens": sum(tokens),
            "documents": len(tokens),
        }


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # infinite, as in a Result
        return float(np.exp(nats))
