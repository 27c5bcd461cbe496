"""Content-based patterns against dense attention: forward, forward + backward, a decoding step, the selection alone.

    python -m benchmarks.selection --threads 2
    python -m benchmarks.selection --lengths 16384 --decode 32768 --repeats 5 --output /tmp/selection

Every time holds the selection. A decoding step is the mean of the 64 steps up to a length, each of which selects what
is due: blocks that become whole are summarised, and a selection is made whenever a block of queries begins. What all
layers of a model share, the plan of what is always kept, is made before. Dense
attention is torch's scaled_dot_product_attention on the same tensors in the same run, one query over all keys for a
step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse import get_pattern
from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.selected import select_all
from hf_sparse.evaluate.machine import describe_machine
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.patterns import Pattern
from hf_sparse.plan import Segments
from hf_sparse.selectors import Index, divided

from .memory import ROOT
from .timing import Deadline, Failure, Reading, interleaved

STEPS = 64  # tokens of a text whose decoding steps are timed together
SIZE = 64  # of a head
HEADS = ((4, 4), (8, 2))  # query heads, key heads, of one pass
STEP_HEADS = ((8, 8), (8, 2))  # of a decoding step
CALLS: dict[str, dict[str, Any]] = {  # 16 blocks of 64 tokens, or as many tokens
    "topk_blocks": {"keep": 16},
    "quest": {"keep": 64, "query_block": 64},
    "threshold": {"keep": 16},
    "esa": {"keep": 16, "query_block": 64},
    "gsa": {"keep": 8, "least": 1},
    "gsa_on_device": {"keep": 16},
    "kvstar": {"keep": 16, "query_block": 64},
    "lsh": {"rounds": 4},
    "vertical_slash": {"vertical": 384, "slash": 384},
}
TRAINED = ("topk_blocks", "quest", "lsh")
DECODED: dict[str, dict[str, Any]] = {  # an eighth of the keys
    "topk_blocks": {"keep": 0.125},
    "topk_blocks, each query": {"keep": 0.125, "query_block": 1},
    "quest": {"keep": 0.125},
    "esa": {"keep": 0.125},
    "gsa_on_device": {"keep": 0.125},
    "kvstar": {"keep": 0.125},
}


def pattern_of(label: str, options: dict[str, Any]) -> Pattern:
    """Return the pattern of a row; the layers that it would leave dense are not asked about."""
    return get_pattern(label.partition(",")[0], **options, dense_layers=0)


def tensors(heads: int, kv_heads: int, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, length, SIZE), (1, kv_heads, length, SIZE), (1, kv_heads, length, SIZE)]
    return [torch.randn(shape) for shape in shapes]


def whole(heads: int, kv_heads: int, length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one pass over a text, forward and forward + backward."""
    query, key, value = tensors(heads, kv_heads, length)
    dense = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=heads != kv_heads)
    rows = []
    for measure in ("forward", "backward"):
        labels = [name for name in given.patterns if measure == "forward" or name in TRAINED]
        calls = {name: Call(pattern_of(name, CALLS[name])) for name in labels}
        work: dict[str, Callable[[], object]] = {"dense": partial(_run, dense, (query, key, value), measure)}
        for name, call in calls.items():
            work[name] = partial(_run, partial(attend, call=call), (query, key, value), measure)
        if measure == "forward":
            for name, call in calls.items():
                selector = divided(call.pattern, 0).selector
                assert selector is not None
                select = partial(select_all, selector, query, key, Segments.whole(1, length))
                work[f"{name}: selection"] = partial(select, call.constraint)
        times = interleaved(work, given.repeats, query.device, Deadline())
        for name, call in calls.items():
            with torch.no_grad(), recording() as seen:
                attend(query, key, value, call)
            (made,) = seen.calls
            rows.append(
                {
                    "measure": measure,
                    "length": length,
                    "heads": [heads, kv_heads],
                    "pattern": name,
                    "options": str(call.pattern),
                    "density": made.pairs / made.dense_pairs,
                    "dense": _median(times["dense"]),
                    "seconds": _median(times[name]),
                    "selection": _median(times[f"{name}: selection"]) if measure == "forward" else None,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def _run(attention: Callable[..., Tensor], given: tuple[Tensor, ...], measure: str) -> None:
    if measure == "forward":
        with torch.no_grad():
            attention(*given)
        return
    leaves = [x.detach().requires_grad_() for x in given]
    out = attention(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


@torch.no_grad()
def decoding(heads: int, kv_heads: int, length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a decoding step, on keys and values as a cache holds them."""
    query, key, value = tensors(heads, kv_heads, length)
    labels = [name for name in DECODED if name.partition(",")[0] in given.patterns]
    last = query[:, :, -1:]
    work: dict[str, Callable[[], object]] = {
        "dense": partial(scaled_dot_product_attention, last, key, value, enable_gqa=heads != kv_heads)
    }
    segments = {end: Segments.whole(1, end) for end in range(length - STEPS + 1, length + 1)}
    densities: dict[str, float] = {}
    patterns = {name: pattern_of(name, DECODED[name]) for name in labels}
    for name, pattern in patterns.items():
        selector = divided(pattern, 0).selector
        assert selector is not None
        index = selector.index()
        index.select(query[:, :, :-STEPS], key[:, :, :-STEPS])
        own = index.taken(None)
        with recording() as seen:
            _steps(Call(pattern), own, query, key, value, segments)
        densities[name] = seen.calls[-1].pairs / seen.calls[-1].dense_pairs
        work[name] = partial(_steps, Call(pattern), index, query, key, value, segments)
        work[f"{name}: selection"] = partial(_steps, None, index, query, key, value, segments)
    times = interleaved(work, given.repeats, query.device, Deadline())
    rows = []
    for name, pattern in patterns.items():
        row = {"measure": "decode", "length": length, "heads": [heads, kv_heads], "pattern": name}
        seconds, selection = (_median(times[key]) / STEPS for key in (name, f"{name}: selection"))
        row |= {"options": str(pattern), "density": densities[name], "dense": _median(times["dense"])}
        rows.append({**row, "seconds": seconds, "selection": selection})
        print(line(rows[-1]), flush=True)
    return rows


def _steps(
    call: Call | None,
    index: Index[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: dict[int, Segments],
) -> None:
    """Take the last steps of a text, on a copy of the index; without a call only what is read is found."""
    index = index.taken(None)
    length = key.shape[2]
    for end in range(length - STEPS + 1, length + 1):
        asked, held = query[:, :, end - 1 : end], key[:, :, :end]
        selection = index.select(asked, held)
        if call is not None:
            attend(asked, held, value[:, :, :end], call, segments[end], selections=[selection])


def _median(reading: Reading | Failure) -> float:
    if isinstance(reading, Failure):
        raise RuntimeError(reading.reason)
    return reading.median


def line(row: dict[str, Any]) -> str:
    """Return a row in words."""
    heads, kv_heads = row["heads"]
    head = f"{row['measure']} {row['length']:,} {heads}/{kv_heads} {row['pattern']}"
    return f"{head}: {1e3 * row['seconds']:.2f} ms, dense {1e3 * row['dense']:.2f} ms, {faster(row):.1f}x"


def faster(row: dict[str, Any]) -> float:
    return float(row["dense"] / row["seconds"])


def share(row: dict[str, Any]) -> str:
    """Return the time of the selection as a share of the time that is saved."""
    saved = row["dense"] - (row["seconds"] - (row["selection"] or 0.0))
    return "" if row["selection"] is None or saved <= 0 else f"{row['selection'] / saved:.1%}"


def markdown(content: dict[str, Any]) -> str:
    """Return the table of the results."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = ("measure", "tokens", "heads / key heads", "pattern", "density", "ms", "dense, ms", "faster")
    body = [
        (
            {"backward": "forward + backward"}.get(row["measure"], row["measure"]),
            f"{row['length']:,}",
            "{} / {}".format(*row["heads"]),
            f"`{row['options']}`",
            f"{row['density']:.1%}",
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['dense']:.2f}",
            f"{faster(row):.1f}x",
            share(row),
        )
        for row in content["rows"]
    ]
    lines = (*head, "selection / time saved"), ("---",) * (len(head) + 1), *body
    return "\n".join(
        [
            "# Content-based patterns and dense attention",
            "",
            f"`{content['command']}`, {content['date']}, {machine['device_name']}, {machine['threads']} thread(s), "
            f"float32, heads of {SIZE}, {versions}.",
            "",
            "Every time holds the selection. A decoding step is the mean of the 64 steps up to the length.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patterns", default=",".join(CALLS), type=_patterns, help="which, joined by commas")
    parser.add_argument("--lengths", default="16384", type=_lengths, help="tokens of one pass")
    parser.add_argument("--decode", default="32768", type=_lengths, help="tokens before a decoding step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/selection"), help="without ending")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    content: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.selection", *sys.argv[1:]]),
        "date": str(date.today()),
        "machine": {**describe_machine(torch.device("cpu")), "threads": given.threads},
        "rows": [],
    }
    for length in given.decode:
        for shape in STEP_HEADS:
            content["rows"] += decoding(*shape, length, given)
    for length in given.lengths:
        for shape in HEADS:
            content["rows"] += whole(*shape, length, given)
    content["rows"].sort(key=lambda row: ("forward", "backward", "decode").index(row["measure"]))
    write_atomically(Path(f"{given.output}.json"), json.dumps(content, indent=1).encode())
    write_atomically(Path(f"{given.output}.md"), markdown(content).encode())


def _patterns(text: str) -> list[str]:
    names = text.split(",")
    if strange := [name for name in names if name not in CALLS]:
        raise argparse.ArgumentTypeError(f"{strange[0]!r} is none of {', '.join(CALLS)}")
    return names


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
