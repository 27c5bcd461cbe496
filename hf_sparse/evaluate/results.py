"""What an evaluation gives: sums per document for every run, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .bootstrap import BLOCK_TOKENS, LEAST_DOCUMENTS, GapClosed, Interval, difference, gap_closed
from .tokens import ScoredText


@dataclass(frozen=True, eq=False)
class Run:
    """One pass over all documents, dense or with one pattern.

    label: "dense" or the pattern with its options.
    pattern: how the pattern is saved, {"name", "options"} or {"union": [...]}; None is dense.
    adapter: "adapter" or "control" (one trained the same way on the dense model) where one was on, else None.
    fingerprint: of the tokens it scored.
    nats: [documents] summed negative log-likelihood.
    block_nats: per document, the same per block of 2,048 tokens.
    position_nats: [documents, buckets] the same by position, see `Result.position_tokens`.
    density: pairs computed as a share of dense attention's, counted over the sparse calls; nan where not counted.
    calls: attention calls that went through hf_sparse; layers: how many layers they came from.
    ran: calls per "backend/operator".
    tokens_per_second: scored tokens, output head included, after one warm-up document.
    peak_memory: bytes; memory_since "run", or "process" where the system keeps one mark for the whole process.
    """

    label: str
    pattern: dict[str, Any] | None
    adapter: str | None
    fingerprint: str
    nats: np.ndarray
    block_nats: tuple[np.ndarray, ...]
    position_nats: np.ndarray
    density: float
    calls: int
    layers: int
    ran: dict[str, int]
    seconds: float
    tokens_per_second: float
    peak_memory: int | None
    memory_since: str

    @property
    def sparse(self) -> bool:
        return self.pattern is not None

    @property
    def title(self) -> str:
        return self.label if self.adapter is None else f"{self.label} + {self.adapter}"


@dataclass(frozen=True, eq=False)
class Result:
    """All runs of one evaluation, on the same tokens; the first is dense.

    position_tokens: [documents, buckets] tokens scored with 2**b to 2**(b+1) - 1 tokens before them, the prefix
        included, in bucket b.
    config: the arguments of the evaluation; machine: versions, device, git revision.
    """

    text: ScoredText
    runs: tuple[Run, ...]
    position_tokens: np.ndarray
    config: dict[str, Any]
    machine: dict[str, Any]

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens scored, [documents]."""
        return np.array([document.tokens for document in self.text.documents])

    def nats_per_token(self, run: Run) -> float:
        return float(run.nats.sum() / self.tokens.sum())

    def perplexity(self, run: Run) -> float:
        """Token-weighted (micro) perplexity: exp of nats per token over all documents."""
        return _exp(self.nats_per_token(run))

    def bits_per_byte(self, run: Run) -> float:
        """Bits per UTF-8 byte of the scored text: comparable between tokenizers."""
        text_bytes = sum(document.text_bytes for document in self.text.documents)
        return float(run.nats.sum() / math.log(2) / text_bytes) if text_bytes else float("nan")

    def macro_perplexity(self, run: Run) -> float:
        """exp of the mean over documents of nats per token: every document counts the same."""
        return _exp(float(np.mean(run.nats / self.tokens)))

    def loss_by_position(self, run: Run) -> np.ndarray:
        """Nats per token in each position bucket, [buckets]; nan where no token falls."""
        with np.errstate(invalid="ignore"):
            return run.position_nats.sum(axis=0) / self.position_tokens.sum(axis=0)

    def find(self, sparse: bool, adapter: str | None = None) -> tuple[Run, ...]:
        """Return the sparse or the dense runs with that adapter, or with none."""
        return tuple(run for run in self.runs if run.sparse == sparse and run.adapter == adapter)

    def difference(self, run: Run, other: Run) -> Interval:
        """Nats per token of `run` above `other` with the paired bootstrap interval."""
        (a, b), tokens, unit = self._units(run, other)
        return difference(a, b, tokens, unit, self.config["seed"])

    def gap_closed(self, sparse_adapted: Run, dense_adapted: Run, sparse: Run, dense: Run) -> GapClosed:
        """The gap closed by adaptation, from four runs on these tokens.

        `dense_adapted` should be a dense control trained exactly like `sparse_adapted`; see `bootstrap.gap_closed`.
        Runs of another `Result` are welcome where they scored the same tokens.
        """
        nats, tokens, unit = self._units(sparse_adapted, dense_adapted, sparse, dense)
        return gap_closed(nats[0], nats[1], nats[2], nats[3], tokens, unit, self.config["seed"])

    def _units(self, *runs: Run) -> tuple[list[np.ndarray], np.ndarray, str]:
        """Return what is drawn: nats per unit of each run, tokens per unit, and what a unit is."""
        if any(run.fingerprint != self.text.fingerprint for run in runs):
            raise ValueError(
                "these runs scored different tokens; compare runs on the same documents and length."
            )
        if len(self.text.documents) >= LEAST_DOCUMENTS:
            return [run.nats for run in runs], self.tokens, "documents"
        blocks = [np.diff([*range(0, int(n), BLOCK_TOKENS), int(n)]) for n in self.tokens]
        return (
            [np.concatenate(run.block_nats) for run in runs],
            np.concatenate(blocks),
            f"blocks of {BLOCK_TOKENS} tokens",
        )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
