"""The processes that share an evaluation under ``accelerate launch``: who measures what, and all rows for everyone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # of a process with short documents for one with long ones; usual are 10 minutes

# what torchrun (under accelerate launch), MPICH, Open MPI and MVAPICH tell their processes
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that prints and writes results."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items that this process takes: every item goes to exactly one."""
        return list(items[self.rank :: self.world])

    def gather(self, rows: list[Any]) -> list[Any]:
        """Return the rows of all processes, in the order of their ranks, in every process; all must come here."""
        if self.world == 1:
            return rows
        from accelerate.utils import gather_object

        return gather_object(rows)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def current_processes() -> Processes:
    """Return this process's place among those that a launcher started; one alone where none did.

    Raises:
        ValueError: several were started, but accelerate has been set up in each as if it were alone.
    """
    started = _started()
    if started <= 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=_on_cpu(), timeout=PATIENCE)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but accelerate runs {state.num_processes}, so each would measure "
            "everything; without a GPU create the Accelerator with cpu=True, or none before the evaluation."
        )
    return Processes(state.process_index, state.num_processes)


def _started() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return max(int(os.environ.get(name, "1")) for name in WORLD_SIZES)


def _on_cpu() -> bool:
    """True where processes talk to each other over the CPU: accelerate itself looks for a GPU only."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()
