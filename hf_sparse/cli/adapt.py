"""hf-sparse adapt: a LoRA adapter that recovers what a pattern costs, without a recipe and its YAML."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from typing import Any

from ..documents import Texts
from ..hf.pattern_file import is_pattern_file
from .adaptation_options import (
    adaptation_settings,
    add_adaptation_options,
    named_as_options,
    training_settings,
)
from .options import add_pattern_options, dashed, given_options, read_options
from .spelling import PATTERN_HELP, read_patterns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id or folder of the model that is adapted")
    parser.add_argument(
        "--pattern",
        metavar="PATTERN",
        required=True,
        help=f"what it is adapted to: {PATTERN_HELP}; options that adapt to the length are resolved for "
        "--length".replace("%", "%%"),
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        help="folder for the checkpoints; the finished adapter is in DIR/adapter",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in DIR, if there is one"
    )
    parser.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="score held-out texts, dense and sparse, every N steps (default: never)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_adaptation_options(parser)
    add_pattern_options(parser)
    parser.epilog = (
        "On several processes: accelerate launch -m hf_sparse.cli adapt MODEL ... "
        "(recipes/finetune_lora.py takes every setting of transformers' Trainer from a YAML file)."
    )


def run(args: argparse.Namespace) -> None:
    _check_schedule(args)
    _check_partners(args)
    with named_as_options():
        _check_texts(args)
    pattern = _pattern(args)

    import transformers

    from ..train import AdaptationArguments, SparseTrainingArguments, prepare
    from ..train import run as train
    from ..train.report import check_report_to, end_report, start_report

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with named_as_options(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
        arguments = AdaptationArguments(
            model=args.model, **pattern, plugin=args.plugin or None, **adaptation_settings(args)
        )
        training = SparseTrainingArguments(
            output_dir=args.output,
            resume_from_checkpoint="auto" if args.resume else None,
            eval_strategy="no" if args.eval_every is None else "steps",
            eval_steps=args.eval_every,
            disable_tqdm=args.quiet,
            **training_settings(args),
        )
        check_report_to(training)
        transformers.set_seed(training.seed)
        trainer = prepare(arguments, training)
        if trainer.is_world_process_zero():
            print(start_report(trainer, arguments), flush=True)
        try:
            folder = train(trainer)
        except KeyboardInterrupt:
            print(
                f"note: run the same with --resume to go on from the last checkpoint in {args.output}",
                file=sys.stderr,
            )
            raise
        if trainer.is_world_process_zero():
            print(end_report(folder, arguments.plugin))


def _pattern(args: argparse.Namespace) -> dict[str, Any]:
    """Return the pattern as `AdaptationArguments` takes it: its file, or its name with its options."""
    read_patterns([args.pattern], args)  # refuses what is unknown, in the words of the command line
    if is_pattern_file(args.pattern):
        return {"pattern": args.pattern}
    given = given_options(args)
    options = {name: read_options(name, given) for name in map(str.strip, args.pattern.split("|"))}
    own = options if len(options) > 1 else options[next(iter(options))]
    return {"pattern": " | ".join(options), "pattern_options": own}


def _check_texts(args: argparse.Namespace) -> None:
    """Raise ValueError for settings of the texts that contradict each other, in the words of the command line."""
    names = [field.name for field in dataclasses.fields(Texts) if field.name != "spelled"]
    Texts(**{name: getattr(args, name) for name in names}, spelled=lambda name: f"--{dashed(name)}")


def _check_schedule(args: argparse.Namespace) -> None:
    """Raise ValueError for steps that TrainingArguments takes for something else, and texts that go without them."""
    counts = {"steps": args.max_steps, "eval-every": args.eval_every, "save-every": args.save_steps}
    counts |= {"log-every": args.logging_steps, "keep": args.save_total_limit}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be >= 1, got {value}")
    if args.eval_text and args.eval_every is None:
        raise ValueError("--eval-text would never be read; say after how many steps each with --eval-every N")
    if args.eval_every is not None and not args.eval_text and (args.text or args.dataset):
        raise ValueError(
            f"--eval-every {args.eval_every} needs texts that are not trained on; name them with --eval-text"
        )
    steps, warmup = training_settings(args)["max_steps"], args.warmup_steps
    if warmup is not None and not 0 <= warmup < steps:
        raise ValueError(f"--warmup must be >= 0 and below the {steps} of --steps, got {warmup}")


def _check_partners(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would do nothing, as it belongs to one that is not given."""
    for name, wanted, flag in (
        ("hub_model_id", args.push_to_hub, "push-to-hub"),
        ("eval_documents", args.eval_every, "eval-every"),
        ("eval_length", args.eval_every, "eval-every"),
        ("narrow_share", args.narrow_from, "narrow-from"),
    ):
        if getattr(args, name) is not None and not wanted:
            raise ValueError(
                f"--{dashed(name)} goes with --{flag}, which is not given; give it, or leave it out"
            )
