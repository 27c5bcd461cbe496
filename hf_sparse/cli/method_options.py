"""How perplexity is measured, on the command line: the settings of `evaluate.method.Method`."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import Any

MODES = ("full", "strided", "rolling")

_FLAGS = {
    "max_length": "--length",
    "stride": "--step",
}  # of settings that are called otherwise; the rest is spelled alike
# A plain word is a setting only where a sentence names one: patterns have options of their own.
_SETTING = re.compile(
    r"(?:(?<![\w./(-])(max_length|bos_each_window|context_targets|key_tokens|mask_share|batch_size"
    r"|prefill_chunk)\b(?!\.\w)"
    r"|(?:(?<=with )|(?<=got )|(?<=use )|^)(stride|mode|bos|contexts)(?==| must | has ))(=(?:(?:True|False)\b)?)?"
)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is measured")
    group.add_argument(
        "--mode",
        choices=MODES,
        default="full",
        help="full: one pass over each document, cut to --length (default); strided: overlapping windows of --length "
        "over whole documents; rolling: disjoint ones, as lm-evaluation-harness",
    )
    group.add_argument(
        "--length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens that are read at once (default 2048); full cuts documents to it",
    )
    group.add_argument(
        "--step", type=int, metavar="N", help="tokens between strided windows (default: half of --length)"
    )
    group.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin each document with the BOS token, else EOS (default yes)",
    )
    group.add_argument(
        "--bos-each-window",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin later windows with it too, as sinks want it (default: yes for strided, no for rolling)",
    )
    group.add_argument(
        "--contexts",
        type=_lengths,
        default=(),
        metavar="N,N,...",
        help="score the same last tokens of each document from so many tokens: a curve of loss by context",
    )
    group.add_argument(
        "--context-targets",
        type=int,
        default=256,
        metavar="N",
        help="tokens scored for a point of that curve (default 256)",
    )
    group.add_argument(
        "--key-tokens",
        type=int,
        metavar="N",
        help="also score the tokens that dense attention predicts from the whole text, but not from N tokens (LongPPL)",
    )
    group.add_argument(
        "--mask-share",
        type=float,
        default=0.15,
        metavar="X",
        help="encoders: share of the tokens masked at once (default 0.15)",
    )
    group.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="windows in one forward pass (default 1)"
    )
    group.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="feed windows N tokens at a time, the earlier ones in the cache, in less memory "
        "(default: 8,192 at a time under a pattern in windows above 32,768)",
    )


def method_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `perplexity` that those options are.

    Raises:
        ValueError: settings that cannot work, named as on the command line.
    """
    from ..evaluate.method import Method, as_contexts

    given = {
        "max_length": args.length,
        "mode": args.mode,
        "stride": args.step,
        "bos": args.bos,
        "bos_each_window": args.bos_each_window,
        "contexts": as_contexts(args.contexts),
        "context_targets": args.context_targets,
        "key_tokens": args.key_tokens,
        "mask_share": args.mask_share,
        "batch_size": args.batch_size,
        "prefill_chunk": args.prefill_chunk,
    }
    with named_as_options():
        Method(**given)
    return given


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Let a ValueError raised inside the block name the options of the command line, not the arguments they became."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_SETTING.sub(_as_option, str(error))) from None


def _as_option(setting: re.Match[str]) -> str:
    name = setting[1] or setting[2]
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    ends = {"=": f"{flag} ", "=True": flag, "=False": flag.replace("--", "--no-", 1)}
    return ends.get(setting[3], flag)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 512,1024,2048") from None
