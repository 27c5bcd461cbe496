"""Budgets that hold a share of the attention mass: raised and lowered, layer by layer, while the model runs."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

import numpy as np
from torch import nn

from ..patterns import Pattern
from ..selectors.block_selector import BlockSelector
from .active import unwrap
from .budget_rule import Range, changed, range_of
from .budgets import Keep, budgets_over, has_budget, selector_of, with_budgets
from .computed import AttentionCall
from .hooks import mask_owner
from .kept_mass import KeptMass, LayerMass, reporting, running, watched_by
from .routing import attention_layers
from .stored_settings import SparseSettings, layer_count

ENOUGH = 64  # queries of each layer that are measured before a budget is changed
_HELD = "_hf_sparse_held"  # what holds the mass of a model
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldLayer:
    """A layer whose mass is held.

    keep: its budget.
    mass: what it kept of the queries that were measured before the last change of its budget; None before the first.
    limit: what stands between it and the target, in words; empty where nothing does.
    """

    keep: Keep
    mass: LayerMass | None
    limit: str


@dataclass(eq=False)
class _Budget:
    """The budget of layers that share a selection.

    selector: of the lowest of them, as patched.
    blocks: the number of blocks that `keep`, where it is a number, is rounded from.
    seen: blocks that the queries since the last change saw at most.
    masses: what the layers kept before the last change, of queries with these limits.
    limit: why the budget that was measured could not come nearer to the target; empty where it could.
    """

    layers: tuple[int, ...]
    selector: BlockSelector
    keep: Keep
    blocks: float = 0.0
    seen: int = 1
    rising: bool | None = None  # the last change
    turns: int = 0
    masses: dict[int, LayerMass] = field(default_factory=dict)
    limits: Range | None = None
    limit: str = ""

    def change(self, masses: dict[int, LayerMass], target: float) -> None:
        """Read more or less from now on, for what was measured."""
        self.masses, self.limits = masses, range_of(self.selector, self.seen)
        self.limit = _limit(self.keep, self.limits, self.mass, target)
        lost, rising = 1 - self.mass, self.mass < target
        self.turns += self.rising is not None and rising != self.rising
        self.rising = rising
        if isinstance(self.keep, float):
            now = min(self.keep * self.seen, self.limits.top)  # more than a selector takes says nothing
            blocks = changed(now, lost, 1 - target, self.limits, self.turns)
            self.keep = 1.0 if blocks >= self.limits.top else float(f"{blocks / self.seen:.4g}")
        else:
            self.blocks = changed(self.blocks or self.keep, lost, 1 - target, self.limits, self.turns)
            self.keep = round(self.blocks)
        self.seen = 1

    @property
    def mass(self) -> float:
        """What the layers kept before the last change, their mean."""
        return sum(mass.mean for mass in self.masses.values()) / len(self.masses)


class HeldMass:
    """The budgets that hold a share of the attention mass; see `hold_mass`."""

    def __init__(self, target: float, kept: KeptMass, current: SparseSettings, config: Any) -> None:
        self.target, self._kept, self._current = target, kept, current
        self._layers, self._steps = layer_count(config), 0
        self._budgets = _budgets(current, attention_layers(config))
        self._of = {layer: budget for budget in self._budgets for layer in budget.layers}
        self.file: TextIO | None = None
        self.budgets: dict[int, Keep] = {layer: budget.keep for layer, budget in self._of.items()}
        with_budgets(current.pattern, self.budgets, self._layers)  # refuses a pattern that cannot have them

    @property
    def settings(self) -> SparseSettings:
        """What the model runs, with the budgets that were found, for `patch_model` and `save_pattern`."""
        return replace(self._current, pattern=with_budgets(self._current.pattern, self.budgets, self._layers))

    @property
    def pattern(self) -> Pattern:
        """The pattern with the budgets that were found."""
        return self.settings.pattern

    @property
    def layers(self) -> dict[int, HeldLayer]:
        """The layers whose mass is held, by their index."""
        return {
            layer: HeldLayer(budget.keep, budget.masses.get(layer), budget.limit)
            for layer, budget in sorted(self._of.items())
        }

    def see(self, asked: AttentionCall) -> None:
        """Measure a call of a layer that selects."""
        budget = self._of.get(asked.call.layer)
        if budget is not None:
            budget.seen = max(budget.seen, _blocks_seen(budget.selector, asked))
            self._kept.see(asked)

    def end_forward(self, *_: Any) -> None:
        """Forward hook: change the budgets of which enough was measured."""
        self._steps += 1
        for budget in self._budgets:
            if min(self._kept.queries(layer) for layer in budget.layers) < ENOUGH:
                continue
            before = budget.keep
            budget.change({layer: self._kept.take(layer) for layer in budget.layers}, self.target)
            if budget.keep != before:
                self.budgets.update(dict.fromkeys(budget.layers, budget.keep))
                self._log(budget, before)

    def report(self) -> list[str]:
        """Return what `describe` says."""
        held = self.layers
        lines = [
            f"mass      held at {self.target:g} of the dense attention in {len(held)} layers, by their budgets"
        ]
        for layer, own in held.items():
            line = f"          layer {layer}: keep={own.keep}"
            if own.mass is None:
                line += ", nothing is measured yet"
            else:
                line += f", kept {own.mass.mean:.3f} of {own.mass.queries:,} queries"
            lines.append(line + (f"; out of reach: {own.limit}" if own.limit else ""))
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.report())

    def _log(self, budget: _Budget, before: Keep) -> None:
        for layer, mass in budget.masses.items():
            _log.info(
                "layer %d kept %.4f of the attention mass of %d queries: keep %s -> %s",
                *(layer, mass.mean, mass.queries, before, budget.keep),
            )
            if self.file is not None:
                entry = {"step": self._steps, "layer": layer, "mass": round(mass.mean, 6)}
                entry |= {"queries": mass.queries, "keep_before": before, "keep": budget.keep}
                self.file.write(json.dumps(entry) + "\n")
                self.file.flush()


@contextmanager
def hold_mass(
    model: nn.Module,
    target: float = 0.95,
    queries: int = 16,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
) -> Iterator[HeldMass]:
    """Let the layers of `model` that select by content keep `target` of the dense attention mass, inside the block.

    What they keep is measured as `monitored` does. After a forward pass, each layer of which at least 64 queries were
    measured since its last change gets a larger budget (`keep`) where it lost more than ``1 - target``, and a smaller
    one where it lost less: a share stays a share, a number of blocks a number. Layers that share a selection share a
    budget. The pattern of the model stays as it is, and so do caches; at the end of the block its budgets are back.

    Args:
        target: the share of the mass, above 0 and up to 1.
        queries: measured at most of each sequence in a call.
        seed: of their draws.
        log: file to which a line of JSON is added for every change, with the step (forward passes so far), the layer,
            its mass, the queries measured, and its budget before and after; the logger of this module has the same.
            Each of several processes finds budgets of its own: give each a file of its own.
    Yields:
        The budgets: ``held.layers[3].keep``, ``.mass``; ``held.pattern`` and ``held.settings`` have them, for
        `patch_model` and `save_pattern`. `describe` reports them.
    Raises:
        ValueError: a target, number of queries or seed out of range, a model that is not patched, has no layer that
            selects by content, or one without a budget, or whose mass is held already.
        OSError: `log` cannot be written.
    """
    base = unwrap(model)
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(
            f"target must be a share of the mass above 0 and up to 1, got {target!r}; 0.95 is usual"
        )
    kept, current = KeptMass(queries, seed), running(base, "hold_mass")
    if _HELD in base.__dict__:
        raise ValueError(
            f"the mass of this {type(base).__name__} is held already; leave the outer hf_sparse.hold_mass first"
        )
    held = HeldMass(target, kept, current, base.config.get_text_config())
    with ExitStack() as stack:
        if log is not None:
            held.file = stack.enter_context(open(log, "a", encoding="utf-8"))
        stack.enter_context(watched_by(base, held.see, "hold_mass"))
        stack.enter_context(budgets_over(base, held.budgets))
        stack.enter_context(reporting(base, held.report))
        stack.callback(mask_owner(base).register_forward_hook(held.end_forward).remove)
        base.__dict__[_HELD] = held
        stack.callback(base.__dict__.pop, _HELD)
        yield held


def held_settings(base: nn.Module) -> SparseSettings | None:
    """Return what a model runs whose mass is held, with its present budgets; None for any other."""
    held: HeldMass | None = base.__dict__.get(_HELD)
    return None if held is None else held.settings


def _budgets(current: SparseSettings, layers: Iterable[int]) -> list[_Budget]:
    """Return the budgets of the layers that select by content.

    Raises:
        ValueError: there are none, or what selects has none.
    """
    shared: dict[tuple[BlockSelector, int], list[int]] = {}
    for layer in layers:
        selector = selector_of(current.pattern_at(layer), layer)
        if selector is None:
            continue
        if not has_budget(selector):
            raise ValueError(
                f"layer {layer} runs {selector}, which has no budget (keep) to be raised or lowered; hold the mass of "
                f"patterns that have, such as topk_blocks"
            )
        shared.setdefault((selector, layer // selector.reuse), []).append(layer)
    if not shared:
        raise ValueError(
            f"no layer under {current.pattern} selects by content, so there are no budgets to hold the mass with; "
            f"patch the model with a pattern that does, such as topk_blocks"
        )
    made = []
    for (selector, _), members in shared.items():
        assert not isinstance(selector.keep, tuple)
        made.append(_Budget(tuple(members), selector, selector.keep))
    return made


def _limit(keep: Keep, limits: Range, mass: float, target: float) -> str:
    """Return why the target is out of reach for a budget that kept so much; nothing where it is not."""
    read = math.ceil(keep * limits.seen - 1e-3) if isinstance(keep, float) else keep
    if read <= limits.floor and mass > target:
        return "the least budget keeps more"
    if read >= limits.top and mass < target:
        return "the whole budget keeps less"
    return ""


def _blocks_seen(selector: BlockSelector, asked: AttentionCall) -> int:
    """Return how many blocks, its own included, some query of a call may see at most."""
    most = 1
    for segment in asked.segments.entries:
        count = segment.queries_in(asked.query.shape[2], asked.segments.k_len)
        query = np.arange(segment.end - count, segment.end)
        first = np.zeros_like(query)
        for start in asked.call.constraint.bounds()[0]:
            first = np.maximum(first, start.at(query))
        seen = query // selector.block + 1 - -(-first // selector.block)
        most = max(most, int(seen.max(initial=1)))
    return most
