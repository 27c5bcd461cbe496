"""How often 95 % intervals hold the true difference, on simulated evaluations: `python recipes/check_intervals.py`.

Each of 2,000 data sets has n documents: their tokens, and by how much the sparse run is above the dense one. The truth
is that of the population, E[nats] / E[tokens]. Rewrites the tables in docs/intervals.md.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import NormalDist

import numpy as np

from hf_sparse.evaluate.bootstrap import difference, gap_closed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "intervals.md"
MARK = "<!-- from here on written by recipes/check_intervals.py -->\n"
DOCUMENTS = (8, 20, 100)
FEW = (2, 3, 4, 5)
STUDENT = {8: 2.3646, 20: 2.0930, 100: 1.9842}  # 97.5 % of Student's t with n - 1 degrees of freedom
OURS = "symmetric bootstrap-t (ours)"
NORMAL = NormalDist()


@dataclass(frozen=True)
class Setting:
    """A population of documents.

    spread, longest: lengths are log-normal around 6,000 tokens with this spread of the logarithm, cut at `longest`.
    skew: of the loss per token over documents; 0 is normal, 2 exponential, 4 a few that lose nearly all.
    window: only tokens further in lose anything, so that short documents lose nothing.
    """

    spread: float = 1.0
    longest: int = 8192
    skew: float = 0.5
    window: int = 0


MAIN = Setting()
SETTINGS = {
    "all cut to one length, normal": Setting(spread=0, longest=4096, skew=0),
    "all cut to one length": Setting(spread=0, longest=4096),
    "cut at 8,192 tokens (main)": MAIN,
    "cut at 8,192, only tokens after 2,048 lose": Setting(window=2048),
    "not cut": Setting(spread=0.8, longest=32768),
    "not cut, only tokens after 2,048 lose": Setting(spread=0.8, longest=32768, window=2048),
    "all cut to one length, clearly skewed": Setting(spread=0, longest=4096, skew=2),
    "cut at 8,192, clearly skewed": Setting(skew=2),
    "cut at 8,192, a few documents lose nearly all": Setting(skew=4),
    "not cut, extreme lengths, clearly skewed": Setting(spread=1.2, longest=32768, skew=2),
}


def draw_tokens(setting: Setting, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    lengths = np.exp(random.normal(np.log(6000), setting.spread, shape))
    return np.clip(np.round(lengths), 64, setting.longest)


def draw_effect(setting: Setting, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """What documents differ in, with mean 0 and variance 1."""
    if setting.skew == 0:
        return random.normal(size=shape)
    k = 4 / setting.skew**2
    return (random.gamma(k, size=shape) - k) / np.sqrt(k)


def simulate(
    setting: Setting, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Nats that the sparse run is above the dense one, and tokens, per document: 0.1 +- 0.05 nats/token and noise."""
    tokens = draw_tokens(setting, shape, random)
    far = np.maximum(tokens - setting.window, 0)
    noise = 0.8 * np.sqrt(far) * random.normal(size=shape)
    return far * (0.1 + 0.05 * draw_effect(setting, shape, random)) + noise, tokens


