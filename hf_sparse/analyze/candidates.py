"""What is analysed: patterns that fit the model, each at the density that is asked for or at its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..calibrate.units import Units
from ..hf.global_projections import projects
from ..hf.native import layer_constraint
from ..hf.routing import is_causal
from ..hf.stored_settings import SparseSettings, check_fit, layer_count
from ..patterns import Pattern, Union
from ..patterns.probe import check_predicate
from ..patterns.registry import pattern_class
from ..patterns.written import pattern_to_json
from ..plan import Constraint
from ..plan.cost import cost
from ..selectors import Selector, divided
from .sizes import SIZES, Scaled, scaled_where_possible

DENSITY = 0.125
SLACK = 1.1  # a pattern that reads more than so many times the density is held against no other


@dataclass(frozen=True)
class Candidates:
    """The patterns of an analysis, as every layer runs them.

    densities: pairs as a share of the dense model's, the mean over layers and heads.
    density: what they are held against each other at.
    notes: what was left out or changed, a sentence each.
    """

    patterns: tuple[Pattern, ...]
    densities: tuple[float, ...]
    density: float
    notes: tuple[str, ...] = ()


def check_density(density: Any) -> None:
    """Raise ValueError for what is no share of the pairs; None stands for one that is chosen."""
    if density is None:
        return
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(
            f"density must be above 0 and at most 1, a share of dense attention's pairs, got {density!r}"
        )


def candidates_of(
    base: Any,
    units: Units,
    given: Sequence[str | Pattern | Scaled] | None,
    density: float | None,
    tokens: int,
) -> Candidates:
    """Return the patterns to analyse on `tokens` tokens; None are all that have a size and that the model can run.

    density: that sizes are fitted to; None is DENSITY, or the highest of the patterns where none is to be fitted.
    Raises:
        ValueError: an unknown pattern, one given twice, one that the model cannot run or that keys alone do not
            describe, or none that comes down to the density.
    """
    counting = _Counting.of(base, units, tokens)
    notes: list[str] = []
    if given is None:
        wanted: list[Pattern | Scaled] = _usual(base, units, counting.causal, notes)
    else:
        several = (given,) if isinstance(given, (str, Pattern, Scaled)) else given
        wanted = [scaled_where_possible(one) for one in several]
        if not wanted:
            raise ValueError(
                "there is no pattern to analyse; name some, or give none for all that have a size"
            )
    aim = DENSITY if density is None else float(density)
    found: dict[Pattern, float] = {}
    changed = []
    for one in wanted:
        own = one.fitted(tokens, aim, counting.of_fitted) if isinstance(one, Scaled) else one
        own = own.resolve(tokens)
        pattern = _in_every_layer(own)
        if pattern != own:
            changed.append(own.name or str(own))
        if pattern in found:
            raise ValueError(f"the pattern {pattern} is given twice; name each once")
        _check(base, units, pattern, counting.causal)
        found[pattern] = counting.density(pattern)
    if changed:
        notes.append(f"as if dense_layers=0, reuse=1, so that every layer selects: {', '.join(changed)}")
    if density is None and not any(isinstance(one, Scaled) for one in wanted):
        aim = max(found.values())
    if min(found.values()) > SLACK * aim:
        nearest = min(found, key=lambda pattern: found[pattern])
        raise ValueError(
            f"no pattern comes down to density={aim:g} at {tokens} tokens, the sparsest is {nearest} with "
            f"{found[nearest]:.3g}; raise the density, analyse longer windows, or give a sparser pattern"
        )
    return Candidates(tuple(found), tuple(found.values()), aim, tuple(notes))


def _usual(base: Any, units: Units, causal: bool, notes: list[str]) -> list[Pattern | Scaled]:
    """Return what is analysed where nothing is named; `notes` is told what the model cannot run."""
    names = [name for name, size in SIZES.items() if size.usual]
    if not causal:
        selecting = [name for name in names if pattern_class(name).by_content]
        names = [name for name in names if name not in selecting]
        notes.append(
            f"left out, as {type(base).__name__} is no causal model and these select for such alone: "
            f"{', '.join(selecting)}"
        )
    usual: list[Pattern | Scaled] = []
    for name in names:
        try:
            _in_every_layer(pattern_class(name)()).check_fit(units.heads, units.of_layers)
        except ValueError as error:
            notes.append(f"left out: {error}")
        else:
            usual.append(Scaled(name))
    return usual


def _in_every_layer(pattern: Pattern) -> Pattern:
    """Return a pattern whose selector looks in every layer for itself."""
    if isinstance(pattern, Selector):
        own: Any = pattern  # a dataclass with these options, which its type does not say
        return replace(own, dense_layers=0, reuse=1)
    if isinstance(pattern, Union) and pattern.content_based:
        return Union.of(*(_in_every_layer(member) for member in pattern.members))
    return pattern


def _check(base: Any, units: Units, pattern: Pattern, causal: bool) -> None:
    """Raise ValueError unless the model can run the pattern and its pairs are all there is to it."""
    if pattern.content_based and not causal:
        raise ValueError(
            f"{pattern} selects for causal attention, and {type(base).__name__} is no causal model; use patterns that "
            f"positions alone decide"
        )
    if pattern.places(None) is not None:
        raise ValueError(
            f"{pattern} scores far keys at other places, where dense attention has other weights; analyse patterns "
            f"that leave positions as they are"
        )
    if pattern.global_token_ids or projects(pattern):
        raise ValueError(
            f"{pattern} depends on the tokens of an input or has weights of its own, which dense attention does not "
            f"know; use global positions"
        )
    config = base.config.get_text_config()
    pattern_to_json(pattern)  # refuses what has no name to be told by
    check_fit(SparseSettings(pattern), config)
    check_predicate(pattern, units.heads, causal, layer_count(config))
    for layer in units.layers:
        divided(pattern, layer)  # refuses what cannot be selected in


@dataclass(frozen=True)
class _Counting:
    """Counts the pairs that a pattern reads of `tokens` tokens in the layers of a model."""

    constraints: dict[int, Constraint]
    heads: int
    tokens: int
    causal: bool

    @staticmethod
    def of(base: Any, units: Units, tokens: int) -> _Counting:
        causal, config = is_causal(base), base.config.get_text_config()
        constraints = {layer: layer_constraint(config, layer, causal) for layer in units.layers}
        return _Counting(constraints, units.heads, tokens, causal)

    def density(self, pattern: Pattern) -> float:
        """Return the pairs as a share of dense attention's, over all heads and layers."""
        if not pattern.per_layer:
            return self.of_some_layers(pattern)
        return self._share(pattern, dict.fromkeys(self.constraints, 1))

    def of_fitted(self, pattern: Pattern) -> float:
        """Return the density of a pattern of which the options are numbers, alike in all layers."""
        return self.of_some_layers(_in_every_layer(pattern))

    def of_some_layers(self, pattern: Pattern) -> float:
        """Return the density of a pattern that reads as much in all layers of one constraint."""
        alike = Counter(self.constraints.values())
        first = {constraint: layer for layer, constraint in reversed(self.constraints.items())}
        return self._share(pattern, {first[constraint]: count for constraint, count in alike.items()})

    def _share(self, pattern: Pattern, counts: dict[int, int]) -> float:
        """Return the density in some layers, each of which counts for so many."""
        pairs = dense = 0.0
        for layer, count in counts.items():
            constraint = self.constraints[layer]
            own = cost(pattern, self.tokens, constraint=constraint, heads=self.heads, layer=layer)
            pairs += count * own.pairs
            dense += count * own.dense_pairs
        return pairs / dense
