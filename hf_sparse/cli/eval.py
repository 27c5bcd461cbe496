"""hf-sparse eval: perplexity of a model, dense and sparse, with and without its adapter, on the same tokens."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from .measuring import add_measuring_arguments, check_measuring, saved_pattern
from .method_options import add_method_arguments, method_of, named_as_options
from .models import CONTROL, add_model_arguments, load_model
from .options import add_pattern_options
from .spelling import read_patterns
from .texts import add_text_arguments, read_texts, skipped_note

if TYPE_CHECKING:
    from ..evaluate import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_measuring_arguments(
        parser, resolved_for="--length", seed="the intervals, and of the masks of encoders"
    )
    parser.add_argument(
        "--no-dense",
        dest="dense",
        action="store_false",
        help="measure the patterns only: dense attention is slow on texts of 100,000 tokens",
    )
    add_text_arguments(parser)
    add_method_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for results.json, per_document.jsonl and CSV files; run again, an interrupted evaluation goes on",
    )
    parser.add_argument("--plot", action="store_true", help="also write pictures into DIR")
    parser.add_argument(
        "--report", action="store_true", help="also write report.html, all on one page, into DIR"
    )
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    check_measuring(args, pictures=("plot", "report"))
    method = method_of(args)
    patterns: list[Any] = list(read_patterns(args.pattern, args, args.length))
    documents, left_out = read_texts(args)

    from ..evaluate import perplexity, table
    from ..evaluate.processes import current_processes

    is_main = current_processes().is_main
    if left_out and is_main:
        print(f"note: {skipped_note(left_out)}", file=sys.stderr)
    model, tokenizer = load_model(args)
    patterns = patterns or saved_pattern(model, args.backend)
    with named_as_options():
        result = perplexity(
            model,
            tokenizer,
            documents,
            **method,
            patterns=patterns,
            backend=args.backend,
            dense=args.dense,
            seed=args.seed,
            without_adapter=hasattr(model, "disable_adapter"),
            control=CONTROL if args.control else None,
            left_out=left_out,
            output=args.output,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    if not is_main:
        return
    print(f"{args.model}, {result.config['dtype']} on {result.machine['device']}")
    print(table(result))
    if args.output:
        _save(result, args)


def _save(result: Result, args: argparse.Namespace) -> None:
    from ..evaluate import save_results

    command = f"hf-sparse {shlex.join(sys.argv[1:])}"
    written = save_results(result, args.output, pictures=args.plot, html=args.report, command=command)
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
