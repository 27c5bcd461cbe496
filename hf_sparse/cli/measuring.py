"""What every command that measures a model has: patterns, a backend, a seed, and an output folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..backends import BACKENDS, check_backend
from .spelling import PATTERN_HELP


def add_measuring_arguments(parser: argparse.ArgumentParser, *, resolved_for: str, seed: str) -> None:
    """Give the parser --pattern, --backend, --overwrite, --seed and --quiet.

    Args:
        resolved_for: the length that options which adapt to it are resolved for.
        seed: what --seed is of.
    """
    parser.add_argument(
        "--pattern",
        metavar="PATTERN",
        action="append",
        default=[],
        help=f"pattern to measure, may be repeated (default: the one the model or adapter was saved with): "
        f"{PATTERN_HELP}; options that adapt to the length are resolved for {resolved_for}".replace(
            "%", "%%"
        ),
    )
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default auto)")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where DIR holds another evaluation"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help=f"of {seed} (default 0); what patterns draw hangs on --pattern-seed",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def check_measuring(args: argparse.Namespace, pictures: Sequence[str]) -> None:
    """Raise ValueError before the model is loaded for what would fail after; leave nothing behind.

    Args:
        pictures: the flags that need matplotlib.
    """
    check_backend(args.backend)
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")
    for flag in (*pictures, "overwrite"):
        if getattr(args, flag) and not args.output:
            raise ValueError(f"--{flag} is about the output folder; name one with --output DIR")
    if any(getattr(args, flag) for flag in pictures):
        from ..evaluate.plot import check_plot

        check_plot()
    if args.output is not None:
        from ..evaluate.output_folder import check_output_folder

        check_output_folder("--output", args.output)


def saved_pattern(model: Any, backend: str) -> list[Any]:
    """Return the pattern that a model was saved with, if any, on the backend asked for."""
    from ..hf import settings

    saved = settings(model)
    if saved is None:
        return []
    return [saved if backend == "auto" else replace(saved, backend=backend)]
