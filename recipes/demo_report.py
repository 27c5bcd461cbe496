"""The demo's table, and what it adds to the report of the evaluation harness."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_sparse.evaluate import GapClosed, Result, Run, Section, adapter_gaps
from hf_sparse.evaluate.speed import Prefill
from hf_sparse.evaluate.table import memory_text

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """What the demo measured.

    untrained: dense, then every pattern.
    adapted: dense and the first pattern with the pattern's adapter, then the dense control with its own.
    prefills: prompts read by the untrained model.
    steps: training steps of 4,096 tokens; seconds: the whole demo.
    """

    untrained: Result
    adapted: Result
    prefills: Sequence[Prefill]
    steps: int
    seconds: float

    @property
    def result(self) -> Result:
        """Every run, on the same tokens: one evaluation for the harness to report."""
        first, second = self.untrained, self.adapted
        identity = {**first.identity, "adapted": second.identity}
        return replace(
            first,
            runs=(*first.runs, *second.runs),
            rows=(*first.rows, *second.rows),
            identity={**identity, "runs": [*first.identity["runs"], *second.identity["runs"]]},
        )

    @property
    def gap(self) -> GapClosed:
        """What LoRA closed of the first pattern's gap, beyond what it won for the dense control."""
        ((_, gap),) = adapter_gaps(self.result)
        return gap

    def table(self) -> str:
        """Return the table in Markdown, with what it was measured on below it."""
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self._rows()]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", *self._notes()]) + "\n"

    def section(self) -> Section:
        """Return the table for the page of the harness."""
        return Section("The demo's table", self._rows())

    def speeds(self) -> list[dict[str, object]]:
        """Return a row per prompt; memory in bytes, time in seconds."""
        return [
            {
                "run": prefill.pattern or self.untrained.runs[0].title,
                "tokens": prefill.length,
                "seconds": prefill.seconds,
                "tokens_per_second": prefill.tokens_per_second,
                "workspace_bytes": prefill.workspace,
            }
            for prefill in self.prefills
        ]

    def _rows(self) -> Rows:
        lengths = sorted({prefill.length for prefill in self.prefills})
        head = ["pattern", "density", "perplexity", "after LoRA", "gap closed"]
        head += [f"tokens/s at {n:,}" for n in lengths] + [f"extra memory at {n:,}" for n in lengths]
        dense, first = self.untrained.runs[:2]
        trained = {
            dense.label: self.adapted.find(False, "control")[0],
            first.label: self.adapted.find(True, "adapter")[0],
        }
        rows = [tuple(head)]
        for run in self.untrained.runs:
            after = trained.get(run.label)
            rows.append(
                (
                    run.label,
                    f"{run.density:.1%}",
                    f"{self.untrained.perplexity(run):.3f}",
                    f"{self.untrained.perplexity(after):.3f}" if after else "",
                    str(self.gap) if run is first else "",
                    *(self._speed(run, n) for n in lengths),
                    *(_memory(self._prefill(run, n)) for n in lengths),
                )
            )
        return rows

    def _prefill(self, run: Run, length: int) -> Prefill:
        label = run.label if run.sparse else None
        return next(p for p in self.prefills if (p.pattern, p.length) == (label, length))

    def _speed(self, run: Run, length: int) -> str:
        own, dense = self._prefill(run, length), self._prefill(self.untrained.runs[0], length)
        ratio = f" ({dense.seconds / own.seconds:.2f}x)" if run.sparse else ""
        return f"{own.tokens_per_second:,.0f}{ratio}"

    def _notes(self) -> list[str]:
        result, machine = self.untrained, self.untrained.machine
        return [
            f"{result.text.tokens:,} tokens of {len(result.text.documents)} held-out documents, each up to "
            f"{result.config['max_length']:,}. Density: (query, key) pairs computed as a share of dense attention's, "
            "counted during the run.",
            f"LoRA: {self.steps} steps of 4,096 tokens; the dense row shows the control, trained the same. Gap closed: "
            "the share of the pattern's untrained loss won back beyond the control, with its 95 % interval.",
            "Tokens/s: one prompt read, the fastest of two, with the ratio to dense. Extra memory: the most held above "
            "the loaded model meanwhile, key-value cache included.",
            f"Machine: {machine['device_name']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
            f"transformers {machine['versions']['transformers']}; {self.seconds / 60:.1f} minutes in all.",
        ]


def _memory(prefill: Prefill) -> str:
    return "not measured" if prefill.workspace is None else memory_text(prefill.workspace)
