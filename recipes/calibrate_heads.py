"""Which heads need the distance? Calibration on one half of the texts, measured on the other, and all that it beats.

    python recipes/calibrate_heads.py [--model recipes/tiny_base] [--output docs/calibration]

Calibrated on validation files of the embedded text, measured on test files, nothing trained:

- choice: the calibrated patterns at two densities, against the same window everywhere, every other pattern at equal
  density, evenly spaced dense layers and random choices, with paired 95 % intervals;
- scores: every score against exact ablation: rank correlation, forward passes, and what its choice closes; the exact
  greedy search included;
- agreement: the choices on two disjoint halves of the calibration files;
- copy: copying over a distance, dense and calibrated;
- serving: bytes of the cache and time per decoded token, predicted and measured (run this part on a quiet machine).

Every figure is kept in --work as it comes, and the same command goes on where it was stopped. OUTPUT gets NAME.json
with every figure, NAME.md with the tables, and the pictures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrate_heads_peers import peers
from calibrate_heads_report import save_report
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from hf_sparse import Pattern, SlidingWindow, make_cache, patched
from hf_sparse.calibrate import SCORES, Calibration, calibrate
from hf_sparse.calibrate.timing import measure_seconds
from hf_sparse.documents import Document, standard_library
from hf_sparse.evaluate.bootstrap import Interval
from hf_sparse.evaluate.machine import describe_machine
from hf_sparse.evaluate.output_folder import check_output_folder, write_atomically
from hf_sparse.evaluate.perplexity import perplexity
from hf_sparse.evaluate.probes import probe
from hf_sparse.patterns import pattern_from_json, pattern_to_json

ROOT = Path(__file__).resolve().parent
BUDGETS = (0.20, 0.27)
LENGTH, WINDOW = 2048, 128
FEW = 4  # windows on which all scores and the exact search are held against each other
ONE_WINDOW = (SlidingWindow(WINDOW),)
COPIES = 8  # of the copy probe at each distance
PARTS = ("choice", "scores", "agreement", "copy", "serving", "test")


class Study:
    """A model with its texts, and the parts of what is measured; each is read from `work` where it is there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.samples, self.documents = args.work, args.samples, args.documents
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model).eval()
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
            ("windows 32, 128, 512", None),
        ):
            for budget in BUDGETS:
                beyond = 3 if candidates is None and budget == BUDGETS[-1] else 0
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
                        "pattern": pattern_to_json(result.pattern),
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
                str(cell.distance): float(
                    run.right[i * COPIES : (i + 1) * COPIES].sum()
                    / run.answered[i * COPIES : (i + 1) * COPIES].sum()
                )
                for i, cell in enumerate(result.cells)
            }
            for name, run in zip(names, result.runs, strict=True)
        }

    def serving(self) -> list[dict[str, Any]]:
        """Bytes held and seconds per decoded token, predicted and measured, of choices by key-value head."""
        tokens = min(8192, self.model.config.max_position_embeddings - 64)
        dense, found = SlidingWindow(10**6), []
        for of in ("kv_bytes", "decode"):
            for budget in (0.25, 0.5) if of == "kv_bytes" else (0.6,):
                result = self.calibrated(f"served {of}", unit="kv_head", of=of, tokens=tokens, budget=budget)
                patterns = [dense, result.pattern]
                seconds = measure_seconds(self.model, patterns, tokens, "decode", "auto")
                timed = self.calibrated(
                    "served decode", unit="kv_head", of="decode", tokens=tokens, budget=1.0
                ).costs
                found.append(
                    {
                        "of": of,
                        "budget": budget,
                        "tokens": tokens,
                        "bytes": [self._held(pattern, tokens) for pattern in patterns],
                        "bytes_predicted": result.costs.of(result.chosen.choice)
                        if of == "kv_bytes"
                        else None,
                        "seconds": seconds,
                        "seconds_predicted": timed.of(result.chosen.choice),
                        "closed": result.closed(result.chosen),
                        "density": result.chosen.density,
                    }
                )
        return found

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
        distinct = list(dict.fromkeys(named.values()))
        result = perplexity(
            self.model,
            self.tokenizer,
            _long_enough(self.tokenizer, standard_library("test"), self.documents),
            max_length=LENGTH,
            patterns=distinct,
            prompt=False,
            output=self.work / "test documents",
            progress=True,
        )
        dense, *runs = result.runs
        run_of = dict(zip(distinct, runs, strict=True))
        window = run_of[named[f"window {WINDOW}"]]
        best = {
            str(budget): [
                run_of[named[f"calibrated, {name} <= {budget}"]]
                for name in ("window 128", "windows 32, 128, 512")
            ]
            for budget in BUDGETS
        }
        rows = [{"label": "dense", "density": 1.0, "nats": result.nats_per_token(dense)}]
        for label, pattern in named.items():
            run = run_of[pattern]
            gap = result.gap_closed(run, dense, window, dense) if run is not window else None
            row = {
                "label": label,
                "pattern": str(pattern),
                "density": run.density,
                "nats": result.nats_per_token(run),
                "above_dense": _interval(result.difference(run, dense)),
                "closed": _interval(gap.closed) if gap is not None and gap.closed is not None else None,
            }
            budget = label.rpartition(" ")[2]
            if ">=" in label:
                row["above_calibrated"] = [_interval(result.difference(run, mine)) for mine in best[budget]]
            rows.append(row)
        rows[0]["documents"] = len(result.tokens)
        return rows


def _interval(found: Interval) -> list[float]:
    return [found.estimate, found.low, found.high]


def _long_enough(tokenizer, documents: list[Document], most: int) -> list[Document]:
    """At most `most` documents of at least LENGTH tokens, spread over all."""
    kept = [d for d in documents if len(tokenizer(d.text, verbose=False)["input_ids"]) >= LENGTH]
    return [kept[i * len(kept) // most] for i in range(most)] if len(kept) > most else kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"), help="default recipes/tiny_base")
    parser.add_argument("--output", type=Path, default=ROOT.parent / "docs" / "calibration")
    parser.add_argument(
        "--work", type=Path, help="where figures are kept as they come (default OUTPUT/work-NAME)"
    )
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--documents", type=int, default=32, help="test documents at most")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    check_output_folder("--output", args.output)
    name = Path(args.model).name
    args.work = args.work or args.output / f"work-{name}"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(args)
    parts = {part: study.part(part) for part in args.parts}
    if set(PARTS) - set(parts):
        print(f"kept in {args.work}; run without --parts for the report")
        return
    record = {
        "model": name,
        "command": f"python recipes/calibrate_heads.py --model recipes/{name}",
        "samples": args.samples,
        "length": LENGTH,
        "machine": describe_machine(torch.device("cpu")),
        **parts,
    }
    for path in save_report(record, args.output):
        print(path)


if __name__ == "__main__":
    main()
