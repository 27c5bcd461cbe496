"""What a calibrated choice is held against at equal density: fixed patterns, spaced dense layers, random choices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hf_sparse import Layered, Pattern, SlidingWindow, get_pattern
from hf_sparse.calibrate.costs import Costs, density_costs
from hf_sparse.calibrate.units import Units

GRID = sorted({max(2, round(2 ** (i / 8) / 2) * 2) for i in range(8, 89)})  # even numbers from 2 to 2,048


@dataclass(frozen=True)
class Family:
    """Patterns that differ in one number; `make` gives the one of a number."""

    label: str
    make: Callable[[int], Pattern]
    numbers: tuple[int, ...] = tuple(GRID)


def _of(name: str, option: str, **fixed: object) -> Callable[[int], Pattern]:
    return lambda number: get_pattern(name, **fixed, **{option: number})


def _beside_window(name: str, option: str) -> Callable[[int], Pattern]:
    return lambda number: SlidingWindow(128) | get_pattern(name, **{option: number})


FAMILIES = (
    Family("sliding_window", _of("sliding_window", "window")),
    Family("streaming_llm, 4 sinks", _of("streaming_llm", "window", sinks=4)),
    Family("longformer, 16 globals", _of("longformer", "window", global_tokens=tuple(range(16)))),
    Family("block_local", _of("block_local", "block")),
    Family("shifted", _of("shifted", "group")),
    Family("dilated_window x2", _of("dilated_window", "window", dilation=2)),
    Family("multi_scale, 4 scales", _of("multi_scale", "window", scales=4)),
    Family("window 128 | strided", _beside_window("strided", "stride")),
    Family("strided", _of("strided", "stride")),
    Family("atrous_local", _of("atrous_local", "stride")),
    Family(
        "sparse_transformer_fixed",
        _of("sparse_transformer_fixed", "summary", block=128),
        tuple(range(1, 129)),
    ),
    Family("sparse_transformer_strided", _of("sparse_transformer_strided", "stride")),
    Family("bigbird", _of("bigbird", "random_blocks", block=64), tuple(range(30))),
    Family("window 128 | random blocks", _beside_window("random", "blocks"), tuple(range(1, 17))),
    Family(
        "window 128 | global tokens",
        lambda n: SlidingWindow(128) | get_pattern("global_tokens", positions=tuple(range(n))),
    ),
    Family("grouped_heads", _of("grouped_heads", "window", adaptive_window=False, max_window=2048)),
)


def peers(base, units: Units, tokens: int, density: float, window: int) -> dict[str, Pattern]:
    """The least dense pattern of each family that is at least so dense, spaced dense layers, 5 random choices."""
    cost = partial(_density, base, units, tokens)
    found = {}
    for family in FAMILIES:
        pattern = _closest(family, cost, density)
        if pattern is not None:
            found[f"{family.label}: {pattern}"] = pattern
    layers = units.of_layers
    for every in range(2, layers + 1):
        if layers // every / layers >= density:
            continue
        family = Family("", partial(_evenly, every))
        pattern = _closest(family, cost, density)
        if pattern is not None:
            found[f"every {every}th layer dense: {pattern}"] = pattern
    candidates = (get_pattern("full"), SlidingWindow(window))
    costs = density_costs(base, units, candidates, tokens)
    for seed in range(5):
        found[f"random units, seed {seed}"] = units.pattern(random_choice(costs, density, seed), candidates)
    return found


def random_choice(costs: Costs, budget: float, seed: int) -> np.ndarray:
    """Units made dense in random order until the budget is spent, rounded up."""
    choice, order = costs.cheapest, np.random.default_rng(seed).permutation(costs.cheapest.size)
    for unit in order:
        if costs.of(choice) >= budget - 1e-9:
            break
        choice = choice.copy()
        choice.ravel()[unit] = 0
    return choice


def _evenly(every: int, window: int) -> Pattern:
    return Layered(pattern=SlidingWindow(window), dense_every=every)


def _density(base, units: Units, tokens: int, pattern: Pattern) -> float:
    """Density of a pattern at this length; patterns that differ by layer included."""
    costs = density_costs(base, units, (get_pattern("full"), pattern), tokens)
    return costs.of(np.ones(units.shape, dtype=int))


def _closest(family: Family, cost: Callable[[Pattern], float], density: float) -> Pattern | None:
    """The least dense pattern of a family that is at least so dense; None where none is."""
    found = [
        (cost(pattern), number, pattern) for number in family.numbers if (pattern := family.make(number))
    ]
    return min((entry for entry in found if entry[0] >= density), default=(0, 0, None))[2]
