"""hf-sparse eval: perplexity of a model, dense and sparse, with and without its adapter, on the same tokens."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS, check_backend
from ..patterns import Pattern
from .method_options import add_method_arguments, method_of, named_as_options
from .models import CONTROL, add_model_arguments, load_model
from .options import add_pattern_options
from .spelling import PATTERN_HELP, read_patterns
from .texts import add_text_arguments, read_texts, skipped_note

if TYPE_CHECKING:
    from ..evaluate import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--pattern",
        metavar="PATTERN",
        action="append",
        default=[],
        help=f"pattern to measure, may be repeated (default: the one the model or adapter was saved with): "
        f"{PATTERN_HELP}; options that adapt to the length are resolved for --length".replace("%", "%%"),
    )
    parser.add_argument(
        "--no-dense",
        dest="dense",
        action="store_false",
        help="measure the patterns only: dense attention is slow on texts of 100,000 tokens",
    )
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default auto)")
    add_text_arguments(parser)
    add_method_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for results.json, per_document.jsonl and CSV files; run again, an interrupted evaluation goes on",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where DIR holds another evaluation"
    )
    parser.add_argument("--plot", action="store_true", help="also write pictures into DIR")
    parser.add_argument(
        "--report", action="store_true", help="also write report.html, all on one page, into DIR"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the intervals, and of the masks of encoders (default 0); what patterns draw hangs on --pattern-seed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    patterns: list[Any] = list(read_patterns(args.pattern, args))
    check_backend(args.backend)
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")
    method = method_of(args)
    _check_output(args)
    documents, left_out = read_texts(args)
    patterns = [p.resolve(args.length) if isinstance(p, Pattern) else p for p in patterns]

    from ..evaluate import perplexity, table
    from ..evaluate.processes import current_processes
    from ..hf import settings

    is_main = current_processes().is_main
    if left_out and is_main:
        print(f"note: {skipped_note(left_out)}", file=sys.stderr)
    model, tokenizer = load_model(args)
    if not patterns and (saved := settings(model)) is not None:
        patterns = [saved if args.backend == "auto" else replace(saved, backend=args.backend)]
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


def _check_output(args: argparse.Namespace) -> None:
    """Raise ValueError before anything is measured where the results could not be written; leave nothing behind."""
    for flag in ("plot", "report", "overwrite"):
        if getattr(args, flag) and not args.output:
            raise ValueError(f"--{flag} is about the output folder; name one with --output DIR")
    if args.plot or args.report:
        from ..evaluate.plot import check_plot

        check_plot()
    if args.output is None:
        return
    from ..evaluate.output_folder import check_output_folder

    check_output_folder("--output", args.output)
