"""One attention call of each pattern beside dense attention: time, and peak memory in a process of its own.

The clocks, the checks against the definition and the limits are those of the benchmarks.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_patterns_cases import Choice

from benchmarks import operators
from benchmarks.cases import Case
from benchmarks.memory import extra_bytes
from benchmarks.suite import Suite, Unit
from benchmarks.task import Shape
from benchmarks.timing import Deadline, Failure, attempt

DENSE = operators.DENSE
SHAPE = Shape(8, 8, 64, torch.float32, torch.device("cpu"))


def measure_times(
    choices: Sequence[Choice], measure: str, length: int, repeats: int, deadline: Deadline
) -> list[dict[str, Any]]:
    """Return one row for dense attention and one for each pattern, timed in turns; see `benchmarks.operators`.

    Args:
        measure: "forward" or "backward", which is both passes.
    Raises:
        OutOfTime: the deadline leaves no time for all of them.
    """
    cases = tuple(choice.case for choice in choices)
    suite = Suite(
        shape=SHAPE,
        lengths=(length,),
        cases=cases,
        main=set(),
        measures=(measure,),
        backends=("auto",),
        peers=(),
        peers_for_all=False,
        repeats=repeats,
        minutes=None,
        missing=False,
        output=Path(),
    )
    return operators.measure(Unit(measure, length, True, cases), suite, deadline)


def measure_memory(
    choices: Sequence[Choice],
    length: int,
    known: dict[str, dict[str, Any]],
    keep: Callable[[dict[str, dict[str, Any]]], None],
    deadline: Deadline,
) -> None:
    """Add to `known` the extra bytes of dense attention and each pattern, {"forward", "backward"} or {"error"}.

    Args:
        keep: called with `known` after each.
    Raises:
        OutOfTime: the deadline passed.
    """
    for label, case in ((DENSE, choices[0].case), *((choice.label, choice.case) for choice in choices)):
        if label in known:
            continue
        deadline.check()
        found = {
            name: attempt(partial(_in_a_process, case, label == DENSE, length, name == "backward"))
            for name in ("forward", "backward")
        }
        failed = [one.reason for one in found.values() if isinstance(one, Failure)]
        known[label] = {"error": failed[0]} if failed else found
        keep(known)


def _in_a_process(case: Case, is_dense: bool, length: int, backward: bool) -> int:
    """Return the most bytes of one call beyond its inputs, in a process that has computed nothing before.

    Raises:
        RuntimeError: the system does not tell, or the process died.
    """
    # A fork server has loaded torch but not computed: its children start in no time and with clean memory.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["benchmarks.memory", "hf_sparse.evaluate", "hf_sparse.hf"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_bytes, args=(sending, torch.get_num_threads(), case, is_dense, length, backward)
    )
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        raise RuntimeError(f"its process ended with {process.exitcode}")
    if isinstance(answer, Failure):
        raise RuntimeError(answer.reason)
    return int(answer)


def _send_bytes(sending: Any, threads: int, case: Case, is_dense: bool, length: int, backward: bool) -> None:
    torch.set_num_threads(threads)
    sending.send(attempt(partial(extra_bytes, case, is_dense, length, SHAPE, backward, "auto")))
