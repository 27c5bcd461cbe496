"""The random states of one process: Python's, numpy's, torch's on the CPU and on the accelerator."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random states of this process; of every accelerator it sees, where `device` is one."""
    of_numpy: Any = np.random.get_state()
    name, keys, *rest = of_numpy
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        several = hasattr(module, "get_rng_state_all")
        states[device.type] = module.get_rng_state_all() if several else [module.get_rng_state()]
    return states


def restore_random_state(states: dict[str, Any], device: torch.device) -> None:
    """Put the process into the states, as far as it has the same devices."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if device.type == "cpu":
        return
    module: Any = torch.get_device_module(device)
    for index, state in enumerate(states.get(device.type, [])[: module.device_count()]):
        if hasattr(module, "get_rng_state_all"):
            module.set_rng_state(state, index)
        else:
            module.set_rng_state(state)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random states as they were before the block."""
    before = random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)
