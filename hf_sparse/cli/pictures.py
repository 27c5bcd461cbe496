"""hf-sparse patterns, hf-sparse show."""

from __future__ import annotations

import argparse

from ..patterns import Pattern, available_patterns, pattern_class
from .options import add_pattern_options, options_text, read_patterns

LONGEST = 128  # tokens; wider pictures do not fit a screen


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    if command == "show":
        parser.add_argument("pattern", metavar="PATTERN", help="name of a pattern; see: hf-sparse patterns")
        parser.add_argument(
            "--length", type=int, default=24, help=f"tokens drawn, 1 to {LONGEST} (default 24)"
        )
        parser.add_argument(
            "--bidirectional", action="store_true", help="as in an encoder: later tokens are seen too"
        )
        add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    if args.command == "patterns":
        print(catalogue())
        return
    if not 1 <= args.length <= LONGEST:
        raise ValueError(f"--length must be between 1 and {LONGEST} tokens, got {args.length}")
    (pattern,) = read_patterns([args.pattern], args)
    print(picture(pattern, args.length, causal=not args.bidirectional))


def catalogue() -> str:
    """Return one row per pattern: name, options with defaults, what it is."""
    names = available_patterns()
    rows = [(name, options_text(name), _summary(name)) for name in names]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {options:{widths[1]}}  {text}" for name, options, text in rows)


def picture(pattern: Pattern, length: int, causal: bool) -> str:
    """Return the mask as text, a row per query, and the share of pairs it keeps."""
    allowed = pattern.mask(length, causal=causal)[0]
    places = len(str(length - 1))
    lines = []
    if length > 10:
        tens = " ".join(str(key // 10) if key and key % 10 == 0 else " " for key in range(length))
        lines.append(f"{'':>{places + 5}}{tens}".rstrip())
    lines.append(f"{'key':<{places + 5}}" + " ".join(str(key % 10) for key in range(length)))
    for query, row in enumerate(allowed.tolist()):
        lines.append(f"{query:<{places + 5}}" + " ".join("x" if seen else "." for seen in row))
    dense = length * (length + 1) // 2 if causal else length * length
    kept = int(allowed.sum())
    kind = "causal" if causal else "bidirectional"
    lines += [
        "",
        f"{pattern}, {kind}: {kept} of {dense} pairs, density {kept / dense:.1%} at {length} tokens",
    ]
    return "\n".join(lines)


def _summary(name: str) -> str:
    text = (pattern_class(name).__doc__ or "").strip().splitlines()
    return text[0].replace("``", "") if text else ""
