"""Time and peak memory of one training step of the adaptation, dense and sparse, at growing lengths.

    python -m benchmarks.training_steps --threads 2
    python -m benchmarks.training_steps --lengths 4096 --patterns longformer --repeats 5 --output /tmp/steps
    python -m benchmarks.training_steps --device cuda --lengths 8192,16384,32768

A step is what `SparseTrainer` does with one sample: the teacher's forward pass where the objective distils, the
student's forward and backward pass, the optimizer. The model is recipes/tiny_base with LoRA and its normalisation
layers trained, in float32 (``--bf16``: autocast), with positions for the longest sample; the dense step has the same
objective and LoRA. Every cell has a process of its own; what it held before its first step is not counted in its
memory. Cells of an earlier run on the same machine stay in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_sparse.documents import standard_library
from hf_sparse.evaluate.machine import PeakMemory, describe_machine
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare

from .memory import ROOT, _resident

RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20)
}  # glibc would keep up to 32 MiB of what is freed, block by block
SLOW = 20.0  # seconds: a step that takes longer is timed once
BASE = ROOT / "recipes/tiny_base"
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "sliding_window", "dense_control": True},
    "sliding_window": {"pattern": "sliding_window", "pattern_options": {"window": 512}},
    "streaming_llm": {"pattern": "streaming_llm", "pattern_options": {"sinks": 4, "window": 508}},
    "longformer": {"pattern": "longformer", "pattern_options": {"window": 512}},
    "bigbird": {"pattern": "bigbird"},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "distillation": {},
    "language modelling": {"kl_weight": 0.0, "lm_weight": 1.0},
}


class Watch(TrainerCallback):
    """Notes the seconds of each step and the memory they need above what was held before the first.

    On one thread of a CPU they are seconds of that thread, which other processes do not lengthen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        cuda = self.device.type == "cuda"
        self.memory = PeakMemory(self.device)
        self.held = torch.cuda.memory_allocated(self.device) if cuda else _resident()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.began)
        control.should_training_stop |= len(self.seconds) > 1 and self.seconds[-1] > SLOW

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of each step but the first, which makes the plans, and the peak in bytes."""
    torch.set_num_threads(cell["threads"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = AdaptationArguments(
            model=_long_base(Path(folder), cell["length"]),
            text=[_long_text(Path(folder), cell["length"])],
            length=cell["length"],
            short="drop",
            **PATTERNS[cell["pattern"]],
            **OBJECTIVES[cell["objective"]],
        )
        training = SparseTrainingArguments(
            output_dir=f"{folder}/run",
            max_steps=1 + cell["repeats"],
            per_device_train_batch_size=1,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            bf16=cell["bf16"],
            use_cpu=cell["device"] == "cpu",
            learning_rate=1e-4,
        )
        trainer = prepare(arguments, training)
        watch = Watch(training.device)
        trainer.add_callback(watch)
        trainer.train()
    peak = watch.memory.bytes()
    return {"seconds": watch.seconds[1:], "bytes": None if peak is None else peak - watch.held}


def _long_base(folder: Path, length: int) -> str:
    """Return a copy of the base whose config has positions for `length` tokens: its rotary ones are computed."""
    for path in BASE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max(length, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def _long_text(folder: Path, length: int) -> str:
    """Write one document of at least two samples: a token is less than eight characters of the standard library."""
    texts, characters = [], 0
    for document in standard_library("train"):
        texts.append(document.text)
        characters += len(document.text)
        if characters > 16 * length:
            break
    path = folder / "text.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def in_a_process(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the cell with what a process of its own measured, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.training_steps", "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **RETURNED})
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {**cell, "error": lines[-1] if lines else f"its process ended with {done.returncode}"}
    found = json.loads(lines[-1])
    return {**cell, **found, "median": statistics.median(found["seconds"])}


def markdown(content: dict[str, Any]) -> str:
    """Return the table of the results, each cell beside dense in the same run."""
    machine, rows = content["machine"], content["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dense = {_key(row): row for row in rows if row["pattern"] == "dense" and "error" not in row}
    body = []
    for row in rows:
        objective = row["objective"] + (", bf16" if row["bf16"] else "")
        name = (objective, f"{row['length']:,}", row["pattern"])
        base = dense.get(_key({**row, "pattern": "dense"}))
        if "error" in row or base is None:
            body.append((*name, row.get("error", "no dense step"), "", "", ""))
            continue
        faster, smaller = base["median"] / row["median"], _share(base["bytes"], row["bytes"])
        held = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f}"
        body.append((*name, f"{row['median']:.2f}", f"{faster:.2f}x", held, smaller))
    head = ("objective", "tokens", "pattern", "s / step", "against dense", "MiB", "dense needs")
    return "\n".join(
        [
            "# A training step, dense and sparse",
            "",
            f"`{content['command']}`, {content['date']}, {machine['device_name']}, {machine['threads']} thread(s), "
            f"{versions}.",
            "",
            *([content["note"], ""] if content["note"] else []),
            *(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body)),
            "",
        ]
    )


def _same(machine: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**machine, "git_revision": None} == {**other, "git_revision": None}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["objective"], row["length"], row["pattern"], row["bf16"]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["bf16"],
        list(OBJECTIVES).index(row["objective"]),
        row["length"],
        list(PATTERNS).index(row["pattern"]),
    )


def _share(dense: int | None, own: int | None) -> str:
    return f"{dense / own:.2f}x" if dense and own else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", default="4096,8192,16384", help="tokens of the sample")
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="which, dense always among them")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--repeats", type=int, default=3, help="steps timed after the first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--note", default="", help="what else is to be said of the machine")
    parser.add_argument(
        "--output", default=str(ROOT / "benchmarks/results/training_steps"), help="without ending"
    )
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(measure(json.loads(given.cell))))
        return
    names = [name for name in PATTERNS if name == "dense" or name in given.patterns.split(",")]
    content: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.training_steps", *sys.argv[1:]]),
        "date": str(date.today()),
        "machine": {**describe_machine(torch.device(given.device)), "threads": given.threads},
        "note": given.note,
        "rows": [],
    }
    file = Path(f"{given.output}.json")
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = {_key(row): row for row in old.get("rows", ()) if _same(old["machine"], content["machine"])}
    for objective in given.objectives.split(","):
        for length in map(int, given.lengths.split(",")):
            for name in names:
                cell = {"objective": objective, "length": length, "pattern": name, "repeats": given.repeats}
                cell |= {"threads": given.threads, "device": given.device, "bf16": given.bf16}
                row = in_a_process(cell)
                rows[_key(row)] = row
                content["rows"] = sorted(rows.values(), key=_place)
                print(objective, length, name, row.get("error") or f"{row['median']:.2f} s", flush=True)
                write_atomically(file, json.dumps(content, indent=1).encode())
                write_atomically(Path(f"{given.output}.md"), markdown(content).encode())


if __name__ == "__main__":
    main()
