"""hf-sparse eval: perplexity of a model, dense and sparse, with and without its adapter, on the same tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS
from ..documents import Document, read_documents, standard_library
from ..patterns import Pattern
from .models import CONTROL, add_model_arguments, load_model
from .options import add_pattern_options
from .spelling import PATTERN_HELP, read_patterns

if TYPE_CHECKING:
    from ..evaluate import Result

LIBRARY_DOCUMENTS = 32  # of the standard library, where neither texts nor a number are given
PLOT = "loss_by_position.png"


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
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default auto)")
    parser.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="UTF-8 text files, one document each (default: the test split of this Python's standard library)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=f"measure the N longest documents (default: all files of --text, {LIBRARY_DOCUMENTS} of the library)",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of each document that are read (default 2048)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for results.json and per_document.jsonl")
    parser.add_argument("--plot", action="store_true", help=f"also write {PLOT} into the output folder")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the intervals (default 0); what patterns draw hangs on --pattern-seed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    patterns: list[Any] = list(read_patterns(args.pattern, args))
    documents = _documents(args)
    _check_output(args)
    _check_numbers(args)
    patterns = [p.resolve(args.length) if isinstance(p, Pattern) else p for p in patterns]

    from ..evaluate import perplexity, table
    from ..hf import settings

    model, tokenizer = load_model(args)
    if not patterns and (saved := settings(model)) is not None:
        patterns = [saved]
    result = perplexity(
        model,
        tokenizer,
        documents,
        max_length=args.length,
        patterns=patterns,
        backend=args.backend,
        seed=args.seed,
        without_adapter=hasattr(model, "disable_adapter"),
        control=CONTROL if args.control else None,
        progress=not args.quiet,
    )
    print(f"{args.model}, {result.config['dtype']} on {result.machine['device']}")
    print(table(result))
    trained = result.config["trained_length"]
    if trained and args.length > trained:
        print(f"note: --length {args.length} is beyond the {trained} positions the model was trained on")
    if args.output:
        _save(result, args)


def _save(result: Result, args: argparse.Namespace) -> None:
    from ..evaluate import plot_loss_by_position, save_results

    written = save_results(result, args.output)
    if args.plot:
        written.append(plot_loss_by_position(result, Path(args.output) / PLOT))
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


def _documents(args: argparse.Namespace) -> list[Document]:
    """Return the documents in the order given; where a number is asked for, the longest ones."""
    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents must be >= 1, got {args.documents}")
    found = read_documents(args.text) if args.text else standard_library("test")
    wanted = args.documents or (len(found) if args.text else LIBRARY_DOCUMENTS)
    longest = sorted(range(len(found)), key=lambda i: (-len(found[i].text), i))[:wanted]
    return [found[i] for i in sorted(longest)]


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError before the model is loaded for what would fail after."""
    from ..backends import check_backend

    check_backend(args.backend)
    if args.length < 3:
        raise ValueError(f"--length must be >= 3 tokens (two to score), got {args.length}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")


def _check_output(args: argparse.Namespace) -> None:
    """Raise ValueError before anything is measured where the results could not be written; leave nothing behind."""
    if args.plot:
        if not args.output:
            raise ValueError(f"--plot writes {PLOT} into the output folder; name one with --output DIR")
        from ..evaluate.plot import check_plot

        check_plot()
    if args.output is None:
        return
    from ..evaluate.output_folder import check_output_folder

    check_output_folder("--output", args.output)
