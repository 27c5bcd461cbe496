"""hf-sparse analyze: how much attention mass each pattern keeps in every head, and which pattern each head wants."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator

from ..analyze.candidates import DENSITY, check_density
from ..analyze.run import QUERIES, SAMPLES
from ..analyze.sizes import SIZES, Scaled
from ..hf.pattern_file import is_pattern_file
from ..patterns import Pattern
from .candidates import read_candidate
from .models import add_model_arguments, load_model
from .named import split_options
from .texts import add_text_arguments, read_texts, skipped_note

SPLIT = "validation"  # the test split is what patterns are measured on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, control=False)
    parser.add_argument(
        "--output", "--out", metavar="DIR", help="folder for analysis.json, mass.csv and heatmap.png"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the analysis that DIR holds")
    parser.add_argument(
        "--pattern",
        dest="patterns",
        metavar="PATTERN",
        action="append",
        help="NAME or NAME:OPTION=VALUE,..., of which the size is fitted to the density unless it is given; a union of "
        "these in quotes, a JSON file or a pattern without a size is analysed as it is; may be repeated (default: "
        f"{', '.join(name for name, size in SIZES.items() if size.usual)})",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="X",
        help="pairs of a query and a key that a pattern reads, as a share of dense attention's, what it always keeps "
        f"included (default {DENSITY}, or the highest of the patterns where all have their size)",
    )
    parser.add_argument(
        "--length",
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens of a window (default 2048, or what the model was trained for where that is less)",
    )
    parser.add_argument(
        "--samples", "--windows", type=int, default=SAMPLES, metavar="K", help=f"windows (default {SAMPLES})"
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=QUERIES,
        metavar="N",
        help=f"drawn of each window, whose weights are looked at in every layer (default {QUERIES})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the draws, and of the masks of encoders (default 0)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_text_arguments(parser, SPLIT)
    # an adapter that was saved without a pattern can be analysed too: its model is read with dense attention
    parser.set_defaults(pattern=["full"])


def run(args: argparse.Namespace) -> None:
    with _named_as_options():
        _check(args)
    patterns = None if args.patterns is None else [_read(text) for text in args.patterns]
    documents, left_out = read_texts(args, SPLIT)

    from ..analyze import analyze
    from ..evaluate.processes import current_processes

    is_main = current_processes().is_main
    if left_out and is_main:
        print(f"note: {skipped_note(left_out)}", file=sys.stderr)
    model, tokenizer = load_model(args)
    with _named_as_options():
        found = analyze(
            model,
            documents,
            patterns,
            args.density,
            tokenizer=tokenizer,
            length=args.length,
            samples=args.samples,
            queries=args.queries,
            seed=args.seed,
            progress=not args.quiet,
        )
    if not is_main:
        return
    print(f"{args.model}, {found.config['dtype']} on {found.machine['device']}")
    print(found.table())
    if args.output is not None:
        written = found.save(args.output, overwrite=args.overwrite)
        print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what would fail after the model is loaded; leave nothing behind."""
    from ..analyze.save import check_can_be_saved
    from ..evaluate.method import check_seed

    check_density(args.density)
    check_seed(args.seed)
    for name, least in (("samples", 1), ("queries", 1), ("length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be >= {least}, got {value}")
    if args.output is not None:
        check_can_be_saved("--output", args.output, args.overwrite)
    elif args.overwrite:
        raise ValueError("--overwrite is about the output folder; name one with --output DIR")


def _read(text: str) -> Pattern | Scaled:
    """Return the pattern that `text` stands for, its size to be fitted where it has one and none is given.

    Raises:
        ValueError: an unknown pattern or option, a value that is none of the option, or a file that holds no pattern.
    """
    pattern = read_candidate(text)
    if is_pattern_file(text) or "|" in text:
        return pattern
    name, given = split_options(text)
    if name not in SIZES or SIZES[name].option in given:
        return pattern
    return Scaled(name, {option: getattr(pattern, option) for option in given})


_ARGUMENT = re.compile(r"(?<![\w-])(density|length|samples|queries|seed)(?:=([\d.e-]*\d)| (?=must be ))")


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    """Let a ValueError raised inside the block name the options of the command line, not the arguments they became."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_ARGUMENT.sub(lambda found: f"--{found[1]} {found[2] or ''}", str(error))) from None
