"""What a calibration was asked for, checked before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..hf.global_projections import projects
from ..hf.routing import is_causal
from ..hf.stored_settings import SparseSettings, check_fit, layer_count, query_heads
from ..patterns import Pattern, get_pattern
from ..patterns.algebra import PerHead, PerLayer
from ..patterns.full import Full
from ..patterns.layered import Layered
from ..patterns.probe import check_predicate
from ..patterns.streaming_llm import StreamingLLM
from .costs import Costs
from .scores import Score, score_class

KEYS = (32, 128, 512)  # tokens that a query sees, SINKS of them at the beginning
SINKS = 4
STAGES = 4  # budgets from the cheapest choice to the one asked for; at each the score is taken anew
BEYOND = 3  # and from that to dense


@dataclass(frozen=True)
class Search:
    """How the choice is searched for.

    score: what says which unit gains.
    rescore: take it anew at every stage ("unit": after every change; False: once).
    stages, beyond: how many budgets up to the one asked for, and above it.
    """

    score: Score
    rescore: bool | str = True
    stages: int = STAGES
    beyond: int = BEYOND

    def __post_init__(self) -> None:
        if self.rescore not in (True, False, "unit"):
            raise ValueError(f"rescore must be True, False or 'unit', got {self.rescore!r}")
        if self.rescore and not self.score.sees_choice:
            raise ValueError(
                f"the score {self.score.name} is the same whatever the other units run, so rescore={self.rescore!r} "
                "changes nothing; leave it out"
            )
        for name, least in (("stages", 1), ("beyond", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")

    @staticmethod
    def of(score: str | Score, rescore: bool | str | None, stages: int, beyond: int) -> Search:
        """Return the search by that score; rescore=None is True where that can make a difference."""
        made = score_class(score)() if isinstance(score, str) else score
        if not isinstance(made, Score):
            raise ValueError(f"score must be a name or a Score, got {made!r}")
        return Search(made, made.sees_choice if rescore is None else rescore, stages, beyond)

    def budgets(self, least: float, budget: float) -> list[float]:
        """Return the budgets of all stages: evenly up to the one asked for, then by equal factors to below dense."""
        up_to = [least + (budget - least) * stage / self.stages for stage in range(1, self.stages + 1)]
        return up_to + [
            budget ** (1 - stage / (self.beyond + 1)) for stage in range(1, self.beyond + 1) if budget < 1
        ]

    def passes(self, shape: tuple[int, int, int], needs_dense: bool) -> int:
        """Return the most forward passes per window that the whole calibration takes for [L, U, C].

        A backward pass counts as 2. Stages of which the choice is the same are measured once.
        """
        layers, units, candidates = shape
        stages = self.stages + self.beyond
        changes = layers * units * (candidates - 1)  # each unit may climb through all candidates
        scored = changes + stages if self.rescore == "unit" else stages if self.rescore else 1
        return round(scored * self.score.passes(shape)) + stages + candidates + 1 + needs_dense


def default_candidates(length: int) -> tuple[Pattern, ...]:
    """Return what is worth a try on `length` tokens: windows, and the first tokens, on which many heads rest."""
    return tuple(StreamingLLM(SINKS, keys - SINKS) for keys in KEYS if 2 * keys <= length)


def candidates_of(base: Any, given: Sequence[str | Pattern], length: int) -> tuple[Pattern, ...]:
    """Return what a unit may run, dense first, resolved for `length` tokens.

    Raises:
        ValueError: nothing besides dense, or a pattern that is given twice, does not fit the model, or cannot be run by
            some units while others run another.
    """
    if isinstance(given, (str, Pattern)):
        given = (given,)
    config = base.config.get_text_config()
    heads, causal = query_heads(config), is_causal(base)
    found: list[Pattern] = [Full()]
    for one in given:
        pattern = get_pattern(one).resolve(length)
        if isinstance(pattern, Full):
            continue
        if pattern in found:
            raise ValueError(f"the candidate {pattern} is given twice; name each once")
        if _is_assigned(pattern):
            raise ValueError(
                f"a candidate is what a single unit runs, and {pattern} differs between layers or heads; "
                "give its members"
            )
        if pattern.content_based:
            raise ValueError(
                f"{pattern} selects by content for whole layers, so heads cannot choose it; use patterns that "
                "positions alone decide"
            )
        if pattern.places(None) is not None:
            raise ValueError(
                f"{pattern} moves far keys to other places, which heads of one layer cannot do apart; "
                "use patterns that leave positions as they are"
            )
        if pattern.global_token_ids or projects(pattern):
            raise ValueError(
                f"{pattern} depends on the tokens of an input or has weights of its own, so it cannot be chosen by "
                "head; use global positions"
            )
        check_fit(SparseSettings(pattern), config)
        check_predicate(pattern, heads, causal, layer_count(config))
        found.append(pattern)
    if len(found) == 1:
        raise ValueError(
            "there is nothing to choose between; give a candidate besides dense, such as SlidingWindow(128)"
        )
    return tuple(found)


def _is_assigned(pattern: Pattern) -> bool:
    """True where a pattern, or one it is made of, gives patterns to layers or heads."""
    return isinstance(pattern, (PerHead, PerLayer, Layered)) or any(map(_is_assigned, pattern.members))


def check_candidates_save(candidates: Sequence[Pattern], costs: Costs) -> None:
    """Raise ValueError where a candidate costs nowhere less than dense."""
    for number, candidate in enumerate(candidates[1:], 1):
        if (costs.shares[..., number] >= costs.shares[..., 0] * (1 - 1e-9)).all():
            raise ValueError(
                f"the candidate {candidate} costs no less than dense attention at {costs.tokens} tokens "
                f"({costs.measure}); leave it out, make it narrower, or calibrate for more tokens"
            )


def check_share(budget: Any) -> None:
    """Raise ValueError for a budget that is no share of what dense costs."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(
            f"budget must be above 0 and at most 1, a share of what the dense model costs, got {budget!r}"
        )


def check_budget(budget: float, costs: Costs, candidates: Sequence[Pattern]) -> None:
    """Raise ValueError for a budget below the cheapest choice."""
    least = costs.of(costs.cheapest)
    if budget < least:
        used = [str(candidates[number]) for number in sorted(set(costs.cheapest.flatten().tolist()))]
        raise ValueError(
            f"budget={budget} is below the {least:.4g} that the cheapest candidates need ({', '.join(used)}; "
            f"{costs.measure} at {costs.tokens} tokens); raise it to {_up(least)} or more, or add a cheaper candidate"
        )


def _up(value: float) -> str:
    """Return a share rounded up to a number that is short to write."""
    return f"{-(-value * 1000 // 1) / 1000:g}"
