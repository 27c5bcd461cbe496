"""Patterns x lengths x measures, against dense attention and what people use today.

    python -m benchmarks [--patterns ...] [--lengths 4K,16K] [--measures forward,backward] [--device cuda] [--quick]

README.md beside this file says how it measures; results go to results/<device>.json and results/<device>.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from functools import partial
from types import ModuleType

from . import memory, operators, prefill
from .estimate import Estimate
from .report import line
from .results import Results
from .suite import Unit, parser, read, units
from .timing import Deadline, Failure, OutOfTime, attempt, compiled

MODULES: dict[str, ModuleType] = {"memory": memory, "prefill": prefill}


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; return 0, or 1 where something of ours failed or was wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    made = parser()
    args = made.parse_args(given)
    try:
        suite = read(args)
        results = Results(suite, f"python -m benchmarks {shlex.join(given)}".strip())
    except ValueError as error:
        made.error(str(error))
    deadline = Deadline.after(suite.minutes)
    wanted = list(units(suite))
    if suite.missing:
        wanted = [unit for each in wanted if (unit := results.missing(each, suite)) is not None]
    estimate = Estimate(suite)
    limit = "" if suite.minutes is None else f", of which --minutes allows {suite.minutes:g}"
    print(f"{len(wanted)} parts, about {_minutes(estimate.left(wanted))}{limit}", flush=True)
    if results.dropped:
        print(f"{results.dropped} earlier rows of another machine or other versions are dropped")
    failed = False
    for number, unit in enumerate(wanted, 1):
        print(f"\n[{number}/{len(wanted)}] {unit}", flush=True)
        started, before = time.monotonic(), compiled()
        try:
            deadline.check()
            rows = attempt(partial(MODULES.get(unit.measure, operators).measure, unit, suite, deadline))
        except OutOfTime as error:
            print(f"not run: {error}", flush=True)
            results.skip(_what(unit), str(error))
            continue
        except KeyboardInterrupt:
            results.skip(_what(unit), "interrupted; nothing after it was run either")
            print(f"\ninterrupted; what was measured is in {results.path}")
            return 130
        if isinstance(rows, Failure):
            failed = True
            print(f"not run: {rows.reason}", flush=True)
            results.skip(_what(unit), rows.reason)
            continue
        assert isinstance(rows, list)
        for row in rows:
            print(line(row))
            failed = failed or ("error" in row and row["method"].startswith("hf_sparse"))
        results.add(rows)
        seconds, made_now = time.monotonic() - started, compiled().since(before)
        estimate.done(unit, seconds)
        left = f"; about {_minutes(estimate.left(wanted[number:]))} left" if number < len(wanted) else ""
        print(f"({seconds:.0f} s{f', {made_now}' if made_now.kernels else ''}{left})", flush=True)
    results.write(partial=False)
    print(f"\nwritten to {results.path} and {results.path.with_suffix('.md')}")
    if compiled().kernels:
        print(str(compiled()))
    if results.not_run:
        print(f"{len(results.not_run)} parts were not run; they are listed there")
    if failed:
        print("something of hf_sparse could not be measured or was wrong; see above", file=sys.stderr)
    return int(failed)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _what(unit: Unit) -> str:
    return f"{unit}: {', '.join(case.label for case in unit.cases)}"


if __name__ == "__main__":
    sys.exit(main())
