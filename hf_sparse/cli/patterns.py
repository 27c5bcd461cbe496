"""hf-sparse patterns: the catalogue."""

from __future__ import annotations

import argparse

from ..patterns import available_patterns, pattern_class
from .options import options_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    print(catalogue())


def catalogue() -> str:
    """Return one line per pattern: name, what a query sees, options with defaults."""
    names = available_patterns()
    width = max(map(len, names))
    return "\n".join(f"{name:{width}}  {_summary(name)}  {options_text(name)}".rstrip() for name in names)


def _summary(name: str) -> str:
    text = (pattern_class(name).__doc__ or "").strip().splitlines()
    return text[0].replace("`", "") if text else ""
