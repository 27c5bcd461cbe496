"""Train the small models from scratch on the Python standard library, on two CPU cores: the tiny base, a Llama of 5.5M
parameters, or with ``--architecture gpt2`` a GPT-2 of 3.8M with learned positions.

    export OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
    python recipes/pretrain_tiny.py --checkpoints /tmp/tiny --minutes 80 --out recipes/tiny_base

The first line is for speed alone: one thread per worker, and memory that is kept instead of being mapped again for
every tensor (several times faster with glibc). A run that was stopped goes on where it was when the same command is
given again. The schedule runs on *progress*, the larger of (time spent stepping / --minutes) and (tokens / --tokens),
so a slow machine still ends its learning-rate decay in time. ``--export`` writes the last checkpoint's weights to
--out without training.
"""

import argparse
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from pretrain_data import Rows, plant_repeats, train_tokenizer
from pretrain_model import ADAM_LR, MUON_LR, Trainer, build_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_sparse.documents import fingerprint, standard_library

# (until this progress, tokens per row, rows per step, share of rows with planted repeats, share of cycles in these)
PHASES = {
    "llama": (
        (0.15, 512, 16, 0.7, 0.6),
        (0.78, 2048, 6, 0.15, 0.1),
        (0.87, 4096, 4, 0.25, 0.0),
        (1.0, 8192, 2, 0.25, 0.0),
    ),
    "gpt2": (
        (0.3, 384, 20, 0.5, 0.6),
        (0.5, 1024, 8, 0.4, 0.2),
        (1.0, 2048, 4, 0.25, 0.05),
    ),
}
WARM_UP, DECAY_FROM = 0.015, 0.4  # in progress; then linear to zero
STEP_CAP = 60.0  # seconds; a longer step means that the process was stopped


def copy_rows(rows: np.ndarray, distance: int, size: int, vocab_size: int, seed: int) -> np.ndarray:
    """The rows with uniformly random tokens pasted at two places, ``distance`` apart; the second ends the row."""
    rows, rng = rows.copy(), np.random.default_rng(seed)
    span = rng.integers(3, vocab_size, (len(rows), size))
    end = rows.shape[1]
    rows[:, end - size :] = span
    rows[:, end - size - distance : end - distance] = span
    return rows


