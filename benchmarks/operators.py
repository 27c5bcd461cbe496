"""Forward, forward + backward and one decode step of the attention operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from hf_sparse.backends import attend, recording

from .goals import goal_for
from .limits import TILE, decode_limit, limits
from .peers import Peer, default_backend, dense
from .suite import Suite, Unit
from .task import Attention, Task
from .timing import Deadline, Failure, Reading, attempt, interleaved

# Largest error in a checked row; outputs are averages of values up to about 5, and bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
DENSE = "dense"  # stands in the pattern column of dense attention


_STEPS = 1024  # lengths of a decoding cache before the first comes again: more than plans are kept for


@dataclass
class Method:
    """One function of a unit; `attention` is a Failure where it cannot be timed."""

    name: str
    pattern: str
    attention: Attention | Failure
    ours: bool = False
    facts: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.pattern}: {self.name}"


def measure(unit: Unit, suite: Suite, deadline: Deadline) -> list[dict[str, Any]]:
    """Return one row per method: its time, or the reason why it has none.

    Raises:
        OutOfTime: the deadline leaves no time for all of them.
    """
    q_len = 1 if unit.measure == "decode" else unit.length
    q, k, v, grad = suite.shape.tensors(q_len, unit.length)
    tasks = [Task(case, unit.length, suite.shape) for case in unit.cases]
    methods = [Method(name, DENSE, run) for name, run in dense(tasks[0], q_len).items()]
    for task in tasks:
        deadline.check()
        methods += _of_task(task, unit, suite, (q, k, v))
    if unit.measure == "backward":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    work: dict[str, Callable[[], object]] = {}
    for method in methods:
        if isinstance(method.attention, Failure):
            continue
        run: Any = partial(method.attention, q, k, v)
        if unit.measure == "backward":
            run = partial(_step, method.attention, q, k, v, grad)
        if unit.measure == "decode" and not unit.graphed and (method.ours or method.pattern == DENSE):
            run = _decoding(method.attention, q, k, v)
        if unit.graphed:
            run = attempt(partial(_captured, run))
        if isinstance(run, Failure):
            method.attention = run
        else:
            work[method.key] = run
    full = {m.key for m in methods if m.ours or m.pattern == DENSE}
    times = interleaved(work, suite.repeats, suite.shape.device, deadline, full=full)
    backend = default_backend(q, k, v, unit.causal)
    return _rows(unit, suite, methods, times, {task.case.label: task for task in tasks}, backend)


def _of_task(task: Task, unit: Unit, suite: Suite, given: tuple[Tensor, Tensor, Tensor]) -> list[Method]:
    """Return ours, checked against sampled rows of the definition, and the peers, checked against the same."""
    methods = []
    for backend in suite.backends:
        name = "hf_sparse" if backend == "auto" else f"hf_sparse, {backend}"
        attention = partial(_ours, task, backend)
        with recording() as seen:
            checked = attempt(partial(_checked, task, attention, given))
        first = seen.calls[0] if seen.calls else None
        facts = {name: getattr(first, name) for name in ("backend", "operator", "pieces")} if first else {}
        result: Any = checked if isinstance(checked, Failure) else attention
        methods.append(Method(name, task.case.label, result, ours=True, facts=facts))
    if unit.with_peers:
        methods += [_peer(peer, task, unit, given) for peer in suite.peers if peer.applies(task)]
    return methods


def _peer(peer: Peer, task: Task, unit: Unit, given: tuple[Tensor, Tensor, Tensor]) -> Method:
    facts = {"note": peer.note} if peer.note else {}
    kind = task.shape.device.type
    if unit.measure == "backward" and kind not in peer.backward:
        return Method(peer.name, task.case.label, Failure(f"has no backward pass on {kind}"), facts=facts)

    if unit.length > peer.most[kind]:
        return Method(
            peer.name, task.case.label, Failure(f"left out beyond {peer.most[kind]:,} tokens"), facts=facts
        )

    def made() -> Attention:
        attention = peer.make(task)
        if peer.exact:
            _checked(task, attention, given)
        else:
            attention(*given)
        return attention

    attention: Any = attempt(made)
    return Method(peer.name, task.case.label, attention, facts=facts)


def _ours(task: Task, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, task.call, backend=backend)


def _checked(task: Task, attention: Attention, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise unless the attention gives what the pattern's definition says, in sampled rows."""
    # Not under no_grad: the compiler would make one more kernel for that. Nothing here wants a gradient.
    error = task.error(*given, attention(*given))
    tolerance = TOLERANCE[given[0].dtype]
    if not error <= tolerance:
        raise ArithmeticError(f"WRONG by {error:.2g} where {tolerance:.0e} is allowed")


