"""One variant after the other over all documents: every document a row, appended as it is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..backends import recording
from .counting import Counted
from .head import ChunkedHead
from .journal import Journal
from .machine import PeakMemory
from .method import Method, key_positions
from .processes import Processes
from .rows import Row, document_row, order
from .scoring import MaskedScorer, Scorer
from .serving import Served, serve
from .tokens import ScoredDocument, ScoredText
from .variants import Variant, check_sparse
from .windows import Window, masked

WARM_UP_TOKENS = 512


@dataclass
class Evaluation:
    """The documents of one evaluation, what scores them, and where their rows go."""

    head: ChunkedHead
    scorer: Scorer
    text: ScoredText
    method: Method
    device: torch.device
    journal: Journal
    processes: Processes
    progress: bool

    def bar(self, variants: int) -> Any:
        """Return a progress bar over this process's tokens; only the main process shows one."""
        share = [index for group in self.groups() for index in group]
        return tqdm(
            total=sum(self.text.documents[i].tokens for i in share) * variants,
            unit="tok",
            unit_scale=True,
            disable=None if self.progress and self.processes.is_main else True,
        )

    def groups(self) -> list[list[int]]:
        """Return this process's documents, in groups that are scored together: longest first, `batch_size` in each.

        They hang on the texts only, so that a run that goes on, or one with more processes, computes the same batches.
        """
        size, documents = self.method.batch_size, self.text.documents
        ordered = sorted(range(len(documents)), key=lambda i: (-len(documents[i].ids), i))
        return self.processes.share([ordered[i : i + size] for i in range(0, len(ordered), size)])

    def run(self, variant: Variant, dense: Variant, bar: Any) -> None:
        """Score every document of this process once, in the state the model is in."""
        done = {order(row) for row in self.journal.rows}
        keys = {r["document"]: r["key_positions"] for r in self.journal.rows if "key_positions" in r}
        is_warm = False
        for group in self.groups():
            if not all((index, variant.title) in done for index in group):
                if not is_warm:  # plans are built, kernels chosen
                    ids = self.text.documents[group[0]].ids[:WARM_UP_TOKENS]
                    self.scorer.nats(self._jobs([ids]))
                    is_warm = True
                rows = self._group(variant, group, None if variant is dense else keys)
                check_sparse(variant, Counted.of_rows(rows), self.head.name)
                self.journal.append(rows)
            bar.update(sum(self.text.documents[index].tokens for index in group))

    def serve(self) -> Served:
        """Read the longest window as a prompt."""
        ids = max((document.ids for document in self.text.documents), key=len)[: self.method.max_length]
        return serve(self.head, ids, self.device, chunk=self.method.prefill_chunk)

    def _group(self, variant: Variant, group: list[int], keys: dict[int, list[int]] | None) -> list[Row]:
        """Return the rows of a few documents.

        Args:
            keys: the key tokens that the dense variant found; None where this is it.
        """
        documents = [self.text.documents[index] for index in group]
        memory = PeakMemory(self.device)
        start = time.perf_counter()
        with recording() as recorder:
            nats = self._document_nats(documents)
        seconds = time.perf_counter() - start
        counted = [Counted.of(recorder.calls)] + [Counted()] * (len(group) - 1)  # a batch counts at its first
        curves = [self._curve(document) for document in documents]
        rows = []
        for index, document, own, curve, count in zip(group, documents, nats, curves, counted, strict=True):
            row = document_row(variant, index, document, own, curve) | count.as_row()
            if self.method.key_tokens is not None:
                if keys is None:
                    row["key_positions"] = self._key_positions(document, own).tolist()
                row["key_nats"] = float(own[row.get("key_positions") or (keys or {}).get(index, [])].sum())
            share = document.tokens / sum(document.tokens for document in documents)
            row["timing"] = {"seconds": seconds * share, "peak_memory_bytes": memory.bytes()}
            rows.append(row)
        return rows

    def _document_nats(self, documents: Sequence[ScoredDocument]) -> list[np.ndarray]:
        """Return the nats of every scored token of each document, in order."""
        jobs = [self._jobs([document.ids]) for document in documents]
        found = iter(self.scorer.nats([job for few in jobs for job in few]))
        return [np.concatenate([next(found) for _ in few]) for few in jobs]

    def _jobs(self, documents: Sequence[np.ndarray]) -> list[tuple[np.ndarray, Window]]:
        if isinstance(self.scorer, MaskedScorer):
            length = self.method.max_length - self.scorer.special_tokens
            return [(ids, window) for ids in documents for window in masked(len(ids), length)]
        return [(ids, window) for ids in documents for window in self.method.windows(len(ids))]

    def _curve(self, document: ScoredDocument) -> list[float] | None:
        """Return the sums of the context curve's points, None where the document is too short."""
        chosen = self.method.context_windows(len(document.ids))
        if not chosen:
            return None
        return [float(nats.sum()) for nats in self.scorer.nats([(document.ids, window) for window in chosen])]

    def _key_positions(self, document: ScoredDocument, nats: np.ndarray) -> np.ndarray:
        short = self.method.short_windows(len(document.ids))
        found = self.scorer.nats([(document.ids, window) for window in short])
        return key_positions(nats, np.concatenate(found))
