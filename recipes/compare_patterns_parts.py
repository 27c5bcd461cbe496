"""The parts that `compare_patterns.py` measures, each kept in a file of its own as it comes."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compare_patterns_cases import Choice
from compare_patterns_operators import DENSE, measure_memory, measure_times
from compare_patterns_rows import MEMORY

from benchmarks.timing import Deadline
from hf_sparse import Pattern
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity, save_results
from hf_sparse.evaluate.output_folder import check_output_folder, write_atomically
from hf_sparse.evaluate.speed import measure_prefill

# Seconds that a part takes for one pattern and 8,192 tokens, on two cores: for the time that is left, no more.
PARTS = {"quality": 6.0, "prompt": 1.9, "forward": 0.5, "backward": 1.7, MEMORY: 1.1}


@dataclass(frozen=True)
class Comparison:
    """What is measured; `timed` is the same model with positions for the longest length."""

    choices: tuple[Choice, ...]
    documents: dict[int, list[Document]]
    tokenizer: Any
    model: Any
    timed: Any
    repeats: int
    work: Path
    deadline: Deadline

    def done(self, part: str, length: int) -> Any:
        """Return what is known of a part, {} where that is nothing."""
        path = self._file(part, length)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def is_done(self, part: str, length: int) -> bool:
        known = self.done(part, length)
        return len(known) == len(self._operators) + 1 if part == MEMORY else bool(known)

    def measure(self, part: str, length: int) -> None:
        """Measure what is not known of a part.

        Raises:
            OutOfTime: the deadline leaves no time for it.
        """
        self.deadline.check()
        keep_part = partial(keep, self._file(part, length))
        if part == "quality":
            self._quality(length)
        elif part == "prompt":
            keep_part(self._prompt(length))
        elif part == MEMORY:
            measure_memory(self._operators, length, self.done(part, length), keep_part, self.deadline)
        else:
            keep_part(measure_times(self._operators, part, length, self.repeats + 1, self.deadline))

    def _quality(self, length: int) -> None:
        folder = self._file("quality", length).parent
        result = perplexity(
            self.model,
            self.tokenizer,
            self.documents[length],
            max_length=length,
            patterns=self._patterns,
            output=folder,
            progress=True,
        )
        save_results(result, folder)

    def _prompt(self, length: int) -> dict[str, Any]:
        found = measure_prefill(
            self.timed, (None, *self._patterns), (length,), repeats=self.repeats, progress=True
        )
        labels = (DENSE, *(choice.label for choice in self.choices))
        return {
            label: {**asdict(one), "tokens_per_second": one.tokens_per_second}
            for label, one in zip(labels, found, strict=True)
        }

    def _file(self, part: str, length: int) -> Path:
        """Return the file that holds a part when it is done."""
        return self.work / str(length) / (f"{part}/results.json" if part == "quality" else f"{part}.json")

    @property
    def _patterns(self) -> list[Pattern]:
        return [choice.pattern for choice in self.choices]

    @property
    def _operators(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.is_one_operator]


def begin(work: Path, settings: dict[str, Any]) -> None:
    """Let the folder hold the comparison with these settings; raise ValueError where it holds another one."""
    check_output_folder("--work", work)
    path = work / "settings.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in settings if known.get(name) != settings[name]]:
            raise ValueError(
                f"--work {work} holds measurements of another comparison (other {', '.join(other)}); "
                "name another folder, or remove that one."
            )
    keep(path, settings)


def keep(path: Path, content: Any) -> None:
    """Let the file hold `content` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
