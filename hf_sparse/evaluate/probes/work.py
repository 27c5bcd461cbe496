"""Scoring the answers of samples, and the rows that come of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...backends import recording
from ..counting import Counted
from ..journal import Journal, Row
from ..machine import PeakMemory
from ..processes import Processes
from ..scoring import CausalScorer, token_nats
from ..serving import Served, serve
from ..variants import Variant, check_sparse
from ..windows import Window
from .base import Sample
from .cells import Cell

WARM_UP_TOKENS = 512


class AnswerScorer(CausalScorer):
    """Gives for each token of an answer its nats, and whether it is the model's first guess (1 or 0), [tokens, 2]."""

    def measure(self, logits: Tensor, wanted: Tensor) -> Tensor:
        right = logits.argmax(dim=-1) == wanted
        return torch.stack((token_nats(logits, wanted), right.float()), dim=-1)


@dataclass
class Work:
    """The samples of one run, `samples` of each cell, and what scores them."""

    scorer: AnswerScorer
    cells: Sequence[Cell]
    made: Sequence[Sample]
    samples: int
    device: torch.device
    journal: Journal
    processes: Processes
    progress: bool

    def groups(self) -> list[list[int]]:
        """Return this process's samples, in groups of one cell that are scored together."""
        size = self.scorer.batch_size
        begins = range(0, len(self.made), self.samples)
        cells = [list(range(begin, begin + self.samples)) for begin in begins]
        return self.processes.share([cell[i : i + size] for cell in cells for i in range(0, len(cell), size)])

    def bar(self, variants: int) -> Any:
        """Return a progress bar over this process's samples; only the main process shows one."""
        return tqdm(
            total=sum(map(len, self.groups())) * variants,
            unit="sample",
            disable=None if self.progress and self.processes.is_main else True,
        )

    def run(self, variant: Variant, bar: Any) -> None:
        """Score every sample of this process once, in the state the model is in."""
        done = {order(row) for row in self.journal.rows}
        is_warm = False
        for group in self.groups():
            if not all((index, variant.title) in done for index in group):
                if not is_warm:  # plans are built, kernels chosen
                    ids = self.made[group[0]].ids[:WARM_UP_TOKENS]
                    self.scorer.nats([(ids, Window(0, len(ids), len(ids) - 1))])
                    is_warm = True
                rows = self._rows(variant, group)
                check_sparse(variant, Counted.of_rows(rows), self.scorer.head.name)
                self.journal.append(rows)
            bar.update(len(group))

    def serve(self) -> Served:
        """Read the longest sample as a prompt."""
        ids = max((sample.ids for sample in self.made), key=len)
        return serve(self.scorer.head, ids, self.device, chunk=self.scorer.prefill_chunk)

    def _rows(self, variant: Variant, group: list[int]) -> list[Row]:
        made = [self.made[index] for index in group]
        jobs = [(one.ids, Window(0, len(one.ids), len(one.ids) - one.answer)) for one in made]
        memory = PeakMemory(self.device)
        start = time.perf_counter()
        with recording() as recorder:
            found = self.scorer.nats(jobs)
        seconds = (time.perf_counter() - start) / len(group)
        counted = [Counted.of(recorder.calls)] + [Counted()] * (len(group) - 1)  # a batch counts at its first
        rows = []
        for index, answer, count in zip(group, found, counted, strict=True):
            cell = self.cells[index // self.samples]
            rows.append(
                {
                    "run": variant.title,
                    "sample": index,
                    "probe": str(cell.probe),
                    "length": cell.length,
                    cell.probe.axis: cell.place,
                    "answered": len(answer),
                    "right": int(answer[:, 1].sum()),
                    "nats": float(answer[:, 0].sum()),
                    **count.as_row(),
                    "timing": {"seconds": seconds, "peak_memory_bytes": memory.bytes()},
                }
            )
        return rows


def order(row: Row) -> tuple[int, str]:
    """Return what a row is of: its sample and its run."""
    return row["sample"], row["run"]
