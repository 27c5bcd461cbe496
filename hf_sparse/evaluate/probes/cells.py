"""The grid of a probe run: every probe at every length and place, with the same samples at each."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Probe, Sample
from .material import Material


@dataclass(frozen=True)
class Cell:
    """A probe at one length and place: a depth, or a distance in tokens."""

    probe: Probe
    length: int
    place: float

    @property
    def shown_place(self) -> str:
        """The place as it is printed."""
        return f"{self.place:,}" if self.probe.axis == "distance" else f"{self.place:g}"


def lay_out(
    probes: Sequence[Probe],
    lengths: Sequence[int],
    depths: Sequence[float],
    distances: Sequence[int] | None,
    material: Material,
) -> list[Cell]:
    """Return the cells in order; without `distances` those are the powers of two that fit every length.

    Raises:
        ValueError: no probe, one given twice, a length or place given twice, a place that is no number, or no power of
            two that fits.
    """
    _check_each_once("probe", [str(probe) for probe in probes])
    _check_each_once("length", lengths)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"a length must be a whole number of tokens >= 1, got {length!r}.")
    cells = []
    for probe in probes:
        places: Sequence[float] = depths
        if probe.axis == "distance":
            places = _powers_that_fit(probe, min(lengths), material) if distances is None else distances
        _check_each_once(probe.axis, places)
        for place in places:
            _check_number(probe.axis, place)
        cells += [Cell(probe, length, place) for length in lengths for place in places]
    return cells


def make_samples(cells: Sequence[Cell], samples: int, material: Material, seed: int) -> list[Sample]:
    """Return `samples` of each cell, cell by cell; sample i asks the same at every length and place of a probe.

    Raises:
        ValueError: a cell that cannot be: everything is checked before the first sample is made.
    """
    for cell in cells:
        for index in range(samples):
            cell.probe.check(material, cell.length, cell.place, _draw(cell, seed, index))
    return [
        cell.probe.make(material, cell.length, cell.place, _draw(cell, seed, index))
        for cell in cells
        for index in range(samples)
    ]


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Return a SHA-256 of all tokens and of which are answers."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.ids)} {sample.answer}\0".encode())
        digest.update(sample.ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _draw(cell: Cell, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(str(cell.probe).encode()), index])


def _powers_that_fit(probe: Probe, length: int, material: Material) -> list[int]:
    found = []
    for distance in (2**power for power in range(1, length.bit_length())):
        try:
            probe.check(material, length, distance, np.random.default_rng(0))
        except ValueError:
            continue
        found.append(distance)
    if not found:
        probe.check(material, length, length, np.random.default_rng(0))  # says what does not fit
    return found


def _check_number(axis: str, place: object) -> None:
    kinds, wanted = (int, "a whole number of tokens") if axis == "distance" else ((int, float), "a number")
    if isinstance(place, bool) or not isinstance(place, kinds):
        raise ValueError(f"a {axis} must be {wanted}, got {place!r}.")


def _check_each_once(what: str, values: Sequence[object]) -> None:
    if not values:
        raise ValueError(f"there is no {what} to measure; name at least one.")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"the {what} {twice[0]} is given twice; name each once.")
