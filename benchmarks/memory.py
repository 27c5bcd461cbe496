"""Peak memory of one attention call beyond its inputs.

On a CPU every measurement has a process of its own, since freed memory may be reused unseen:
``python -m benchmarks.memory '{...}'`` measures one and prints it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_sparse.backends import attend
from hf_sparse.evaluate.machine import PeakMemory

from .cases import Case
from .goals import MEMORY_GOAL
from .operators import DENSE, key_of
from .peers import dense
from .suite import Suite, Unit
from .task import Attention, Shape, Task
from .timing import Deadline, Failure, attempt

ROOT = Path(__file__).resolve().parents[1]
SHORT = 256  # tokens of the call that loads kernels before a process is measured


def measure(unit: Unit, suite: Suite, deadline: Deadline) -> list[dict[str, Any]]:
    """Return rows of extra bytes, forward and forward + backward, of dense attention and of each pattern.

    Raises:
        OutOfTime: the deadline passed.
    """
    rows = []
    for case in (None, *unit.cases):
        for backward in (False, True):
            for backend in ("auto",) if case is None else suite.backends:
                deadline.check()
                rows.append(_row(unit, suite, case, backward, backend))
    return rows


def _row(unit: Unit, suite: Suite, case: Case | None, backward: bool, backend: str) -> dict[str, Any]:
    ours = "hf_sparse" if backend == "auto" else f"hf_sparse, {backend}"
    row = key_of(unit, suite) | {
        "measure": "memory_backward" if backward else "memory_forward",
        "pattern": DENSE if case is None else case.label,
        "method": "dense SDPA" if case is None else ours,
    }

    def found() -> int:
        if suite.kind == "cuda":
            return extra_bytes(
                case or unit.cases[0], case is None, unit.length, suite.shape, backward, backend
            )
        return _in_a_process(case or unit.cases[0], case is None, unit.length, suite.shape, backward, backend)

    extra: Any = attempt(found)
    if isinstance(extra, Failure):
        return row | {"error": extra.reason}
    unit_bytes = suite.shape.unit_bytes(unit.length, unit.length)
    row |= {"extra_bytes": extra, "multiple": float(f"{extra / unit_bytes:.4g}")}
    if case is not None and not backward and suite.kind == "cpu":
        row["goal"] = MEMORY_GOAL
    return row


def extra_bytes(case: Case, is_dense: bool, length: int, shape: Shape, backward: bool, backend: str) -> int:
    """Return the most bytes held above query, key, value and the output's gradient during one call.

    The output counts, and so do the gradients of a backward pass. On a CPU plans are built within the call; on CUDA a
    call before it has compiled the kernels.

    Raises:
        RuntimeError: the system does not tell.
    """
    device = shape.device
    _call(case, is_dense, length if device.type == "cuda" else min(SHORT, length), shape, backward, backend)
    q, k, v, grad = shape.tensors(length, length)
    run = _attention(case, is_dense, length, shape, backend)
    gc.collect()
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in other C libraries
        if trim is not None:
            trim(0)
    memory = PeakMemory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()
    mark = memory.bytes()
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        held: Any = torch.autograd.grad(run(q, k, v), (q, k, v), grad)
    else:
        held = run(q, k, v)
    peak = memory.bytes()
    del held
    if peak is None or (memory.since == "process" and peak == mark):
        raise RuntimeError("this system does not tell the peak memory of a single call")
    return max(peak - before, 0)


def _call(case: Case, is_dense: bool, length: int, shape: Shape, backward: bool, backend: str) -> None:
    q, k, v, grad = shape.tensors(length, length)
    run = _attention(case, is_dense, length, shape, backend)
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        torch.autograd.grad(run(q, k, v), (q, k, v), grad)
    else:
        run(q, k, v)


def _attention(case: Case, is_dense: bool, length: int, shape: Shape, backend: str) -> Attention:
    task = Task(case, length, shape)
    if is_dense:
        return dense(task, length)["dense SDPA"]
    return lambda q, k, v: attend(q, k, v, task.call, backend=backend)


def _resident() -> int:
    """Return the bytes this process holds in memory now.

    Raises:
        RuntimeError: the system does not tell.
    """
    try:
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ImportError):
        raise RuntimeError("this system does not tell how much memory a process holds") from None


def _in_a_process(case: Case, is_dense: bool, length: int, shape: Shape, backward: bool, backend: str) -> int:
    wanted = {
        "case": asdict(case),
        "is_dense": is_dense,
        "length": length,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "backward": backward,
        "backend": backend,
        "threads": torch.get_num_threads(),
    }
    command = (sys.executable, "-m", "benchmarks.memory", json.dumps(wanted))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"its process ended with {done.returncode}")
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(wanted["threads"])
    dtype = getattr(torch, wanted["dtype"])
    shape = Shape(wanted["heads"], wanted["kv_heads"], wanted["head_dim"], dtype, torch.device("cpu"))
    case = Case(**wanted["case"])
    print(
        extra_bytes(case, wanted["is_dense"], wanted["length"], shape, wanted["backward"], wanted["backend"])
    )


if __name__ == "__main__":
    main()
