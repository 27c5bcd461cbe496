"""The probes by name. A new one is a file of its own and a line in PROBES."""

from __future__ import annotations

import difflib

from .base import Probe
from .copying import Copy
from .needle import Needle
from .needle_multikey import NeedleMultikey
from .passkey import Passkey
from .variables import Variables

PROBES: dict[str, type[Probe]] = {
    probe.name: probe for probe in (Passkey, Needle, NeedleMultikey, Variables, Copy)
}


def probe_class(name: str) -> type[Probe]:
    """Return the probe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown probe {name!r}.{hint} Available: {', '.join(PROBES)}.")
    return PROBES[name]
