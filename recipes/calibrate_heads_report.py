"""The report of `calibrate_heads.py`: tables in Markdown, every figure as JSON, and pictures."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse.calibrate.pictures import draw_pictures
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.evaluate.plot import new_figure, png

BUDGET = 0.2  # at which the stages are held against each other
EXACT = ("ablation", "unit")  # the exact greedy search: score and rescore
KINDS = {  # how rows of the test are drawn: what their label begins with, colour, marker
    "calibrated": ("calibrated", "tab:red", "*"),
    "random units": ("random", "0.6", "x"),
    "every": ("every k-th layer dense", "tab:blue", "^"),
    "": ("one pattern everywhere", "tab:orange", "o"),
}


def save_report(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write NAME.json, NAME.md and the pictures; return their paths."""
    name = record["model"]
    pictures = {f"{name}_test.png": draw_test([*record["test"], *record["default"]["rows"][2:]])}
    for kind, content in draw_pictures(record["default"]["figures"]).items():
        pictures[f"{name}_{kind}"] = content
    text = "\n\n".join(part for part in _parts(record, sorted(pictures)) if part) + "\n"
    written = {
        f"{name}.json": (json.dumps(record, indent=1) + "\n").encode(),
        f"{name}.md": text.encode(),
        **pictures,
    }
    for file, content in written.items():
        write_atomically(folder / file, content)
    return [folder / file for file in written]


def draw_test(rows: Sequence[dict[str, Any]]) -> bytes:
    """A picture: how much of the window's loss every pattern closes, against its density."""
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    seen = set()
    for row in rows:
        if row.get("closed") is None or row["label"].startswith("score"):
            continue
        title, colour, marker = next(k for begin, k in KINDS.items() if row["label"].startswith(begin))
        estimate, low, high = row["closed"]
        axes.errorbar(
            row["density"],
            max(estimate, -0.25),
            yerr=[[estimate - low], [high - estimate]] if estimate > -0.25 else None,
            fmt=marker,
            color=colour,
            markersize=13 if marker == "*" else 6,
            linewidth=1,
            label=None if title in seen else title,
            zorder=3 if marker == "*" else 2,
        )
        seen.add(title)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.text(axes.get_xlim()[1], 1.01, "dense ", ha="right", va="bottom", fontsize=8)
    axes.text(axes.get_xlim()[1], 0.01, "window 128 everywhere ", ha="right", va="bottom", fontsize=8)
    axes.set_ylim(-0.3, 1.1)
    axes.set_xlabel("density: pairs computed, as a share of dense attention's")
    axes.set_ylabel("share of the window's loss that is closed")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(loc="center right", fontsize=8)
    return png(figure)


def _parts(record: dict[str, Any], pictures: Sequence[str]) -> Iterable[str]:
    name, versions = record["model"], record["machine"]["versions"]
    documents = record["test"][0]["documents"]
    yield f"# Calibration of {name}"
    yield (
        f"`{record['command']}`, {record['samples']} windows of {record['length']:,} tokens of validation files; "
        f"measured on {documents} test documents, untrained, with paired 95 % intervals. torch {versions['torch']}, "
        f"transformers {versions['transformers']}. *Closed* is the share of what a window of 128 everywhere loses."
    )
    yield "\n".join(f"![{picture}]({picture})" for picture in pictures)
    yield "## On test documents\n\n" + _test([*record["test"], *record["default"]["rows"][2:]])
    yield "## Scores\n\n" + _scores(record["scores"], record["test"])
    yield (
        f"## Taking the score anew\n\nCandidates: windows of 32, 128 and 512; density at most {BUDGET}. Figures are "
        "of the calibration text itself; closed is the share of what a window of 32 everywhere loses.\n\n"
    ) + _table(
        ("stages", "gradient taken at", "passes", "closed", "nats/token above dense"),
        [
            (
                row["stages"],
                "the choice" if row["points"] == [0.0] else "two points between the choice and dense",
                f"{row['passes']:g}",
                f"{row['closed']:.1%}",
                f"{row['above_dense']:.3f}",
            )
            for row in record["stages"]
        ],
    )
    halves = record["agreement"]
    both, either = (
        set(halves["first"]) & set(halves["second"]),
        set(halves["first"]) | set(halves["second"]),
    )
    yield "## Agreement of two disjoint halves of the calibration files\n\n" + _table(
        ("density at most", "units dense on both", "only on one", "Jaccard"),
        [(halves["budget"], len(both), len(either - both), f"{halves['jaccard']:.2f}")],
    )
    distances = list(record["copy"]["dense"])
    yield "## Copying 64 random tokens over a distance\n\n" + _table(
        ("tokens back", *distances),
        [(run, *(f"{value:.1%}" for value in values.values())) for run, values in record["copy"].items()],
    )
    yield "## Cache and decoding, units by key-value head\n\n" + _table(
        ("budget", "tokens", "bytes: predicted", "measured", "decode time: predicted", "measured", "closed"),
        [
            (
                f"kv_bytes <= {row['budget']}",
                f"{row['tokens']:,}",
                f"{row['bytes_predicted']:.3f}",
                f"{row['bytes']:.3f}",
                f"{row['seconds_predicted']:.3f}",
                f"{row['seconds']:.3f}",
                f"{row['closed']:.1%}",
            )
            for row in record["serving"]
        ],
    )


