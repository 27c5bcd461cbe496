"""The parts of `recover.py`: trainings as a person would start them, and what is measured of them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recover_cases import CONTROL, LENGTH, RECIPES, SAME_DENSITY, SEEDS, TRIALS
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.documents import Document, standard_library
from hf_sparse.evaluate.bootstrap import GapClosed, Interval
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.evaluate.perplexity import perplexity
from hf_sparse.evaluate.probes import probe
from hf_sparse.evaluate.results import Result, Run
from hf_sparse.hf import SparseSettings, settings
from hf_sparse.hf.pattern_file import settings_of
from hf_sparse.patterns import Pattern, get_pattern
from hf_sparse.train import AdaptationArguments, ConfigParser, SparseTrainingArguments

ROOT = Path(__file__).resolve().parent
MODEL = str(ROOT / "tiny_base")
COPIES = 8  # of the copy probe at each distance
PARTS = ("recovery", "copy", "trials")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate" / "cpu.yaml"))


class Study:
    """Everything that is trained and measured, kept in `work`."""

    def __init__(self, work: Path, documents: int) -> None:
        self.work, self.documents = work, documents
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self._untrained: dict[str, Result] = {}

    def part(self, name: str) -> Any:
        """The figures of a part, measured now unless they are kept."""
        path = self.work / f"{name}.json"
        if not path.exists():
            found = getattr(self, name)()
            write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
        return json.loads(path.read_text())

    def recovery(self) -> dict[str, list[dict[str, Any]]]:
        """The gap closed by every recipe with every seed."""
        return {name: [self._recovered(name, seed) for seed in SEEDS] for name in RECIPES}

    def _recovered(self, name: str, seed: int) -> dict[str, Any]:
        untrained, sparse, dense, gap = self._gap(
            "test", self.adapter(name, seed), self.adapter(CONTROL, seed)
        )
        base = untrained.find(False)[0]
        before = next(run for run in untrained.runs if run.label == sparse.label)
        window = next(run for run in untrained.runs if run.label == str(same_density()))
        by_position = enumerate(untrained.position_difference(sparse, dense))
        return {
            "seed": seed,
            "pattern": sparse.label,
            "density": sparse.density,
            "nats": {
                "dense": untrained.nats_per_token(base),
                "control": untrained.nats_per_token(dense),
                "untrained": untrained.nats_per_token(before),
                "trained": untrained.nats_per_token(sparse),
            },
            "gap": _interval(gap.gap),
            "closed": _interval(gap.closed),
            "residual": _interval(gap.residual),
            "of_the_window": _interval(untrained.gap_closed(sparse, dense, window, base).closed),
            "residual_by_position": [
                [2**i, 2 ** (i + 1) - 1, int(tokens), one.estimate]
                for (i, one), tokens in zip(by_position, untrained.position_tokens.sum(0), strict=True)
                if one
            ],
        }

    def copy(self) -> dict[str, dict[str, float]]:
        """The share of random tokens copied right over each distance, before and after, of the first seed."""
        base = AutoModelForCausalLM.from_pretrained(MODEL).eval()
        patterns = [settings_of_recipe(name) for name in RECIPES]
        found = dict(zip([CONTROL, *RECIPES], self._copied(base, patterns, "untrained"), strict=True))
        for name in RECIPES:
            adapted = hf_sparse.load(str(self.adapter(name, SEEDS[0]))).eval()
            found[f"{name} trained"] = self._copied(adapted, [settings(adapted)], name)[-1]
        return found

    def _copied(self, model: Any, patterns: list[Any], folder: str) -> list[dict[str, float]]:
        result = probe(
            model,
            self.tokenizer,
            ["copy"],
            lengths=[LENGTH],
            samples=COPIES,
            patterns=patterns,
            output=self.work / "copies" / folder,
        )
        at = [(str(cell.place), slice(i * COPIES, (i + 1) * COPIES)) for i, cell in enumerate(result.cells)]
        return [
            {place: float(run.right[own].sum() / run.answered[own].sum()) for place, own in at}
            for run in result.runs
        ]

    def trials(self) -> list[dict[str, Any]]:
        """What was tried: the gap closed on validation files, measured from the dense model as it came."""
        rows = []
        for trial in TRIALS:
            say(f"trial {trial.name}")
            name = f"trial {trial.recipe}, {trial.name}"
            gap = self._gap("validation", self.trained(name, trial.recipe, SEEDS[0], trial.options), None)[-1]
            rows.append(
                {
                    "name": trial.name,
                    "recipe": trial.recipe,
                    "options": trial.options,
                    "closed": _interval(gap.closed),
                    "residual": _interval(gap.residual),
                }
            )
        return rows

    def adapter(self, name: str, seed: int) -> Path:
        """The adapter of a recipe, trained now unless it is there; that of the dense control for CONTROL."""
        if name == CONTROL:  # the recipes differ in nothing but their pattern
            return self.trained(f"{name} {seed}", RECIPES[0], seed, {"dense_control": True})
        return self.trained(f"{name} {seed}", name, seed, {})

    def trained(self, folder: str, recipe: str, seed: int, options: dict[str, object]) -> Path:
        """Train as a person would, from the last whole checkpoint if there is one."""
        output = self.work / folder
        if not (output / "adapter" / "sparse_attention.json").exists():
            say(f"training {folder}")
            given = {"seed": seed, "output_dir": output, **options}
            command = [
                sys.executable,
                *LAUNCH,
                str(ROOT / "finetune_lora.py"),
                "--config",
                str(recipe_file(recipe)),
            ]
            for name, value in given.items():
                words = value if isinstance(value, (list, tuple)) else [value]
                command += [f"--{name}", *map(str, words)]
            with open(self.work / f"{folder}.log", "a", encoding="utf-8") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        return output / "adapter"

    def untrained(self, split: str) -> Result:
        """Dense attention and every pattern that is trained for the split, nothing trained."""
        if split not in self._untrained:
            model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
            names = RECIPES if split == "test" else [trial.recipe for trial in TRIALS]
            wanted = [
                *map(settings_of_recipe, names),
                *([settings_of(same_density())] if split == "test" else []),
            ]
            patterns = list(dict.fromkeys(wanted))
            self._untrained[split] = self._perplexity(model, patterns, split, "untrained")
        return self._untrained[split]

    def scored(self, adapter: Path, split: str) -> Result:
        """Dense attention and the pattern that the adapter was trained under, with the adapter."""
        model = hf_sparse.load(str(adapter)).eval()
        return self._perplexity(model, [settings(model)], split, adapter.parent.name)

    def logs(self) -> Iterator[dict[str, Any]]:
        """Every loss of every training, in the order of their names."""
        for state in sorted(self.work.glob("*/log.json")):
            yield {"training": state.parent.name, "log": json.loads(state.read_text())}

    def _gap(self, split: str, adapter: Path, control: Path | None) -> tuple[Result, Run, Run, GapClosed]:
        """Return what an adapter closes against a dense control; None compares with the model as it came."""
        untrained = self.untrained(split)
        base = untrained.find(False)[0]
        dense = base if control is None else self.scored(control, split).find(False, "adapter")[0]
        sparse = self.scored(adapter, split).find(True, "adapter")[0]
        before = next(run for run in untrained.runs if run.label == sparse.label)
        return untrained, sparse, dense, untrained.gap_closed(sparse, dense, before, base)

    def _perplexity(self, model: Any, patterns: list[Any], split: str, folder: str) -> Result:
        say(f"scoring {folder}")
        return perplexity(
            model,
            self.tokenizer,
            documents_of(split)[: self.documents],
            max_length=LENGTH,
            patterns=patterns,
            prompt=False,
            output=self.work / f"scores {split}" / folder,
            progress=True,
        )


def documents_of(split: str) -> list[Document]:
    """The files of a split that fill the evaluated length."""
    return [d for d in standard_library(split) if len(d.text) > 5 * LENGTH]  # a token is 3 to 4 characters


def recipe_file(name: str) -> Path:
    return ROOT / f"{name}.yaml"


def settings_of_recipe(name: str) -> SparseSettings:
    """The pattern that a recipe trains, as a patched model has it."""
    parser = ConfigParser((AdaptationArguments, SparseTrainingArguments))
    arguments, _ = parser.parse(["--config", str(recipe_file(name))])
    return settings_of(arguments.chosen_pattern())


def same_density() -> Pattern:
    """The window of the density of the calibrated recipe, which a gap closed is compared with."""
    name, options = SAME_DENSITY
    return get_pattern(name, **options)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interval(found: Interval | None) -> list[float] | None:
    return None if found is None else [found.estimate, found.low, found.high]