@torch.no_grad()
def validate(model: PreTrainedModel, rows: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Loss on validation rows ``[n, 2049]`` and the accuracy of copying 64 random tokens from 256 and 1,024 back."""
    found = {"loss": 0.0, "loss_from_1024": 0.0, "copy_256": 0.0, "copy_1024": 0.0}
    for row in rows:
        x = torch.from_numpy(row[None])
        logits = model(input_ids=x[:, :-1], use_cache=False).logits[0].float()
        losses = nn.functional.cross_entropy(logits, x[0, 1:], reduction="none")
        found["loss"] += float(losses.mean()) / len(rows)
        found["loss_from_1024"] += float(losses[1024:].mean()) / len(rows)
    for distance in (256, 1024):
        for row in copy_rows(rows[:8], distance, 64, vocab_size, seed=distance):
            x = torch.from_numpy(row[None])
            guess = model(input_ids=x[:, :-1], use_cache=False, logits_to_keep=63).logits[0].argmax(-1)
            found[f"copy_{distance}"] += float((guess == x[0, -63:]).float().mean()) / len(rows[:8])
    return {name: round(value, 4) for name, value in found.items()}


def rate(progress: float) -> float:
    """The learning-rate factor: a short rise, flat, then linear to zero."""
    return min(progress / WARM_UP, 1.0, (1 - progress) / (1 - DECAY_FROM)) if progress < 1 else 0.0


def save_checkpoint(folder: Path, trainer: Trainer, rows: Rows, done: dict) -> None:
    state = {
        "weights": trainer.master.state_dict(),
        "muons": [muon.state_dict() for muon in trainer.muons],
        "adam": trainer.adam.state_dict(),
        "rng": torch.get_rng_state(),
        "rows": json.dumps(rows.state()),
        "counters": done,
    }
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, trainer: Trainer, rows: Rows) -> dict:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    trainer.master.load_state_dict(state["weights"])
    for muon, saved in zip(trainer.muons, state["muons"], strict=True):
        muon.load_state_dict(saved)
    trainer.adam.load_state_dict(state["adam"])
    trainer.copy_weights()
    torch.set_rng_state(state["rng"])
    rows.restore(json.loads(state["rows"]))
    return state["counters"]


def export(folder: Path, out: Path) -> None:
    """Write the checkpoint's weights, rounded to bf16, to ``out``; the config makes them load as float32."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = build_config(state["counters"]["architecture"], state["counters"]["vocab_size"])
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state["weights"])
    temporary = folder / "export"
    model.to(torch.bfloat16).save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    (temporary / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (temporary / "training_log.jsonl").write_bytes((folder / "training_log.jsonl").read_bytes())
    record = state["counters"] | {
        "command": "python recipes/pretrain_tiny.py --checkpoints CHECKPOINTS --out OUT "
        f"--architecture {state['counters']['architecture']}",
        "phases_are": "until this progress, tokens per row, rows per step, share with repeats, cycles among these",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "learning_rates": {"muon": MUON_LR, "adamw": ADAM_LR, "warm_up": WARM_UP, "decay_from": DECAY_FROM},
        "versions": {
            name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy")
        },
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    (temporary / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(temporary.iterdir()):
        (out / f".{path.name}").write_bytes(path.read_bytes())
        os.replace(out / f".{path.name}", out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the tokenizer and the final weights"
    )
    parser.add_argument("--minutes", type=float, default=80.0, help="training time, counted while stepping")
    parser.add_argument("--tokens", type=float, default=60e6, help="training tokens, if the time allows them")
    parser.add_argument(
        "--workers", type=int, default=2, help="rows computed at the same time, one core each"
    )
    parser.add_argument("--architecture", choices=sorted(PHASES), default="llama")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument(
        "--export", action="store_true", help="only write the last checkpoint's weights to --out"
    )
    args = parser.parse_args()
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.checkpoints, args.out)
        return
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # the workers are the parallel part
    train(args)
    export(args.checkpoints, args.out)


def train(args: argparse.Namespace) -> None:
    documents, phases = standard_library("train"), PHASES[args.architecture]
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(documents).save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    rows = Rows(documents, tokenizer, args.seed)
    held_out = Rows(standard_library("validation"), tokenizer, seed=0).take(16, 2048)
    trainer = Trainer(args.architecture, len(tokenizer), args.workers, args.seed)
    done = {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "seed": args.seed,
        "architecture": args.architecture,
        "vocab_size": len(tokenizer),
        "data": fingerprint(documents),
        "runs": [],
    }
    if (args.checkpoints / "checkpoint.pt").exists():
        done |= load_checkpoint(args.checkpoints, trainer, rows)
    done["runs"].append(
        {"from_step": done["step"], "minutes": args.minutes, "tokens": args.tokens, "phases": phases}
    )
    log = open_log(args.checkpoints / "training_log.jsonl", done["step"])
    saved, reported, losses = done["seconds"], dict(done), []
    while (progress := progress_of(done, args)) < 1:
        length, count, share, cycles = next(phase[1:] for phase in phases if progress < phase[0])
        started = time.monotonic()
        block = rows.take(count, length)
        targets = plant_repeats(block, share, cycles, rows.rng, len(tokenizer))
        losses.append(trainer.step(block[:, :-1], targets, rate(progress + 1e-4)))
        done["seconds"] += min(time.monotonic() - started, STEP_CAP)
        done["tokens"] += count * length
        done["step"] += 1
        progress = progress_of(done, args)
        if (elapsed := done["seconds"] - reported["seconds"]) < 30 and progress < 1:
            continue
        line = {"step": done["step"], "tokens": done["tokens"], "seconds": round(done["seconds"])}
        line |= {"progress": round(progress, 4), "length": length, "loss": round(float(np.mean(losses)), 4)}
        line["lr_factor"] = round(rate(progress), 4)
        line["tokens_per_s"] = round((done["tokens"] - reported["tokens"]) / elapsed)
        if done["seconds"] - saved > 240 or progress >= 1:
            found = validate(trainer.model, held_out, len(tokenizer))
            line |= {f"validation_{name}": value for name, value in found.items()}
            save_checkpoint(args.checkpoints, trainer, rows, done)
            saved = done["seconds"]
        log.write(json.dumps(line) + "\n")
        reported, losses = dict(done), []
    log.close()


def progress_of(done: dict, args: argparse.Namespace) -> float:
    return max(done["seconds"] / (60 * args.minutes), done["tokens"] / args.tokens)


def open_log(path: Path, step: int) -> TextIO:
    """The log without what a run that was cut off wrote after its last checkpoint, open for appending."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
    return path.open("a", buffering=1)


if __name__ == "__main__":
    main()
