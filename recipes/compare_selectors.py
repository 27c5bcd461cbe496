"""What do content-based patterns lose at the density of a window? On the embedded model, untrained.

    python recipes/compare_selectors.py [--documents 32] [--output docs/selection]

Every pattern reads about 12.5 % of what dense attention reads of 2,048 tokens, what it always keeps included: loss on
test documents against dense attention, with paired 95 % intervals and as a share of what the window loses, and copies
of 64 random tokens over a distance. OUTPUT gets selection.json and selection.md;
documents and samples that are done are kept in --work, and the same command goes on where it was stopped.
"""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from hf_sparse import Pattern, get_pattern
from hf_sparse.documents import Document, standard_library
from hf_sparse.evaluate import Result, perplexity
from hf_sparse.evaluate.bootstrap import difference
from hf_sparse.evaluate.machine import describe_machine
from hf_sparse.evaluate.output_folder import check_output_folder, write_atomically
from hf_sparse.evaluate.probes import probe
from hf_sparse.evaluate.probes.result import ProbeResult

ROOT = Path(__file__).resolve().parent
LENGTH = 2048
DISTANCES = (128, 256, 512, 1024)
WINDOW = get_pattern("sliding_window", window=132)
EVERYWHERE: dict[str, Any] = {"dense_layers": 0}  # no layer is left dense
PATTERNS: tuple[Pattern, ...] = (
    WINDOW,
    get_pattern("streaming_llm", sinks=4, window=128),
    get_pattern("topk_blocks", block=4, query_block=1, keep=32, local=8),
    get_pattern("topk_blocks", block=4, query_block=1, keep=32, local=8, represent="minmax"),
    get_pattern("topk_blocks", block=8, query_block=1, keep=16, local=4),
    get_pattern("topk_blocks", block=8, query_block=4, keep=16, local=4),
    get_pattern("quest", block=4, query_block=1, keep=32, local=8, **EVERYWHERE),
    get_pattern("quest", block=8, query_block=4, keep=16, local=4, **EVERYWHERE),
    get_pattern("esa", block=8, query_block=4, keep=16, local=4),
    get_pattern("gsa", block=8, query_block=4, keep=16, local=4, least=16, most=16),
    get_pattern("gsa_on_device", block=8, query_block=4, keep=16, local=4, **EVERYWHERE),
    get_pattern("kvstar", block=8, query_block=4, keep=16, local=4),
    get_pattern("lsh", block=12, rounds=4, buckets=32, local=2),
    get_pattern("vertical_slash", block=8, renew=64, vertical=0.03, slash=0.06, local=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=32, help="test documents at most")
    parser.add_argument("--samples", type=int, default=8, help="copies per distance")
    parser.add_argument("--output", type=Path, default=ROOT.parent / "docs" / "selection")
    parser.add_argument("--work", type=Path, help="where figures are kept as they come (default OUTPUT/work)")
    args = parser.parse_args()
    check_output_folder("--output", args.output)
    work = args.work or args.output / "work"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = str(ROOT / "tiny_base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = perplexity(
        model,
        tokenizer,
        _long_documents(tokenizer, args.documents),
        max_length=LENGTH,
        patterns=PATTERNS,
        prompt=False,
        output=work / "perplexity",
        progress=True,
    )
    copies = probe(
        model,
        tokenizer,
        ["copy"],
        lengths=[LENGTH],
        distances=DISTANCES,
        samples=args.samples,
        patterns=PATTERNS,
        output=work / "copies",
        progress=True,
    )
    record = {
        "command": shlex.join(["python", "recipes/compare_selectors.py", *sys.argv[1:]]),
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "documents": len(found.runs[0].nats),
        "samples": args.samples,
        "rows": rows_of(found, copies, args.samples),
    }
    write_atomically(args.output / "selection.json", json.dumps(record, indent=1).encode())
    write_atomically(args.output / "selection.md", markdown(record).encode())
    print(markdown(record))


def _long_documents(tokenizer: Any, most: int) -> list[Document]:
    """Return the first LENGTH tokens, the prefix counted, of test documents that have as many."""
    found = []
    for document in standard_library("test"):
        start = document.text[: 12 * LENGTH]  # a token has a few characters
        ends = tokenizer(start, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(ends) >= LENGTH and len(found) < most:
            found.append(Document(document.name, start[: ends[LENGTH - 2][1]]))
    return found


def rows_of(found: Result, copies: ProbeResult, samples: int) -> list[dict[str, Any]]:
    """Return what each pattern loses and copies, dense attention first."""
    dense, window = found.runs[0], found.runs[1]
    loss = difference(window.nats, dense.nats, found.tokens).estimate
    rows = []
    for run, copied in zip(found.runs, copies.runs, strict=True):
        above = difference(run.nats, dense.nats, found.tokens)
        right = copied.right.reshape(-1, samples).sum(1) / copied.answered.reshape(-1, samples).sum(1)
        rows.append(
            {
                "pattern": run.label,
                "density": run.density if run.sparse else 1.0,
                "nats_per_token": found.nats_per_token(run),
                "above_dense": [above.estimate, above.low, above.high],
                "of_the_windows_loss": above.estimate / loss,
                "copied": {
                    str(cell.place): float(share) for cell, share in zip(copies.cells, right, strict=True)
                },
            }
        )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """Return the table of the record."""
    rows, distances = record["rows"], list(record["rows"][0]["copied"])
    versions = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
    head = ("pattern", "density", "nats above dense [95 %]", "of the window's loss")
    head += tuple(f"copies over {int(distance):,}" for distance in distances)
    lines = [head, ("---",) * len(head)]
    for row in rows:
        above, low, high = row["above_dense"]
        loss = f"{above:.3f} [{low:.3f}, {high:.3f}]" if row is not rows[0] else ""
        share = f"{row['of_the_windows_loss']:.0%}" if row is not rows[0] else ""
        copied = (f"{row['copied'][distance]:.0%}" for distance in distances)
        lines.append((f"`{row['pattern']}`", f"{row['density']:.1%}", loss, share, *copied))
    return "\n".join(
        [
            "# What content-based patterns lose, and what they find",
            "",
            f"`{record['command']}`, {record['date']}, {versions}.",
            "",
            f"Embedded model, untrained; {record['documents']} test documents of {LENGTH:,} tokens; "
            f"{record['samples']} copies of 64 random tokens per distance.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
        ]
    )


if __name__ == "__main__":
    main()
