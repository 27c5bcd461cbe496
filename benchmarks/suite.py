"""What a run of the suite consists of: its settings, its cells, and the order in which they are measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_sparse.backends import check_backend

from .cases import LABELS, Case, find_cases
from .goals import main_labels
from .peers import PEER_NAMES, PEERS, Peer
from .task import Shape

K = 1024
MEASURES = ("forward", "backward", "decode", "memory", "prefill")
LENGTHS = {
    "cpu": (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K),
    "cuda": (4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K),
}
QUICK = {"cpu": (K, 4 * K), "cuda": (4 * K, 16 * K)}
# The lengths that have goals, the most telling first; others follow in ascending order.
FIRST = {"cpu": (16 * K, 32 * K, 4 * K, 8 * K), "cuda": (16 * K, 64 * K, 4 * K, 128 * K)}


@dataclass(frozen=True)
class Suite:
    """The settings of one run."""

    shape: Shape
    lengths: tuple[int, ...]
    cases: tuple[Case, ...]
    main: set[str]
    measures: tuple[str, ...]
    backends: tuple[str, ...]
    peers: tuple[Peer, ...]
    peers_for_all: bool
    repeats: int
    minutes: float | None
    output: Path

    @property
    def kind(self) -> str:
        return self.shape.device.type


@dataclass(frozen=True)
class Unit:
    """Cells that are measured together, in turns, and written together."""

    measure: str
    length: int
    causal: bool
    cases: tuple[Case, ...]
    with_peers: bool = False
    graphed: bool = False

    def __str__(self) -> str:
        sides = "" if self.causal else ", both sides"
        graphed = ", CUDA graphs" if self.graphed else ""
        peers = ", with peers" if self.with_peers else ""
        return f"{self.measure} at {self.length} tokens{sides}{graphed}{peers} ({len(self.cases)} patterns)"


def units(suite: Suite) -> Iterator[Unit]:
    """Yield everything that a run measures, the most important first.

    Patterns with a goal come before the others, and peers are timed beside the former (beside all with `--peers`
    given). Under a time budget the peers come last.
    """
    main = tuple(case for case in suite.cases if case.label in suite.main or suite.peers_for_all)
    rest = tuple(case for case in suite.cases if case not in main)
    late = suite.minutes is not None
    yield from _stage(suite, main, with_peers=bool(suite.peers) and not late)
    yield from _stage(suite, rest, with_peers=False)
    if late and suite.peers:
        timed = [m for m in suite.measures if m in ("forward", "backward")]
        yield from _stage(suite, main, with_peers=True, measures=tuple(timed))


def _stage(
    suite: Suite, cases: tuple[Case, ...], *, with_peers: bool, measures: tuple[str, ...] | None = None
) -> Iterator[Unit]:
    first = [n for n in FIRST[suite.kind] if n in suite.lengths]
    ordered = first + [n for n in sorted(suite.lengths) if n not in first]
    one_way = tuple(case for case in cases if case.causal)
    taken = suite.measures if measures is None else measures
    for n in ordered if one_way else ():
        for measure in taken:
            if measure != "memory" or n in sorted(suite.lengths)[-2:]:
                yield Unit(measure, n, True, one_way, with_peers and measure in ("forward", "backward"))
            if measure == "decode" and suite.kind == "cuda":
                yield Unit(measure, n, True, one_way, graphed=True)
    both_sides = tuple(case for case in cases if not case.causal)
    for n in ordered if both_sides else ():
        for measure in taken:
            if measure in ("forward", "backward"):
                yield Unit(measure, n, False, both_sides, with_peers)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Sparse attention against dense attention and what people use today.",
    )
    made.add_argument(
        "--patterns",
        nargs="+",
        default=["all"],
        help=f"all, main (those with a goal), name(option=value) or labels: {', '.join(LABELS)}",
    )
    made.add_argument("--lengths", type=_lengths, help="tokens, comma-separated; 16K is 16384")
    made.add_argument("--measures", default=",".join(MEASURES), help="comma-separated; default %(default)s")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="CPU float32, CUDA bfloat16"
    )
    made.add_argument("--heads", type=int, help="query heads; CPU 8, CUDA 32")
    made.add_argument("--kv-heads", type=int, help="key and value heads; CPU as --heads, CUDA 8")
    made.add_argument("--head-dim", type=int, help="CPU 64, CUDA 128")
    made.add_argument("--repeats", type=int, help="rounds; medians are reported; 7, with --quick 3")
    made.add_argument("--backends", default="auto", help="ours, comma-separated; default auto")
    made.add_argument(
        "--peers",
        help=f"all, none, or comma-separated beginnings of: {'; '.join(PEER_NAMES)}. "
        "By default all of them beside the patterns with a goal; given, beside every pattern",
    )
    made.add_argument(
        "--minutes", type=float, help="begin nothing new after this time; the rest is listed as not run"
    )
    made.add_argument(
        "--quick", action="store_true", help="two lengths, patterns with a goal, no memory, no model"
    )
    made.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    return made


def read(args: argparse.Namespace) -> Suite:
    """Return the settings of a run.

    Raises:
        ValueError: an option that cannot be.
    """
    device = torch.device(args.device)
    if device.type not in LENGTHS:
        raise ValueError(f"--device must be cpu or cuda, got {args.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda finds no CUDA device; take --device cpu, or a torch built for CUDA")
    gpu = device.type == "cuda"
    heads = args.heads or (32 if gpu else 8)
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    kv_heads = args.kv_heads or (8 if gpu and args.heads is None else heads)
    if heads % kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    repeats = args.repeats or (3 if args.quick else 7)
    if repeats < 1:
        raise ValueError(f"--repeats must be >= 1, got {repeats}")
    measures = tuple(args.measures.split(","))
    if args.quick and args.measures == ",".join(MEASURES):
        measures = ("forward", "backward", "decode")
    if unknown := [m for m in measures if m not in MEASURES]:
        raise ValueError(f"unknown measure {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    main = main_labels(device.type)
    wanted = ["main"] if args.quick and args.patterns == ["all"] else args.patterns
    return Suite(
        shape=Shape(heads, kv_heads, args.head_dim or (128 if gpu else 64), dtype, device),
        lengths=tuple(args.lengths or (QUICK if args.quick else LENGTHS)[device.type]),
        cases=tuple(find_cases(wanted, main)),
        main=main,
        measures=measures,
        backends=tuple(check_backend(name) for name in args.backends.split(",")),
        peers=_peers(args.peers),
        peers_for_all=args.peers is not None and args.peers != "none",
        repeats=repeats,
        minutes=args.minutes,
        output=args.output,
    )


def _peers(wanted: str | None) -> tuple[Peer, ...]:
    if wanted is None or wanted == "all":
        return PEERS
    if wanted == "none":
        return ()
    starts = tuple(name for name in wanted.split(",") if name)
    for start in starts:
        if not any(peer.name.startswith(start) for peer in PEERS):
            raise ValueError(f"no peer's name begins with {start!r}; there are: {'; '.join(PEER_NAMES)}")
    return tuple(peer for peer in PEERS if peer.name.startswith(starts))


def _lengths(text: str) -> list[int]:
    found = []
    for word in text.split(","):
        number = word.strip().upper()
        scale = 1024 if number.endswith("K") else 1
        if not number.removesuffix("K").isdigit() or int(number.removesuffix("K")) < 1:
            raise argparse.ArgumentTypeError(
                f"lengths are whole numbers >= 1 such as 4096 or 4K, got {word!r}"
            )
        found.append(int(number.removesuffix("K")) * scale)
    return list(dict.fromkeys(found))
