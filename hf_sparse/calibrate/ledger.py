"""Every figure that a calibration computes, kept as it comes: what an interrupted one goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from tqdm import tqdm

from ..evaluate.journal import Journal, Row
from ..evaluate.processes import Processes

ROWS_FILE = "figures"
T = TypeVar("T")


class Ledger:
    """The figures of each step, one per window; processes share the windows.

    spent: forward passes per window of each step, those that were found in the journal included; a forward pass with a
        backward pass counts as 3.

    Args:
        samples: windows.
        bar: counts forward passes over windows.
    """

    def __init__(self, journal: Journal, processes: Processes, samples: int, bar: tqdm) -> None:
        self._journal, self._processes, self._samples, self._bar = journal, processes, samples, bar
        self._known = {order(row): row["figure"] for row in journal.rows}
        self.spent: dict[str, float] = {}

    @property
    def mine(self) -> list[int]:
        """The windows that this process reads."""
        return self._processes.share(range(self._samples))

    @property
    def passes(self) -> float:
        """Forward passes per window that were spent."""
        return sum(self.spent.values())

    def figures(
        self,
        step: str,
        passes: float,
        running: Callable[[], AbstractContextManager[Any]],
        figure: Callable[[int], Any],
    ) -> list[Any]:
        """Return ``figure(number)`` of every window, as plain JSON values, in order.

        Args:
            step: what the figures are of: those of a step that is known are not computed again.
            passes: what each costs.
            running: gives the block in which the figures are computed.
        """
        if step in self.spent:
            return [self._known[step, number] for number in range(self._samples)]
        mine = self.mine
        missing = [number for number in mine if (step, number) not in self._known]
        if missing:
            with running():
                for number in missing:
                    made = {"step": step, "window": number, "figure": figure(number)}
                    self._journal.append([made])
                    self._known[step, number] = made["figure"]
                    self._bar.update(passes * self._processes.world)
        self._bar.update(passes * (len(mine) - len(missing)) * self._processes.world)
        found = self._processes.gather([(number, self._known[step, number]) for number in mine])
        self._known.update({(step, number): value for number, value in found})
        self.spent[step] = passes
        return [self._known[step, number] for number in range(self._samples)]

    def once(self, step: str, compute: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the plain JSON values that `compute` gives to the main process."""
        if (step, 0) not in self._known and self._processes.is_main:
            made = {"step": step, "window": 0, "figure": compute()}
            self._journal.append([made])
            self._known[step, 0] = made["figure"]
        return read(self._processes.gather([self._known.get((step, 0))])[0])

    def finish(self) -> None:
        """Let the journal hold the figures of all processes, in one order."""
        self._journal.finish(order)


def order(row: Mapping[str, Any] | Row) -> tuple[str, int]:
    """Return what a row is of."""
    return row["step"], row["window"]
