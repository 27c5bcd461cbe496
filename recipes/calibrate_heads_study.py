"""The parts of `calibrate_heads.py`: what is calibrated, what it is held against, and what is measured."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrate_heads_peers import peers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import Pattern, SlidingWindow, StreamingLLM, make_cache, patched
from hf_sparse.calibrate import SCORES, Calibration, calibrate
from hf_sparse.calibrate.costs import density_costs
from hf_sparse.calibrate.scores import GateGradient
from hf_sparse.calibrate.timing import costs_of, measure_seconds, timed_choices
from hf_sparse.documents import Document, standard_library
from hf_sparse.evaluate.bootstrap import Interval
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.evaluate.perplexity import perplexity
from hf_sparse.evaluate.probes import probe
from hf_sparse.evaluate.results import Result, Run
from hf_sparse.patterns import pattern_from_json, pattern_to_json

BUDGETS = (0.20, 0.27)
LENGTH, WINDOW = 2048, 128
FEW = 4  # windows on which all scores and the exact search are held against each other
ONE_WINDOW = (SlidingWindow(WINDOW),)
WINDOWS = (SlidingWindow(32), SlidingWindow(128), SlidingWindow(512))
SERVED = (0.25, 0.4, 0.6)  # budgets of bytes
COPIES = 8  # of the copy probe at each distance
PARTS = ("choice", "scores", "stages", "agreement", "copy", "serving", "test", "default")


class Study:
    """A model with its texts, and the parts of what is measured; each is read from `work` where it is there."""

    def __init__(self, model: str, work: Path, samples: int, documents: int) -> None:
        self.work, self.samples, self.documents = work, samples, documents
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.found: dict[str, Any] = {}

    def part(self, name: str) -> Any:
        """The figures of a part, measured now unless they are kept."""
        path = self.work / f"{name}.json"
        if name not in self.found:
            if not path.exists():
                print(f"{name} ...", file=sys.stderr, flush=True)
                write_atomically(path, (json.dumps(getattr(self, name)(), indent=1) + "\n").encode())
            self.found[name] = json.loads(path.read_text())
        return self.found[name]

    def calibrated(self, folder: str, candidates=ONE_WINDOW, texts=None, **options) -> Calibration:
        options = {"samples": self.samples, "length": LENGTH, "beyond": 0} | options
        texts = standard_library("validation") if texts is None else texts
        return calibrate(
            self.model,
            texts,
            candidates,
            tokenizer=self.tokenizer,
            output=self.work / folder,
            progress=True,
            **options,
        )

    def choice(self) -> dict[str, Any]:
        """The calibrated patterns."""
        found = {}
        for name, candidates in (
            ("window 128", (SlidingWindow(WINDOW),)),
            ("windows 32, 128, 512", WINDOWS),
        ):
            for budget in BUDGETS:
                beyond = 3 if candidates is WINDOWS and budget == BUDGETS[-1] else 0
                result = self.calibrated(f"calibrated {name}", candidates, budget=budget, beyond=beyond)
                found[f"{name} <= {budget}"] = result.as_json() | {"pattern": pattern_to_json(result.pattern)}
        return found

    def scores(self) -> list[dict[str, Any]]:
        """Every score on the same few windows: its first gains, its choices, its passes."""
        found = []
        searches = [(name, None) for name in SCORES] + [("gate_gradient", False), ("ablation", "unit")]
        for name, rescore in searches:
            if name == "ablation" and rescore is None:
                rescore = False
            for budget in BUDGETS:
                result = self.calibrated(
                    "few windows", budget=budget, score=name, rescore=rescore, samples=FEW
                )
                found.append(
                    {
                        "score": name,
                        "rescore": result.config["rescore"],
                        "budget": budget,
                        "gains": result.gains[..., 0].tolist(),
                        "chosen": np.flatnonzero(result.chosen.choice.ravel() == 0).tolist(),
                        "closed": result.closed(result.chosen),
                        "passes": result.choosing,
                        "gap": result.cheapest.value - result.dense.value,
                        "pattern": pattern_to_json(result.pattern),
                    }
                )
        return found

    def stages(self) -> list[dict[str, Any]]:
        """How often the default score is taken anew, and where: its choices among several windows."""
        middle = GateGradient(points=(0.2113, 0.7887))  # of Gauss and Legendre
        searches = [(GateGradient(), stages) for stages in (1, 2, 4, 8)] + [(middle, 1)]
        found = []
        for score, stages in searches:
            result = self.calibrated(
                "stages", WINDOWS, budget=BUDGETS[0], score=score, stages=stages, samples=FEW
            )
            row = {"points": score.points, "stages": stages, "passes": result.choosing}
            found.append(
                row
                | {
                    "closed": result.closed(result.chosen),
                    "above_dense": result.chosen.value - result.dense.value,
                }
            )
        return found

    def agreement(self) -> dict[str, Any]:
        """The units that are made dense on every other file, and on the rest."""
        texts, halves = standard_library("validation"), []
        for half in (0, 1):
            result = self.calibrated(f"half {half}", texts=texts[half::2], budget=BUDGETS[-1])
            halves.append(np.flatnonzero(result.chosen.choice.ravel() == 0).tolist())
        a, b = map(set, halves)
        return {
            "budget": BUDGETS[-1],
            "first": sorted(a),
            "second": sorted(b),
            "jaccard": len(a & b) / len(a | b),
        }

    def copy(self) -> dict[str, Any]:
        """Copying 64 random tokens over a distance."""
        patterns = [pattern_from_json(entry["pattern"]) for entry in self.part("choice").values()]
        result = probe(
            self.model,
            self.tokenizer,
            ["copy"],
            lengths=[LENGTH],
            samples=COPIES,
            patterns=[SlidingWindow(WINDOW), *patterns],
            output=self.work / "copy probe",
            progress=True,
        )
        names = ["dense", f"window {WINDOW}", *self.part("choice")]
        return {
            name: {
                str(cell.place): float(
                    run.right[i * COPIES : (i + 1) * COPIES].sum()
                    / run.answered[i * COPIES : (i + 1) * COPIES].sum()
                )
                for i, cell in enumerate(result.cells)
            }
            for name, run in zip(names, result.runs, strict=True)
        }

    def serving(self) -> list[dict[str, Any]]:
        """Bytes held and seconds per decoded token, predicted and measured, of choices by key-value head.

        The choices take turns with what the prediction is made from: readings of different minutes differ.
        """
        tokens = min(8192, self.model.config.max_position_embeddings - 128)
        results = [
            self.calibrated("served", unit="kv_head", of="kv_bytes", tokens=tokens, budget=budget)
            for budget in SERVED
        ]
        units, candidates = results[0].units, results[0].candidates
        choices = timed_choices(units, len(candidates))
        patterns = [units.pattern(choice, candidates) for choice in choices]
        seconds = measure_seconds(
            self.model, [*patterns, *(result.pattern for result in results)], tokens, "decode", "auto"
        )
        pairs = density_costs(self.model, units, candidates, tokens).shares
        timed = costs_of("decode", tokens, pairs, choices, seconds[: len(choices)])
        held = [self._held(pattern, tokens) for pattern in (patterns[0], *(r.pattern for r in results))]
        return [
            {
                "budget": result.budget,
                "tokens": tokens,
                "bytes_predicted": result.costs.of(result.chosen.choice),
                "bytes": own / held[0],
                "seconds_predicted": timed.of(result.chosen.choice),
                "seconds": took / seconds[0],
                "dense_seconds": seconds[0],
                "closed": result.closed(result.chosen),
                "density": result.chosen.density,
            }
            for result, own, took in zip(results, held[1:], seconds[len(choices) :], strict=True)
        ]

    @torch.inference_mode()
    def _held(self, pattern: Pattern, tokens: int) -> int:
        with patched(self.model, pattern):
            cache = make_cache(self.model)
            ids = torch.zeros(1, tokens, dtype=torch.long)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache.nbytes

    def test(self) -> list[dict[str, Any]]:
        """Everything on test documents: nats per document of every pattern."""
        named: dict[str, Pattern] = {f"window {WINDOW}": SlidingWindow(WINDOW)}
        for name, entry in self.part("choice").items():
            named[f"calibrated, {name}"] = pattern_from_json(entry["pattern"])
        for entry in self.part("scores"):
            label = f"score {entry['score']}, rescore {entry['rescore']} <= {entry['budget']}"
            named[label] = pattern_from_json(entry["pattern"])
        units = self.calibrated("few windows", budget=BUDGETS[0], samples=FEW).units
        for budget in BUDGETS:
            for label, pattern in peers(self.model, units, LENGTH, budget, WINDOW).items():
                named[f"{label} >= {budget}"] = pattern
        result, run_of = self._read(named, "test documents")
        best = {
            str(budget): [
                run_of[named[f"calibrated, {name} <= {budget}"]]
                for name in ("window 128", "windows 32, 128, 512")
            ]
            for budget in BUDGETS
        }
        rows = self._rows(named, result, run_of)
        for row in rows[1:]:
            if ">=" in row["label"]:
                run, budget = run_of[named[row["label"]]], row["label"].rpartition(" ")[2]
                row["above_calibrated"] = [_interval(result.difference(run, mine)) for mine in best[budget]]
        return rows

    def default(self) -> dict[str, Any]:
        """The default candidates, which have sinks: calibrated, and measured on the same documents."""
        named: dict[str, Pattern] = {
            f"window {WINDOW}": SlidingWindow(WINDOW),
            f"4 sinks, window {WINDOW - 4}": StreamingLLM(4, WINDOW - 4),
        }
        for budget in BUDGETS:
            result = self.calibrated(
                "calibrated default", None, budget=budget, beyond=3 if budget == BUDGETS[-1] else 0
            )
            named[f"calibrated, default candidates <= {budget}"] = result.pattern
        return {"figures": result.as_json(), "rows": self._rows(named, *self._read(named, "default on test"))}

    def _read(self, named: dict[str, Pattern], folder: str) -> tuple[Result, dict[Pattern, Run]]:
        """Every pattern on the test documents."""
        distinct = list(dict.fromkeys(named.values()))
        result = perplexity(
            self.model,
            self.tokenizer,
            _long_enough(self.tokenizer, standard_library("test"), self.documents),
            max_length=LENGTH,
            patterns=distinct,
            prompt=False,
            output=self.work / folder,
            progress=True,
        )
        return result, dict(zip(distinct, result.runs[1:], strict=True))

    def _rows(
        self, named: dict[str, Pattern], result: Result, run_of: dict[Pattern, Run]
    ) -> list[dict[str, Any]]:
        """Dense, then every pattern: its loss, against dense, and the share of the window's loss that it closes."""
        dense, window = result.runs[0], run_of[named[f"window {WINDOW}"]]
        rows: list[dict[str, Any]] = [
            {
                "label": "dense",
                "density": 1.0,
                "nats": result.nats_per_token(dense),
                "documents": len(result.tokens),
            }
        ]
        for label, pattern in named.items():
            run = run_of[pattern]
            closed = None if run is window else result.gap_closed(run, dense, window, dense).closed
            rows.append(
                {
                    "label": label,
                    "pattern": str(pattern),
                    "density": run.density,
                    "nats": result.nats_per_token(run),
                    "above_dense": _interval(result.difference(run, dense)),
                    "closed": None if closed is None else _interval(closed),
                }
            )
        return rows


def _interval(found: Interval) -> list[float]:
    return [found.estimate, found.low, found.high]


def _long_enough(tokenizer, documents: list[Document], most: int) -> list[Document]:
    """At most `most` documents of at least LENGTH tokens, spread over all."""
    kept = [d for d in documents if len(tokenizer(d.text, verbose=False)["input_ids"]) >= LENGTH]
    return [kept[i * len(kept) // most] for i in range(most)] if len(kept) > most else kept
