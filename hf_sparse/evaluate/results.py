"""What an evaluation gives: sums per document for every run, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .bootstrap import BLOCK_TOKENS, LEAST_DOCUMENTS, GapClosed, Interval, difference, gap_closed
from .serving import Served
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
    context_nats: [documents, contexts] of the last tokens of each document, seen from so many tokens; nan where the
        document is too short for the curve.
    key_nats: [documents] of the key tokens; None where they were not asked for.
    density: pairs computed as a share of dense attention's, counted over the sparse calls; nan where not counted.
    calls: attention calls that went through hf_sparse; layers: how many layers they came from.
    ran: calls per "backend/operator".
    served: a prompt read as `generate` does, with its key-value bytes; None where it was not measured.
    seconds: of scoring; tokens_per_second: scored tokens, output head included, after a warm-up.
    peak_memory: bytes; memory_since "run", or "process" where the system keeps one mark for the whole process.
    """

    label: str
    pattern: dict[str, Any] | None
    adapter: str | None
    fingerprint: str
    nats: np.ndarray
    block_nats: tuple[np.ndarray, ...]
    position_nats: np.ndarray
    context_nats: np.ndarray
    key_nats: np.ndarray | None
    density: float
    calls: int
    layers: int
    ran: dict[str, int]
    served: Served | None
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
    """All runs of one evaluation, on the same tokens; the first is dense, unless that was left out.

    position_tokens: [documents, buckets] tokens scored with 2**b to 2**(b+1) - 1 tokens before them, the prefix
        included, in bucket b.
    key_counts: [documents] key tokens; None where they were not asked for.
    config: the arguments of the evaluation; machine: versions, device, git revision.
    identity: all that decides the figures; rows: the sums they are made of, one per document and run.
    """

    text: ScoredText
    runs: tuple[Run, ...]
    position_tokens: np.ndarray
    key_counts: np.ndarray | None
    config: dict[str, Any]
    machine: dict[str, Any]
    identity: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens scored, [documents]."""
        return np.array([document.tokens for document in self.text.documents])

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of the scored text, [documents]."""
        return np.array([document.text_bytes for document in self.text.documents])

    @cached_property
    def words(self) -> np.ndarray:
        """Words of the scored text, [documents]."""
        return np.array([document.words for document in self.text.documents])

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that the last ones of a document were scored from, one curve point each."""
        return tuple(self.config["contexts"])

    @cached_property
    def on_curve(self) -> np.ndarray:
        """Documents long enough for the context curve, bool [documents]."""
        return ~np.isnan(self.runs[0].context_nats).any(axis=1)

    def nats_per_token(self, run: Run) -> float:
        return float(run.nats.sum() / self.tokens.sum())

    def perplexity(self, run: Run) -> float:
        """Token-weighted (micro) perplexity: exp of nats per token over all documents."""
        return _exp(self.nats_per_token(run))

    def word_perplexity(self, run: Run) -> float:
        """exp of nats per word: comparable between tokenizers on the same text."""
        return _exp(float(run.nats.sum() / self.words.sum()))

    def byte_perplexity(self, run: Run) -> float:
        """exp of nats per UTF-8 byte: comparable between tokenizers."""
        return _exp(float(run.nats.sum() / self.bytes.sum())) if self.bytes.sum() else float("nan")

    def bits_per_byte(self, run: Run) -> float:
        """Bits per UTF-8 byte of the scored text: comparable between tokenizers."""
        total = self.bytes.sum()
        return float(run.nats.sum() / math.log(2) / total) if total else float("nan")

    def macro_perplexity(self, run: Run) -> float:
        """exp of the mean over documents of nats per token: every document counts the same."""
        return _exp(float(np.mean(run.nats / self.tokens)))

    def key_perplexity(self, run: Run) -> float:
        """Perplexity of the tokens that dense attention predicts only with the long context (LongPPL)."""
        if run.key_nats is None or self.key_counts is None or not self.key_counts.sum():
            return float("nan")
        return _exp(float(run.key_nats.sum() / self.key_counts.sum()))

    def loss_by_position(self, run: Run) -> np.ndarray:
        """Nats per token in each position bucket, [buckets]; nan where no token falls."""
        with np.errstate(invalid="ignore"):
            return run.position_nats.sum(axis=0) / self.position_tokens.sum(axis=0)

    def loss_by_context(self, run: Run) -> np.ndarray:
        """Nats per token of the same tokens seen from each of `contexts`, [contexts]."""
        return run.context_nats[self.on_curve].sum(axis=0) / self._curve_tokens().sum()

    def find(self, sparse: bool, adapter: str | None = None) -> tuple[Run, ...]:
        """Return the sparse or the dense runs with that adapter, or with none."""
        return tuple(run for run in self.runs if run.sparse == sparse and run.adapter == adapter)

    def dense_of(self, run: Run) -> Run:
        """Return the dense run that `run` is held against: the one with its adapter on, or off, likewise.

        Where dense attention was not measured, `run` itself.
        """
        return (*self.find(False, run.adapter), run)[0]

    def difference(self, run: Run, other: Run) -> Interval:
        """Nats per token of `run` above `other` with the paired bootstrap interval."""
        (a, b), tokens, unit = self._units(run, other)
        return difference(a, b, tokens, unit, self.config["seed"])

    def bits_per_byte_difference(self, run: Run, other: Run) -> Interval:
        """Bits per byte of `run` above `other` with the paired bootstrap interval."""
        (a, b), tokens, unit = self._units(run, other)
        # A block of a document gets the document's bytes per token.
        share = self.bytes if len(tokens) == len(self.tokens) else self._blocks(self.bytes / self.tokens)
        return difference(a / math.log(2), b / math.log(2), share, unit, self.config["seed"])

    def context_difference(self, run: Run, other: Run) -> list[Interval]:
        """The same as `difference` for each point of the context curve."""
        self._check_same(run, other)
        tokens, seed = self._curve_tokens(), self.config["seed"]
        pairs = zip(run.context_nats[self.on_curve].T, other.context_nats[self.on_curve].T, strict=True)
        return [difference(a, b, tokens, "documents", seed) for a, b in pairs]

    def position_difference(self, run: Run, other: Run) -> list[Interval | None]:
        """The same for each position bucket, over the documents that reach it; None for empty buckets."""
        self._check_same(run, other)
        found: list[Interval | None] = []
        for bucket, tokens in enumerate(self.position_tokens.T):
            reach = tokens > 0
            a, b = run.position_nats[reach, bucket], other.position_nats[reach, bucket]
            found.append(
                difference(a, b, tokens[reach], "documents", self.config["seed"]) if len(a) else None
            )
        return found

    def gap_closed(self, sparse_adapted: Run, dense_adapted: Run, sparse: Run, dense: Run) -> GapClosed:
        """The gap closed by adaptation, from four runs on these tokens.

        `dense_adapted` should be a dense control trained exactly like `sparse_adapted`; see `bootstrap.gap_closed`.
        Runs of another `Result` are welcome where they scored the same tokens.
        """
        nats, tokens, unit = self._units(sparse_adapted, dense_adapted, sparse, dense)
        return gap_closed(nats[0], nats[1], nats[2], nats[3], tokens, unit, self.config["seed"])

    def _units(self, *runs: Run) -> tuple[list[np.ndarray], np.ndarray, str]:
        """Return what is drawn: nats per unit of each run, tokens per unit, and what a unit is."""
        self._check_same(*runs)
        if len(self.text.documents) >= LEAST_DOCUMENTS:
            return [run.nats for run in runs], self.tokens, "documents"
        return (
            [np.concatenate(run.block_nats) for run in runs],
            self._blocks(np.ones(len(self.tokens))),
            f"blocks of {BLOCK_TOKENS} tokens",
        )

    def _blocks(self, per_token: np.ndarray) -> np.ndarray:
        """Return `per_token` [documents] times the tokens of each block of each document, [blocks]."""
        blocks = [np.diff([*range(0, int(n), BLOCK_TOKENS), int(n)]) for n in self.tokens]
        return np.concatenate([sizes * each for sizes, each in zip(blocks, per_token, strict=True)])

    def _curve_tokens(self) -> np.ndarray:
        return np.full(int(self.on_curve.sum()), self.config["context_targets"])

    def _check_same(self, *runs: Run) -> None:
        if any(run.fingerprint != self.text.fingerprint for run in runs):
            raise ValueError(
                "these runs scored different tokens; compare runs on the same documents and length."
            )


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
