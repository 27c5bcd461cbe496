"""hf-sparse probe: what a model still finds in a long text, dense and sparse, on the same samples."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..documents import iter_documents
from .measuring import add_measuring_arguments, check_measuring, saved_pattern
from .models import CONTROL, add_model_arguments, load_model
from .named import read_named
from .options import add_pattern_options
from .spelling import read_patterns

if TYPE_CHECKING:
    from ..evaluate.probes import Probe

DEFAULT_PROBES = ["passkey", "copy"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_measuring_arguments(parser, resolved_for="the longest", seed="samples and intervals")
    parser.add_argument(
        "--probe",
        metavar="NAME[:OPTION=VALUE,...]",
        action="append",
        help="passkey, needle, needle_multikey, variables or copy, may be repeated (default passkey and copy); with "
        "options such as passkey:wording=prose,digits=7 or copy:block=64",
    )
    parser.add_argument(
        "--lengths",
        type=_whole_numbers,
        default="512,1024,2048",
        metavar="N,N,...",
        help="tokens of a sample (default 512,1024,2048)",
    )
    parser.add_argument(
        "--depths",
        type=_numbers,
        default="0,0.25,0.5,0.75,1",
        metavar="X,X,...",
        help="where in the text the fact lies, 0 (begin) to 1 (right before the question; default 0,0.25,0.5,0.75,1)",
    )
    parser.add_argument(
        "--distances",
        type=_whole_numbers,
        metavar="N,N,...",
        help="of copy: tokens back to the original (default: the powers of two that fit every length)",
    )
    parser.add_argument(
        "--samples", type=int, default=20, metavar="N", help="of each probe, length and place (default 20)"
    )
    parser.add_argument(
        "--haystack",
        metavar="FILE|FOLDER",
        nargs="+",
        action="extend",
        help="texts that hide the facts (default: a few sentences, repeated)",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples at once (default 1)")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens fed at a time, with a cache")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for probe.json, probe.csv and probe_samples.jsonl"
    )
    parser.add_argument("--plot", action="store_true", help="also draw a picture per probe into DIR")
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    probes = [read_probe(text) for text in args.probe or DEFAULT_PROBES]
    _check(args)
    patterns: list[Any] = list(read_patterns(args.pattern, args, max(args.lengths)))
    haystack = None if args.haystack is None else list(iter_documents(args.haystack))

    from ..evaluate.probes import as_json, probe, probe_table, save_probes
    from ..evaluate.processes import current_processes

    model, tokenizer = load_model(args)
    patterns = patterns or saved_pattern(model, args.backend)
    result = probe(
        model,
        tokenizer,
        probes,
        lengths=args.lengths,
        depths=args.depths,
        distances=args.distances,
        samples=args.samples,
        haystack=haystack,
        patterns=patterns,
        backend=args.backend,
        seed=args.seed,
        without_adapter=hasattr(model, "disable_adapter"),
        control=CONTROL if args.control else None,
        batch_size=args.batch_size,
        prefill_chunk=args.prefill_chunk,
        output=args.output,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if not current_processes().is_main:
        return
    print(f"{args.model}, {result.config['dtype']} on {result.machine['device']}")
    print(probe_table(as_json(result)))
    if args.output:
        written = save_probes(result, args.output, pictures=args.plot)
        print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


def read_probe(text: str) -> Probe:
    """Return the probe that ``name`` or ``name:option=value,...`` stands for.

    Raises:
        ValueError: an unknown probe or option, or a value that is none of the option.
    """
    from ..evaluate.probes import probe_class

    return read_named(text, probe_class)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that cannot be, before the model is loaded."""
    check_measuring(args, pictures=("plot",))
    if (shortest := min(args.lengths)) < 1:
        raise ValueError(f"--lengths must be >= 1, got {shortest}")
    for flag in ("samples", "batch_size", "prefill_chunk"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be >= 1, got {value}")
