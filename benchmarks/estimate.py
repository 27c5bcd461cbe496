"""How long a run will take, roughly: from the speed of dense attention here and the pairs that each method computes."""

from __future__ import annotations

import math
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse.plan import Constraint, make_plan

from .prefill import MODELS, REPEATS
from .suite import Suite, Unit
from .task import Task
from .timing import READING, SLOW_ROUNDS, VERY_SLOW

# Rough factors, seen on two CPU cores: a pair of ours over a dense pair, forward + backward over forward, a peer over
# ours, an explicit mask over dense; seconds to start a process, to compile a kernel, to check one method.
OURS, BACKWARD, PEER, MASK = 1.4, 3.5, 6.0, 2.0
PROCESS, COMPILE, CHECK = 5.0, 6.0, 0.2
_PROBE = {"cpu": 2048, "cuda": 16384}


class Estimate:
    """Seconds that units take; `left` learns from those that are done."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.forward = self._probed()
        self.expected = self.spent = 0.0

    def done(self, unit: Unit, seconds: float) -> None:
        self.expected += self.seconds(unit)
        self.spent += seconds

    def left(self, units: list[Unit]) -> float:
        """Return the seconds that `units` will take, at the pace of what is done."""
        pace = self.spent / self.expected if self.expected > 30 else 1.0
        return pace * sum(self.seconds(unit) for unit in units)

    def seconds(self, unit: Unit) -> float:
        suite, n = self.suite, unit.length
        pairs = n * (n + 1) / 2 if unit.causal else float(n * n)
        dense = pairs * self.forward
        ours = [dense * OURS * self._density(unit, number) for number in range(len(unit.cases))]
        if unit.measure == "decode":
            return (len(ours) + 1) * ((suite.repeats + 2) * READING + CHECK)
        if unit.measure == "memory":
            calls = 1 + BACKWARD
            return calls * (dense + sum(ours)) + 2 * PROCESS * (len(ours) + 1) * (suite.kind == "cpu")
        if unit.measure == "prefill":
            model = MODELS[suite.kind]
            width, layers = model["hidden_size"], model["num_hidden_layers"]
            products = 4 * width**2 + 3 * width * model["intermediate_size"]
            linear = layers * products * n / (2 * suite.shape.heads * suite.shape.head_dim) * self.forward
            passes = [linear + layers * attention for attention in (dense, *ours)]
            return (REPEATS + 1) * sum(passes)
        factor = BACKWARD if unit.measure == "backward" else 1.0
        total = self._timed(factor * dense) * (1 if suite.kind == "cpu" else 3)
        total += sum(self._timed(factor * one) + CHECK for one in ours)
        if unit.with_peers:
            total += sum(self._peers(unit, number, factor, dense, one) for number, one in enumerate(ours))
        return total + COMPILE * len(ours) * (suite.kind == "cuda") / 2

    def _peers(self, unit: Unit, number: int, factor: float, dense: float, ours: float) -> float:
        total = 0.0
        for peer in self.suite.peers:
            if not peer.applies(self._task(unit, number)) or unit.length > peer.most[self.suite.kind]:
                continue
            if unit.measure == "backward" and self.suite.kind not in peer.backward:
                continue
            if peer.name.startswith("SDPA"):
                total += self._timed(MASK * factor * dense)
            elif peer.name.startswith("Flex"):
                total += COMPILE + self._timed(factor * ours)
            else:
                total += self._timed(PEER * factor * ours)
        return total

    def _timed(self, seconds: float) -> float:
        """Return the time for all calls of a function that takes so long."""
        rounds = min(self.suite.repeats, SLOW_ROUNDS) if seconds > VERY_SLOW else self.suite.repeats
        return 2 * seconds + rounds * max(seconds, READING)

    def _task(self, unit: Unit, number: int) -> Task:
        return Task(unit.cases[number], unit.length, self.suite.shape)

    def _density(self, unit: Unit, number: int) -> float:
        n, heads = unit.length, self.suite.shape.heads
        plan = make_plan(unit.cases[number].pattern(n), Constraint(unit.causal), n, n, heads=heads)
        return plan.pairs / plan.dense_pairs

    def _probed(self) -> float:
        """Return seconds per pair of dense attention, all heads."""
        shape, n = self.suite.shape, _PROBE[self.suite.kind]
        q, k, v, _ = shape.tensors(n, n)
        fastest = math.inf
        for _ in range(4):
            started = time.perf_counter()
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.gqa)
            if self.suite.kind == "cuda":
                torch.cuda.synchronize(shape.device)
            fastest = min(fastest, time.perf_counter() - started)
        return fastest / (n * (n + 1) / 2)
