"""How the evaluation of one document grows with its length: seconds and memory of a window on the embedded model.

    python -m benchmarks.long_documents [--lengths 8192,16384,...] [--output benchmarks/results/long_documents.json]

Each length is a process of its own, so that its peak of resident memory is its own; lengths take turns, the fastest
turn of each counts, and the exponent is the slope of log seconds over log tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (8_192, 16_384, 32_768, 65_536, 100_000, 131_072)  # tokens
TURNS = 2
WINDOW = 512

# Peak memory is asked of the system before and after, and the mark of the loaded model is below that of a pass.
CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from hf_sparse import SlidingWindow
from hf_sparse.documents import Document, standard_library
from hf_sparse.evaluate import perplexity
from hf_sparse.evaluate.machine import describe_machine
logging.set_verbosity_error(); logging.disable_progress_bar()
length, window = map(int, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained("recipes/tiny_base")
model = AutoModelForCausalLM.from_pretrained("recipes/tiny_base", dtype=torch.float32)
text = "\\n".join(document.text for document in standard_library("test"))[: 6 * length]
patterns = [SlidingWindow(window)]
result = perplexity(model, tokenizer, [Document("long", text)], max_length=length, patterns=patterns, dense=False)
run = result.runs[0]
print(json.dumps({"tokens": int(result.tokens[0]), "seconds": run.seconds, "peak_memory_bytes": run.peak_memory,
    "kv_cache_bytes": run.served.kv_bytes, "density": run.density, "ran": run.ran,
    "nats_per_token": result.nats_per_token(run), "machine": describe_machine(torch.device("cpu"))}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, separated by commas")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "long_documents.json"
    )
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    turns = [[measure(length) for length in lengths] for _ in range(args.turns)]
    best = [min(rows, key=lambda row: row["seconds"]) for rows in zip(*turns, strict=True)]
    machines = [row.pop("machine") for row in best]
    logs = np.log([[row["tokens"], row["seconds"]] for row in best])
    exponent = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    for row in best:
        print(
            f"{row['tokens']:>8,} tokens  {row['seconds']:7.2f} s  {row['tokens'] / row['seconds']:7,.0f} tokens/s  "
            f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB  cache {row['kv_cache_bytes'] / 2**20:.1f} MiB"
        )
    print(f"seconds grow as tokens ** {exponent:.3f}")
    found = {
        "window": WINDOW,
        "exponent": exponent,
        "lengths": best,
        "turns": args.turns,
        "machine": machines[0],
    }
    write(args.output, found)
    return 0


def measure(length: int) -> dict[str, Any]:
    """Return what one process measured."""
    command = [sys.executable, "-c", CHILD, str(length), str(WINDOW)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{length} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    from hf_sparse.evaluate.output_folder import write_atomically

    write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