def _step(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def _decoding(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Return a call that finds one more key in the cache each time, as generation does, so that no plan is kept."""
    lengths = cycle(range(k.shape[2] - min(_STEPS, k.shape[2] // 2) + 1, k.shape[2] + 1))

    def step() -> object:
        length = next(lengths)
        return attention(q, k[:, :, :length], v[:, :, :length])

    return step


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of one call, which leaves out the cost of launching kernels one by one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _rows(
    unit: Unit,
    suite: Suite,
    methods: list[Method],
    times: dict[str, Reading | Failure],
    tasks: dict[str, Task],
    backend: str,
) -> list[dict[str, Any]]:
    denses = [(m.name, times[m.key]) for m in methods if m.pattern == DENSE and m.key in times]
    timed = {name: reading.median for name, reading in denses if isinstance(reading, Reading)}
    best = min(timed, key=lambda name: timed[name], default=None)
    rows = []
    for method in methods:
        row: dict[str, Any] = key_of(unit, suite) | {"pattern": method.pattern, "method": method.name}
        if method.pattern == DENSE and method.name == "dense SDPA":
            row["backend"] = backend
        row |= method.facts or {}
        got = times.get(method.key, method.attention)
        if isinstance(got, Failure):
            rows.append(row | {"error": got.reason})
            continue
        assert isinstance(got, Reading)
        row |= {
            "ms": _rounded(got.median * 1e3),
            "iqr_ms": _rounded(got.iqr * 1e3),
            "rounds": len(got.seconds),
            "calls": got.calls,
        }
        if "dense SDPA" in timed and best is not None:
            row |= {
                "dense_ms": _rounded(timed["dense SDPA"] * 1e3),
                "dense_backend": backend,
                "ratio": _rounded(timed["dense SDPA"] / got.median),
                "best_dense": best.removeprefix("dense SDPA, ") if best != "dense SDPA" else backend,
                "ratio_to_best": _rounded(timed[best] / got.median),
            }
        if method.ours:
            row |= _limits(unit, suite, tasks[method.pattern], row.get("ratio"))
        rows.append(row)
    return rows


def _limits(unit: Unit, suite: Suite, task: Task, ratio: float | None) -> dict[str, Any]:
    """Return the limits of the cell, the share of them that is reached, and the goal."""
    heads = suite.shape.heads
    if unit.measure == "decode":
        found = {"pairs_limit": decode_limit(task.pattern, unit.length, heads)}
    else:
        all_of = limits(task.pattern, unit.length, heads, unit.causal, TILE[suite.kind])
        found = {
            "pairs_limit": all_of.pairs,
            "tile_limit": all_of.tiles,
            "tile_limit_of_the_mask": all_of.mask_tiles,
        }
    shares = {}
    if ratio is not None:
        names = [name for name in ("pairs_limit", "tile_limit") if name in found]
        shares = {f"of_{name}": ratio / found[name] for name in names}
    row: dict[str, Any] = {name: _rounded(value) for name, value in (found | shares).items()}
    goal = goal_for(suite.kind, unit.measure, task.case.label, unit.length)
    # Launching kernels one by one is no part of the goal of a decode step on CUDA.
    if goal is not None and not (unit.measure == "decode" and suite.kind == "cuda" and not unit.graphed):
        row["goal"] = goal.default
        if goal.best is not None:
            row["goal_to_best"] = goal.best
    return row


def key_of(unit: Unit, suite: Suite) -> dict[str, Any]:
    """Return what says, with the pattern and the method, which cell a row belongs to."""
    cell = {"measure": unit.measure, "length": unit.length, "causal": unit.causal}
    return cell | suite.shape.described | {"graphed": unit.graphed}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