def _test(rows: Sequence[dict[str, Any]]) -> str:
    shown = [row for row in rows if not row["label"].startswith("score")]
    return _table(
        (
            "pattern",
            "density",
            "nats/token",
            "above dense",
            "closed",
            "above calibrated: window 128",
            "all windows",
        ),
        [
            (
                row["label"],
                f"{row['density']:.3f}",
                f"{row['nats']:.4f}",
                _interval(row.get("above_dense"), "+.3f"),
                _interval(row.get("closed"), ".1%"),
                *(_interval(one, "+.3f") for one in row.get("above_calibrated", (None, None))),
            )
            for row in shown
        ],
    )


def _scores(scores: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> str:
    exact = next(s["gains"] for s in scores if s["score"] == EXACT[0])
    closed = {row["label"]: row["closed"] for row in test if row["label"].startswith("score")}
    searches = list(dict.fromkeys((s["score"], s["rescore"]) for s in scores))
    budgets = sorted({s["budget"] for s in scores})
    lines = []
    for name, rescore in searches:
        own = {s["budget"]: s for s in scores if (s["score"], s["rescore"]) == (name, rescore)}
        last = own[budgets[-1]]
        cells = []
        for budget in budgets:
            found = closed[f"score {name}, rescore {rescore} <= {budget}"]
            cells += [f"{own[budget]['closed']:.1%}", _interval(found, ".1%")]
        again = {True: " at every stage", "unit": " after every change (exact greedy search)", False: ""}[
            rescore
        ]
        lines.append(
            (
                name + (f", again{again}" if again else ""),
                f"{last['passes']:g}",
                f"{spearman(last['gains'], exact):.2f}",
                *cells,
            )
        )
    mine = next(
        s for s in scores if s["score"] == "gate_gradient" and s["rescore"] and s["budget"] == budgets[-1]
    )
    singly = np.ravel(exact)[mine["chosen"]] / mine["gap"]
    together = (
        f"The {len(singly)} units that the default makes dense at {budgets[-1]} close {singly.min():.1%} to "
        f"{singly.max():.1%} one by one and {mine['closed']:.1%} together (their sum: {singly.sum():.1%})."
    )
    columns = [f"{where} at {budget}" for budget in budgets for where in ("closed", "on test,")]
    return _table(("score", "passes", "rank correlation with ablation", *columns), lines) + "\n\n" + together


def spearman(a: Any, b: Any) -> float:
    """The rank correlation of two arrays of scores; equal values share their mean rank."""
    ranks = []
    for values in (np.ravel(a), np.ravel(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def _interval(found: Sequence[float] | None, form: str) -> str:
    return "" if found is None else f"{found[0]:{form}} [{found[1]:{form}}, {found[2]:{form}}]"


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "or") for cell in line) + " |" for line in lines
    )
