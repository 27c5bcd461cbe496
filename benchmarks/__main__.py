"""Time one attention call, window against dense and against the alternatives, in one process, interleaved.

    python -m benchmarks [--lengths 4096,8192,16384] [--window 512] [--heads 8] [--head-dim 64] [--repeats 7]

Prints, per length, forward and forward+backward milliseconds (medians), the ratio to dense causal SDPA in the same run,
the limit of that ratio (the pairs dense computes over the pairs of the window) and the share of it that is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_sparse import SlidingWindow
from hf_sparse.plan import cost

from .peers import Attention, Peer, dense_backend, peers

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    default = [256, 512, 640, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=numbers, default=default, help="tokens, comma-separated")
    parser.add_argument("--window", type=int, default=512, help="keys each query sees")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed rounds per length; medians are reported"
    )
    parser.add_argument("--peers", default="", help="comma-separated beginnings of names; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    wanted = [p for p in args.peers.split(",") if p]
    chosen = [
        p for i, p in enumerate(peers(device)) if i < 2 or not wanted or p.name.startswith(tuple(wanted))
    ]
    rows = []
    for n in args.lengths:
        q, k, v, grad = (
            torch.randn(1, args.heads, n, args.head_dim, device=device, dtype=getattr(torch, args.dtype))
            for _ in range(4)
        )
        backend = dense_backend(q, k, v)
        made = {peer: peer.make(args.window, n, device) for peer in chosen}
        check(made, q, k, v)
        forward = timed({p.name: partial(f, q, k, v) for p, f in made.items()}, args.repeats, device)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        trained = {p.name: step(f, q, k, v, grad) for p, f in made.items() if p.backward}
        both = timed(trained, args.repeats, device)
        limit = cost(SlidingWindow(window=args.window), n).limit
        rows += report(n, limit, forward, both, backend)
    write(args, rows)


def check(made: dict[Peer, Attention], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Stop unless every exact peer gives what ours gives."""
    own, *others = (f for p, f in made.items() if p.exact)
    want = own(q, k, v)
    for other in others:
        torch.testing.assert_close(
            other(q, k, v), want, atol=2e-2 if q.dtype != torch.float32 else 1e-4, rtol=1e-2
        )


def step(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def timed(
    work: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds per call, `repeats` rounds in which all take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(repeats + 1):
        for name, function in work.items():
            wait(device)
            started = time.perf_counter()
            calls = 0
            # Short calls are repeated, so that every reading lasts at least 20 ms.
            while calls == 0 or time.perf_counter() - started < 0.02:
                function()
                wait(device)
                calls += 1
            if round_number:
                times[name].append((time.perf_counter() - started) / calls)
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(
    n: int, limit: float, forward: dict[str, list[float]], both: dict[str, list[float]], backend: str
) -> list[dict[str, object]]:
    """Print the table of one length and return its rows."""
    print(f"\nn = {n}, limit {limit:.2f}x of dense (dense backend: {backend})")
    print(f"{'':26}{'forward':>10}{'ratio':>8}{'of limit':>10}{'fwd+bwd':>12}{'ratio':>8}{'of limit':>10}")
    dense = next(iter(forward))
    rows = []
    for name in forward:
        row: dict[str, object] = {"n": n, "peer": name, "limit": round(limit, 3), "dense_backend": backend}
        line = f"{name:26}"
        for label, times in (("forward", forward), ("forward_backward", both)):
            if name not in times:
                line += f"{'-':>12}{'-':>8}{'-':>10}"
                continue
            median = statistics.median(times[name])
            ratio = statistics.median(times[dense]) / median
            quartiles = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else [median] * 3
            row |= {
                f"{label}_ms": round(median * 1e3, 3),
                f"{label}_iqr_ms": round((quartiles[2] - quartiles[0]) * 1e3, 3),
                f"{label}_ratio": round(ratio, 3),
            }
            line += f"{median * 1e3:>8.1f}ms{ratio:>7.2f}x" + (
                f"{ratio / limit:>10.0%}" if name == "hf_sparse" else f"{'':10}"
            )
        print(line, flush=True)
        rows.append(row)
    return rows


def write(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    record = {
        "command": "python -m benchmarks",
        "date": date.today().isoformat(),
        "settings": {name: str(value) for name, value in vars(args).items() if name != "output"},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        },
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, args.output)
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
