"""hf-sparse show: what a pattern lets each token see, as text and as a PNG, and what it costs."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Any

from ..patterns import Pattern, check_predicate
from ..patterns.full import Full
from ..selectors import Selector, divided
from ..selectors.blocks import ListSelector, query_blocks
from .figures import DTYPE_BYTES, Layer, cost_table
from .options import add_pattern_options
from .picture import dense_pairs, head_groups, picture
from .spelling import PATTERN_HELP, read_patterns
from .values import read_value

LONGEST_TEXT = 128  # tokens; wider pictures do not fit a screen
LONGEST_PNG = 512
HEADS = 8  # where no number is given
MOST = 2**25  # heads * tokens * tokens that are drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="PATTERN", help=PATTERN_HELP)
    parser.add_argument(
        "--length",
        type=int,
        default=24,
        metavar="N",
        help=f"tokens drawn (default 24), at most {LONGEST_TEXT} as text and {LONGEST_PNG} in a PNG",
    )
    parser.add_argument(
        "--lengths",
        default="1024,4096,16384",
        metavar="N,N,...",
        help="tokens at which the cost is counted (default 1024,4096,16384)",
    )
    parser.add_argument(
        "--heads",
        type=_heads,
        metavar="H",
        help=f"query heads of the layer (default {HEADS}, or what the pattern needs)",
    )
    parser.add_argument(
        "--kv-heads", type=int, metavar="H", help="heads of keys and values (default: as --heads)"
    )
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size (default 64)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPE_BYTES), default="float32", help="of keys and values (default float32)"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="L", help="index of the layer (default 0)")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="resolve options that adapt to the length for this many tokens, as patch_model(seq_len=N) does",
    )
    parser.add_argument(
        "--bidirectional", action="store_true", help="as in an encoder: later tokens are seen too"
    )
    parser.add_argument(
        "--png", metavar="FILE", help="also draw the picture into this PNG (needs matplotlib)"
    )
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    lengths = _lengths(args.lengths)
    _check_numbers(args)
    (chosen,) = read_patterns([args.pattern], args)
    pattern, notes = (chosen, []) if isinstance(chosen, Pattern) else _of_layer(chosen, args.layer)
    if args.seq_len is not None:
        pattern = pattern.resolve(args.seq_len)
    heads = _fitting_heads(pattern, args.heads, args.layer)
    layer = _layer(args, heads)
    if heads * args.length**2 > MOST:
        raise ValueError(
            f"{heads} heads of {args.length} tokens are too many to draw; use fewer --heads or a smaller --length"
        )
    check_predicate(pattern, heads, layer.causal, args.layer + 1)
    drawn, selector, _ = divided(pattern, args.layer)
    if selector is not None:
        notes.append(_selected(selector, args.length, layer.causal))
    groups = head_groups(drawn, args.length, heads=heads, causal=layer.causal, layer=args.layer)
    if pattern.per_layer:
        notes.append(f"layer {args.layer}; the others may differ (--layer)")
    if pattern.global_token_ids:
        notes.append("tokens that are global by their id are not drawn: where they lie, only the input says")
    kept = sum(group.pairs * len(group.heads) for group in groups) / heads
    dense = dense_pairs(args.length, layer.causal)
    count = f"{kept:,.1f}".removesuffix(".0")
    if kept == dense and pattern != Full():
        notes.append(
            f"at {args.length} tokens it leaves nothing out; give it smaller options, or draw more tokens (--length)"
        )
    kind = "causal" if layer.causal else "bidirectional"
    mean = " per head" if len(groups) > 1 else ""
    summary = f"{kind}: {count} of {dense:,} pairs{mean}, density {kept / dense:.1%} at {args.length} tokens"
    if args.length <= LONGEST_TEXT:
        print(picture(groups, args.length, layer.causal), end="\n\n")
    print(f"{pattern}, {summary}")
    for note in notes:
        print(note)
    if args.png:
        from .painting import paint

        named = f", layer {args.layer}" if pattern.per_layer else ""
        paint(
            groups,
            pattern,
            args.png,
            heads=heads,
            causal=layer.causal,
            layer=args.layer,
            note=f"{kind}, {args.length} tokens{named}, density {kept / dense:.1%}",
        )
        print(f"drawn: {args.png}")
    print(f"\n{cost_table(pattern, lengths, layer)}")


def _selected(selector: Selector, length: int, causal: bool) -> str:
    """Return what to say of blocks that are read by their content, which no picture can show."""
    if not causal:
        raise ValueError(f"{selector} selects for causal attention; leave out --bidirectional")
    if not isinstance(selector, ListSelector):
        count = selector.most_pairs(length - 1, length)
        return f"drawn is what it always keeps; by their content the last query reads up to {count} keys more"
    blocks = query_blocks(selector, length - 1, length)
    count = int(blocks.counts[-1])
    return (
        f"drawn is what it always keeps; by their content the last query reads {count} more of "
        f"{int(blocks.high[-1] - blocks.low[-1])} blocks of {selector.block} tokens"
    )


def _heads(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number, got {text!r}; an option of the pattern that is called heads is --pattern-heads"
        ) from None


def _of_layer(settings: Any, layer: int) -> tuple[Pattern, list[str]]:
    """Return what a layer of a model with these settings runs, and what to say of the others."""
    if settings.layers is None:
        return settings.pattern, []
    which = ", ".join(map(str, settings.layers))
    return settings.pattern_at(layer), [
        f"layer {layer}; the pattern is in layers {which}, the others are dense"
    ]


def _layer(args: argparse.Namespace, heads: int) -> Layer:
    kv_heads = heads if args.kv_heads is None else args.kv_heads
    if heads % kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    return Layer(heads, kv_heads, args.head_dim, args.dtype, not args.bidirectional, args.layer)


def _fitting_heads(pattern: Pattern, wanted: int | None, layer: int) -> int:
    """Return the number of heads to draw: the one asked for, or else the first that the pattern fits.

    A pattern with one entry per layer fits one number of layers, which nobody was asked for: all are tried.

    Raises:
        ValueError: it fits no model with so many heads and a layer of this index.
    """
    refusals: list[str] = []
    for heads in (HEADS, *range(1, 129)) if wanted is None else (wanted,):
        for layers in range(layer + 1, layer + 257):
            try:
                pattern.check_fit(heads, layers)
            except ValueError as error:
                refusals.append(str(error))
            else:
                return heads
            if not pattern.per_layer:
                break
    # What is wrong at every number of layers says nothing; the reason is what was wrong where the number fitted.
    kinds = [re.sub(r"\d+", "0", text) for text in refusals]
    counts = Counter(kinds)
    raise ValueError(min(zip(refusals, kinds, strict=True), key=lambda pair: counts[pair[1]])[0])


def _lengths(text: str) -> list[int]:
    lengths = read_value("--lengths", text, tuple[int, ...])
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths must be numbers of tokens >= 1 such as 1024,4096, got {text!r}")
    return list(dict.fromkeys(lengths))


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that mean nothing, and for a PNG that could not be written."""
    longest = LONGEST_PNG if args.png else LONGEST_TEXT
    if not 1 <= args.length <= longest:
        more = "" if args.png else f" (up to {LONGEST_PNG} with --png FILE)"
        raise ValueError(f"--length must be between 1 and {longest} tokens{more}, got {args.length}")
    for flag in ("heads", "kv_heads", "head_dim", "seq_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be >= 1, got {value}")
    if args.layer < 0:
        raise ValueError(f"--layer must be >= 0 (0 is the lowest), got {args.layer}")
    if args.png:
        from .painting import check_png

        check_png(args.png)
