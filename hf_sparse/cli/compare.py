"""hf-sparse compare: results of evaluations side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ENDINGS = (".csv", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        metavar="RESULTS",
        nargs="+",
        help="results.json of hf-sparse eval, or the folder that holds it; all are held against the first",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the comparison to FILE.csv or FILE.json")


def run(args: argparse.Namespace) -> None:
    from ..evaluate.compare import compare
    from ..evaluate.output_folder import check_output_folder, write_atomically

    output = None if args.output is None else Path(args.output)
    if output is not None:
        if output.suffix not in ENDINGS:
            raise ValueError(f"--output {args.output} must end in {' or '.join(ENDINGS)}.")
        if output.is_dir():
            raise ValueError(f"--output {args.output} is a folder; name a file in it.")
        check_output_folder("--output", output.parent)
    found = compare(args.results)
    print(found.table())
    if output is not None:
        content = found.as_csv() if output.suffix == ".csv" else json.dumps(found.as_json(), indent=2) + "\n"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content.encode("utf-8", "replace"))
        print(f"written: {output}", file=sys.stderr)
