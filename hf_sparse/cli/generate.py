"""hf-sparse generate: stream what a model writes after a prompt, or talk with it, in bounded memory."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from ..documents import read_text_file, refuse_empty
from ..hf import SparseSettings, patch_model, settings
from ..patterns import Pattern
from ..patterns.streaming_llm import StreamingLLM
from .models import add_model_arguments, load_model
from .options import add_pattern_options, given_options
from .running_text import CACHES, RunningText, Writing
from .spelling import PATTERN_HELP, read_patterns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, control=False)
    parser.add_argument(
        "--pattern",
        metavar="PATTERN",
        action="append",
        default=[],
        help="pattern to run (default: the one the model or adapter was saved with; full is dense): "
        f"{PATTERN_HELP}; streaming_llm runs with --positions cache unless told otherwise".replace("%", "%%"),
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to go on with, as it is")
    prompt.add_argument("--file", metavar="FILE", help="UTF-8 file with the text to go on with")
    parser.epilog = (
        "Without --prompt and --file the prompt is what is piped in; in a terminal a dialogue begins, in the "
        "tokenizer's chat template where it has one, else each line is added to the text. Ctrl-C stops an answer, "
        "/exit or Ctrl-D ends."
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (default 256)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample at this temperature (default 1)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of sampling; without any of these four the likeliest token is taken",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="read prompts N tokens at a time (default: all at once)",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default="sparse",
        help="sparse holds what the pattern leaves to be seen (default), dynamic every token, static every token in "
        "memory that is set aside before; the text is the same",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--stats", action="store_true", help="speed and cache on stderr while the text is written"
    )
    amount.add_argument("--quiet", action="store_true", help="no line on speed and cache")
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    pattern = _pattern(args)
    writing = Writing(_generate_settings(args), args.cache, args.stats, args.quiet)
    prompt = _prompt(args)
    if prompt is None and args.cache == "static":
        raise ValueError(
            "--cache static is as long as one answer needs and a dialogue has no end; use sparse or dynamic"
        )

    model, tokenizer = load_model(args)
    _patch(model, pattern, args.model)
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    text = RunningText(model, tokenizer, writing)
    if prompt is None:
        from .dialogue import talk

        talk(text)
        return
    ids = text.encode(prompt)
    if not ids:
        raise ValueError(
            "the prompt is empty and the tokenizer has no BOS token to begin with; give some text"
        )
    text.go_on(ids)


def _pattern(args: argparse.Namespace) -> Pattern | SparseSettings | None:
    """Return the pattern asked for, None for the saved one; streaming_llm has places in the cache unless told."""
    found = read_patterns(args.pattern, args)
    if len(found) > 1:
        raise ValueError(
            f"generate runs one pattern, got {len(found)} of --pattern; join them as in 'a|b', or name one"
        )
    if not found:
        return None
    named = args.pattern[0].strip() == StreamingLLM.name
    if named and isinstance(found[0], StreamingLLM) and "positions" not in given_options(args):
        return dataclasses.replace(found[0], positions="cache")
    return found[0]


def _patch(model: Any, pattern: Pattern | SparseSettings | None, name: str) -> None:
    if pattern is None:
        if settings(model) is None:
            raise ValueError(
                f"{name} was saved without a pattern; name one with --pattern, or --pattern full for dense attention"
            )
    else:
        try:
            patch_model(model, pattern)
        except ValueError as error:  # said in the words of the command line
            raise ValueError(str(error).replace("positions='absolute'", "--positions absolute")) from None


def _prompt(args: argparse.Namespace) -> str | None:
    """Return the text to go on with, None for a dialogue.

    Raises:
        ValueError: it is not UTF-8, or the file cannot be read or is empty.
    """
    if args.file is not None:
        document = read_text_file(args.file)
        refuse_empty([document])
        return document.text
    if args.prompt is None and sys.stdin.isatty():
        return None
    try:
        if args.prompt is None:
            return sys.stdin.buffer.read().decode("utf-8-sig")
        args.prompt.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"the prompt is not UTF-8 ({error.reason}); convert it first") from None
    return str(args.prompt)


def _generate_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of generate; ValueError for numbers that mean nothing."""
    for flag, least in (("max_new_tokens", 1), ("prefill_chunk", 1), ("top_k", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} must be >= {least}, got {value}")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(
            f"--temperature must be > 0, got {args.temperature}; leave sampling out to get the likeliest tokens"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be > 0 and <= 1, got {args.top_p}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")
    found: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "prefill_chunk_size": args.prefill_chunk}
    if all(value is None for value in (args.temperature, args.top_p, args.top_k, args.seed)):
        return found | {"do_sample": False}
    # Of these what is not given does nothing, whatever the model was saved with.
    return found | {
        "do_sample": True,
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "top_k": 0 if args.top_k is None else args.top_k,
    }
