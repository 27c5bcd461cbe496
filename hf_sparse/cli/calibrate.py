"""hf-sparse calibrate: a pattern file for a model, found by measuring on texts which units need which pattern."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import BACKENDS, check_backend
from ..calibrate import SCORES
from ..calibrate.costs import MEASURES
from ..calibrate.objective import KINDS as OBJECTIVES
from ..calibrate.request import BEYOND, KEYS, SINKS, STAGES, Search, check_share
from ..calibrate.run import SAMPLES
from ..calibrate.scores.base import score_class
from ..calibrate.units import KINDS as UNITS
from .candidates import read_candidate
from .models import add_model_arguments, load_model
from .named import read_named
from .texts import add_text_arguments, read_texts, skipped_note

if TYPE_CHECKING:
    from ..calibrate import Calibration

SPLIT = "validation"  # the test split is what the pattern is to be measured on
_RESCORE: dict[str, bool | str] = {"stage": True, "change": "unit", "once": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, control=False)
    parser.add_argument(
        "--output", required=True, metavar="FILE.json", help="where the pattern goes, for --pattern FILE.json"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="folder for calibration.json, frontier.csv and the figures from which an interrupted calibration goes on "
        "when the same is run again, with another --budget too (default: FILE.calibration, beside FILE.json)",
    )
    parser.add_argument("--plot", action="store_true", help="also draw frontier.png and units.png into DIR")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew where DIR holds another calibration, and replace a FILE.json that no calibration wrote",
    )
    parser.add_argument(
        "--candidates",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        help="what a unit may run besides dense attention, may be repeated: NAME, NAME:OPTION=VALUE,... such as "
        "streaming_llm:window=128,sinks=4, a union of these in quotes, or a JSON file "
        f"(default: streaming_llm with {SINKS} sinks and windows of "
        f"{', '.join(str(keys - SINKS) for keys in KEYS)}, up to half of --length)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.25,
        metavar="X",
        help="share of what the dense model costs (default 0.25)",
    )
    parser.add_argument(
        "--of",
        choices=tuple(MEASURES),
        default="density",
        help=f"what the budget counts: {'; '.join(f'{name}, {what}' for name, what in MEASURES.items())}",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="for how many the cost is counted (default: --length)"
    )
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="head",
        help="what gets a pattern of its own; kv_head (with the query heads that share it) saves memory of the cache "
        "(default head)",
    )
    _add_measuring(parser)
    add_text_arguments(parser, SPLIT)
    # an adapter that was saved without a pattern can be calibrated too
    parser.set_defaults(pattern=["full"])


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is measured")
    group.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a window (default 2048, or what the model was trained for where that is less)",
    )
    group.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"windows (default {SAMPLES})"
    )
    group.add_argument(
        "--score",
        default="gate_gradient",
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"what says which unit gains: {', '.join(SCORES)} (default gate_gradient)",
    )
    group.add_argument(
        "--rescore",
        choices=tuple(_RESCORE),
        help="when the score is taken anew (default: at every stage, where the score can change)",
    )
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="loss",
        help="loss, nats per token (default), or kl, the divergence from the dense model",
    )
    group.add_argument(
        "--stages",
        type=int,
        default=STAGES,
        metavar="N",
        help=f"choices measured on the way to the budget (default {STAGES})",
    )
    group.add_argument(
        "--beyond",
        type=int,
        default=BEYOND,
        metavar="N",
        help=f"and from there to dense (default {BEYOND})",
    )
    group.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default auto)")
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute every layer again in the backward pass: less memory, a third more time",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the masks of encoders (default 0)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    report = Path(args.output).with_suffix(".calibration") if args.report is None else Path(args.report)
    candidates = [read_candidate(text) for text in args.candidates or ()]
    score, rescore = read_named(args.score, score_class), _RESCORE.get(args.rescore)
    with _named_as_options():
        _check(args, report)
        Search.of(score, rescore, args.stages, args.beyond)
    documents, left_out = read_texts(args, SPLIT)

    from ..calibrate import calibrate
    from ..calibrate.table import table
    from ..evaluate.processes import current_processes

    is_main = current_processes().is_main
    if left_out and is_main:
        print(f"note: {skipped_note(left_out)}", file=sys.stderr)
    model, tokenizer = load_model(args)
    with _named_as_options(), _saying_how_to_go_on(report):
        result = calibrate(
            model,
            documents,
            candidates or None,
            args.budget,
            args.unit,
            tokenizer=tokenizer,
            of=args.of,
            tokens=args.tokens,
            length=args.length,
            samples=args.samples,
            score=score,
            rescore=rescore,
            objective=args.objective,
            stages=args.stages,
            beyond=args.beyond,
            backend=args.backend,
            checkpointing=args.checkpointing,
            seed=args.seed,
            output=report,
            overwrite=args.overwrite,
            progress=not args.quiet,
            announce=lambda text: print(text, file=sys.stderr),
        )
    if not is_main:
        return
    print(f"{args.model}, {result.config['dtype']} on {result.machine['device']}")
    print(table(result))
    _save(result, args, report)


def _check(args: argparse.Namespace, report: Path) -> None:
    """Raise ValueError for what would fail after the model is loaded; leave nothing behind."""
    from ..evaluate.method import check_seed
    from ..evaluate.output_folder import check_output_folder

    check_share(args.budget)
    check_backend(args.backend)
    check_seed(args.seed)
    for name, least in (("samples", 1), ("length", 2), ("tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be >= {least}, got {value}")
    if args.plot:
        from ..evaluate.plot import check_plot

        check_plot()
    output = Path(args.output)
    if output.suffix.lower() != ".json":
        raise ValueError(f"--output must end in .json, as --pattern knows files by that; got {args.output}")
    if output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; name a file in it")
    check_output_folder("--output", output.parent)
    check_output_folder("--report", report)
    if output.exists() and not args.overwrite and not report.exists():
        raise ValueError(
            f"--output {args.output} exists, and no calibration beside it ({report}); name another file, or replace it "
            "with --overwrite"
        )


def _save(result: Calibration, args: argparse.Namespace, report: Path) -> None:
    from ..calibrate.save import save_calibration
    from ..hf import save_pattern

    written = save_calibration(result, report, pictures=args.plot)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    written.insert(0, save_pattern(result.pattern, args.output))
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    adapter = ["--adapter", args.adapter] if args.adapter else []
    command = ["hf-sparse", "eval", args.model, *adapter, "--pattern", os.fspath(args.output)]
    print(f"next: {shlex.join(command)}", file=sys.stderr)


@contextlib.contextmanager
def _saying_how_to_go_on(report: Path) -> Iterator[None]:
    """Say on stderr what an interrupted calibration leaves."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"note: {report} keeps every figure so far; run the same again to go on", file=sys.stderr)
        raise


_ARGUMENT = re.compile(
    r"(?<![\w-])(budget|unit|of|tokens|length|samples|score|rescore|objective|stages|beyond|checkpointing|seed)"
    r"(?:=(\d[\d.e-]*\d|\d|'\w+'|True|False)| (?=must be ))"
)


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    """Let a ValueError raised inside the block name the options of the command line, not the arguments they became."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_ARGUMENT.sub(_as_option, str(error))) from None


def _as_option(argument: re.Match[str]) -> str:
    name, value = argument[1], (argument[2] or "").strip("'")
    if name == "checkpointing":
        return "no --checkpointing"
    if name == "rescore":
        value = {str(known): spelled for spelled, known in _RESCORE.items()}.get(value, value)
    return f"--{name} {value}"
