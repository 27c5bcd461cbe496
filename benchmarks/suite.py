"""What a run of the suite consists of: its settings, its cells, and the order in which they are measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_sparse.backends import check_backend

from .cases import LABELS, Case, find_cases
from .goals import goal_for, main_labels
from .peers import PEER_NAMES, PEERS, Peer
from .task import Shape

K = 1024
MEASURES = ("forward", "backward", "decode", "memory", "prefill")
# Lengths where none are given: of patterns with a goal, of encoders' forms of them, and of the others.
_CPU = (K, 4 * K, 16 * K, 32 * K)
_CUDA = (4 * K, 16 * K, 64 * K, 128 * K)
_SOME = {"forward": (4 * K, 16 * K), "backward": (4 * K, 16 * K)}
_ONE = {"forward": (16 * K,), "backward": (16 * K,)}
LENGTHS: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "cpu": {
        "main": {"forward": _CPU, "backward": _CPU, "decode": (32 * K,)}
        | {"memory": (16 * K,), "prefill": (4 * K, 16 * K)},
        "both sides": _SOME,
        "rest": _ONE | {"decode": (32 * K,)},
    },
    "cuda": {
        "main": {"forward": _CUDA, "backward": _CUDA, "decode": (16 * K, 64 * K, 128 * K)}
        | {"memory": (64 * K,), "prefill": (16 * K, 64 * K)},
        "both sides": _SOME,
        "rest": _ONE | {"decode": (64 * K,)},
    },
}
PEER_LENGTHS = (4 * K, 16 * K)
PREFILLED = 3  # patterns of the whole-model measure where no lengths are given
QUICK = {"cpu": (K, 4 * K), "cuda": (4 * K, 16 * K)}
# The lengths that have goals, the most telling first; others follow in ascending order.
FIRST = {"cpu": (16 * K, 32 * K, 4 * K, 8 * K), "cuda": (16 * K, 64 * K, 4 * K, 128 * K)}


@dataclass(frozen=True)
class Suite:
    """The settings of one run.

    lengths: None takes those of LENGTHS. missing: cells that this code has measured on this machine are left out.
    """

    shape: Shape
    lengths: tuple[int, ...] | None
    cases: tuple[Case, ...]
    main: set[str]
    measures: tuple[str, ...]
    backends: tuple[str, ...]
    peers: tuple[Peer, ...]
    peers_for_all: bool
    repeats: int
    minutes: float | None
    missing: bool
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
    rest = tuple(case for case in suite.cases if case not in main and case.causal)
    causal = tuple(case for case in main if case.causal)
    both_sides = tuple(case for case in suite.cases if not case.causal)
    operator = [m for m in ("forward", "backward") if m in suite.measures]
    late = suite.minutes is not None
    first = bool(suite.peers) and not late
    yield from _stage(suite, "main", causal, operator, with_peers=first)
    yield from _stage(suite, "main", causal, [m for m in suite.measures if m not in operator])
    yield from _stage(suite, "both sides", both_sides, operator, with_peers=first)
    yield from _stage(suite, "rest", rest, list(suite.measures))
    if late and suite.peers:
        again = [*_stage(suite, "main", causal, operator, with_peers=True)]
        again += _stage(suite, "both sides", both_sides, operator, with_peers=True)
        yield from (unit for unit in again if unit.with_peers)


def _stage(
    suite: Suite, stage: str, cases: tuple[Case, ...], measures: list[str], *, with_peers: bool = False
) -> Iterator[Unit]:
    """Yield the units of some measures: forward and backward length by length, others measure by measure."""
    causal = stage != "both sides"
    together = [[m for m in measures if m in ("forward", "backward")]]
    together += [[m] for m in MEASURES if m in measures and m not in together[0]]
    for group in together if cases else ():
        for n in _ordered({n for m in group for n in _lengths_of(suite, stage, m)}, suite.kind):
            for measure in group:
                if n not in _lengths_of(suite, stage, measure):
                    continue
                compared = suite.lengths is not None or n in PEER_LENGTHS
                some = cases[:PREFILLED] if measure == "prefill" and suite.lengths is None else cases
                yield Unit(measure, n, causal, some, with_peers and compared)
            # Only these: a pattern whose plan sends lists to the device cannot be captured.
            graphed = tuple(case for case in cases if goal_for(suite.kind, "decode", case.label, n))
            if group == ["decode"] and suite.kind == "cuda" and graphed:
                yield Unit("decode", n, causal, graphed, graphed=True)


def _lengths_of(suite: Suite, stage: str, measure: str) -> tuple[int, ...]:
    if suite.lengths is None:
        return LENGTHS[suite.kind][stage].get(measure, ())
    return tuple(sorted(suite.lengths)[-2:]) if measure == "memory" else suite.lengths


def _ordered(lengths: set[int], kind: str) -> list[int]:
    first = [n for n in FIRST[kind] if n in lengths]
    return first + [n for n in sorted(lengths) if n not in first]


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
    made.add_argument(
        "--lengths",
        type=_lengths,
        help="tokens, comma-separated; 16K is 16384; by default those that README.md names for each measure",
    )
    made.add_argument("--measures", default=",".join(MEASURES), help="comma-separated; default %(default)s")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="CPU float32, CUDA bfloat16"
    )
    made.add_argument("--heads", type=int, help="query heads; CPU 8, CUDA 32")
    made.add_argument("--kv-heads", type=int, help="key and value heads; CPU as --heads, CUDA 8")
    made.add_argument("--head-dim", type=int, help="CPU 64, CUDA 128")
    made.add_argument(
        "--repeats", type=int, help="rounds; medians are reported; CPU 5, CUDA 7, with --quick 3"
    )
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
        "--missing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out what the file of results has already, measured with exactly this code on this kind of machine",
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
    repeats = (3 if args.quick else 7 if gpu else 5) if args.repeats is None else args.repeats
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
        lengths=tuple(args.lengths) if args.lengths else QUICK[device.type] if args.quick else None,
        cases=tuple(find_cases(wanted, main)),
        main=main,
        measures=measures,
        backends=tuple(check_backend(name) for name in args.backends.split(",")),
        peers=_peers(args.peers),
        peers_for_all=args.peers is not None and args.peers != "none",
        repeats=repeats,
        minutes=args.minutes,
        missing=args.missing,
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