def simulate_gap(
    setting: Setting, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats above dense after and before adaptation, and tokens; the two go together over documents."""
    tokens = draw_tokens(setting, shape, random)
    shared, own = draw_effect(setting, shape, random), draw_effect(setting, shape, random)
    noise = 0.8 * np.sqrt(tokens) * random.normal(size=(2, *shape))
    before = tokens * (0.3 + 0.1 * shared) + noise[0]
    return tokens * (0.1 + 0.03 * shared + 0.03 * own) + noise[1], before, tokens


def draw_counts(n: int, resamples: int, random: np.random.Generator) -> np.ndarray:
    """How often each document was drawn, [resamples, n]."""
    drawn = random.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(float)


def percentile(nats: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.quantile((counts @ nats) / (counts @ tokens), [0.025, 0.975])


def others(nats: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """The intervals that were not chosen, from the same resamples: ``counts [resamples, n]``."""
    n = len(nats)
    estimate = nats.sum() / tokens.sum()
    ratios = (counts @ nats) / (counts @ tokens)
    residual = nats - estimate * tokens
    error = np.sqrt((residual**2).sum() * n / (n - 1)) / tokens.sum()
    low, high = np.quantile(ratios, [0.025, 0.975])
    wide = NORMAL.cdf(-STUDENT[n] * np.sqrt(n / (n - 1)))
    shift = ratios - estimate
    squares = counts @ residual**2
    squares += shift**2 * (counts @ tokens**2) - 2 * shift * (counts @ (residual * tokens))
    own_error = np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / (counts @ tokens)
    t_low, t_high = np.quantile(shift / np.maximum(own_error, 1e-6 * error), [0.025, 0.975])
    # BCa (Efron 1987): median bias and the skew of the influence of each document
    below = (ratios < estimate).mean() + (ratios == estimate).mean() / 2
    bias = NORMAL.inv_cdf(float(np.clip(below, 1e-4, 1 - 1e-4)))
    skew = (residual**3).sum() / (6 * (residual**2).sum() ** 1.5)
    ends = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-1.96, 1.96)]
    return {
        "percentile": (low, high),
        "basic": (2 * estimate - high, 2 * estimate - low),
        "BCa": tuple(np.quantile(ratios, [NORMAL.cdf(end) for end in ends])),
        "expanded percentile": tuple(np.quantile(ratios, [wide, 1 - wide])),
        "Student's t": (estimate - STUDENT[n] * error, estimate + STUDENT[n] * error),
        "bootstrap-t, equal tails": (estimate - t_high * error, estimate - t_low * error),
    }


def true_difference(setting: Setting, random: np.random.Generator) -> float:
    nats, tokens = simulate(setting, (4_000_000,), random)
    return nats.sum() / tokens.sum()


def cover_difference(setting: Setting, n: int, sets: int, resamples: int, seed: int) -> dict[str, float]:
    """The share of data sets whose interval holds the truth, for each method."""
    random = np.random.default_rng(seed)
    truth = true_difference(setting, random)
    held: dict[str, int] = {}
    for index in range(sets):
        nats, tokens = simulate(setting, (n,), random)
        found = difference(nats, np.zeros(n), tokens, seed=index, resamples=resamples)
        ends = {OURS: (found.low, found.high)}
        if n in STUDENT:
            ends |= others(nats, tokens, draw_counts(n, resamples, random))
        for name, (low, high) in ends.items():
            held[name] = held.get(name, 0) + int(low <= truth <= high)
    return {name: count / sets for name, count in held.items()}


def cover_gap(setting: Setting, n: int, sets: int, resamples: int, seed: int) -> float:
    """The same for the gap closed, over the data sets that have a gap to close."""
    random = np.random.default_rng(seed)
    after, before, _ = simulate_gap(setting, (4_000_000,), random)
    truth = 1 - after.sum() / before.sum()
    held = []
    for index in range(sets):
        after, before, tokens = simulate_gap(setting, (n,), random)
        zero = np.zeros(n)
        closed = gap_closed(after, zero, before, zero, tokens, seed=index, resamples=resamples).closed
        if closed is not None:
            held.append(closed.low <= truth <= closed.high)
    return float(np.mean(held))


def as_table(header: list[str], rows: dict[str, list[float]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, values in rows.items():
        cells = [f"**{v:.1%}**" if 0.93 <= v <= 0.97 else f"{v:.1%}" for v in values]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return [*lines, ""]


def measure(sets: int, resamples: int) -> list[str]:
    lines = []
    for n in DOCUMENTS:
        rows = {}
        for place, (name, setting) in enumerate(SETTINGS.items()):
            found = cover_difference(setting, n, sets, resamples, seed=1000 * place + n)
            rows[name] = list(found.values())
            print(f"{n} documents, {name}: {found}", flush=True)
        lines += [f"{n} documents:", "", *as_table(["", *found], rows)]
    rows = {"difference": [cover_difference(MAIN, n, sets, resamples, seed=n)[OURS] for n in FEW]}
    lines += ["The chosen interval in the main setting with fewer units:", ""]
    lines += as_table(["", *(str(n) for n in FEW)], rows)
    rows = {
        name: [cover_gap(SETTINGS[name], n, sets, resamples, seed=n) for n in DOCUMENTS]
        for name in ("all cut to one length", "cut at 8,192 tokens (main)", "not cut")
    }
    return [*lines, "The gap closed, chosen interval:", "", *as_table(["", *map(str, DOCUMENTS)], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="simulated data sets for each number")
    parser.add_argument("--resamples", type=int, default=2000, help="resamples for each interval")
    args = parser.parse_args()
    lines = measure(args.sets, args.resamples)
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    command = "python recipes/check_intervals.py"
    if (args.sets, args.resamples) != (2000, 2000):
        command += f" --sets {args.sets} --resamples {args.resamples}"
    top = f"`{command}` ({versions}, {date.today()}): {args.sets:,} data sets a number, {args.resamples:,} resamples "
    top += "an interval; in bold what lies within 93-97 %.\n\n"
    page = PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + top + "\n".join(lines)
    PAGE.with_suffix(".new").write_text(page.rstrip() + "\n", encoding="utf-8")
    os.replace(PAGE.with_suffix(".new"), PAGE)


if __name__ == "__main__":
    main()
