"""A calibration on disk and as text: every figure, one row per choice, the chosen one marked, pictures of any size."""

import csv
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from hf_sparse import PerHead, PerLayer, SlidingWindow, Strided
from hf_sparse.calibrate import Calibration, Point, save_calibration, table
from hf_sparse.calibrate.costs import Costs
from hf_sparse.calibrate.units import Units
from hf_sparse.patterns import pattern_from_json
from hf_sparse.patterns.full import Full

CANDIDATES = (Full(), SlidingWindow(8), SlidingWindow(32) | Strided(4))
CONFIG = {
    "candidates": [str(candidate) for candidate in CANDIDATES],
    "objective": "loss",
    "score": "gate_gradient",
    "length": 64,
    "samples": 2,
    "documents": 2,
}


def calibration(measure="density", layers=2, count=4, kind="head", objective="loss"):
    """A result made by hand: dense costs 1000, the candidates 10 % and 40 % of it, and loss falls with cost."""
    units = Units(kind, tuple(range(layers)), layers, 4 if kind == "layer" else count, 2)
    shares = np.tile(np.array([1.0, 0.1, 0.4]) / (layers * count), (layers, count, 1))
    costs = Costs(measure, 64, shares, 1000.0)

    def point(label, choice):
        cost = costs.of(choice)
        return Point(label, choice, cost, cost, np.array([2.0, 4.0]) + (1 - cost) ** 2)

    cheapest = costs.cheapest
    chosen = cheapest.copy()
    chosen[1, 0], chosen[0, -1] = 0, 2
    gains = np.zeros((layers, count, 3))
    gains[1, 0], gains[0, -1] = (0.5, 0, 0.25), (-0.125, 0, 0.0625)
    uniform = tuple(point(str(c), np.full(cheapest.shape, n)) for n, c in enumerate(CANDIDATES))
    frontier = (point("cheapest", cheapest), point("budget 0.3", chosen), uniform[0])
    return Calibration(
        pattern=units.pattern(chosen, CANDIDATES),
        units=units,
        candidates=CANDIDATES,
        costs=costs,
        budget=0.3,
        chosen=replace(frontier[1]),  # equal, not the same object: choices are told apart by what they choose
        frontier=frontier,
        uniform=uniform,
        gains=gains,
        passes=12.0,
        choosing=5.0,
        config={**CONFIG, "objective": objective},
        machine={},
    )


def test_every_figure_is_saved_and_one_row_per_choice(tmp_path):
    result = calibration()
    written = save_calibration(result, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["calibration.json", "frontier.csv"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["calibration.json", "frontier.csv"]
    figures = json.loads(written[0].read_text())
    assert figures == json.loads(json.dumps(result.as_json()))
    assert pattern_from_json(figures["pattern"]) == PerLayer(
        (
            PerHead((CANDIDATES[1],) * 3 + (CANDIDATES[2],)),
            PerHead((CANDIDATES[0],) + (CANDIDATES[1],) * 3),
        )
    )
    rows = list(csv.DictReader(io.StringIO(written[1].read_text())))
    assert [row["choice"] for row in rows] == [
        "cheapest",
        "budget 0.3",
        "dense",
        f"{CANDIDATES[2]} everywhere",
    ]
    assert [row["chosen"] for row in rows] == ["False", "True", "False", "False"]
    assert [row["frontier"] for row in rows] == ["True"] * 3 + ["False"]
    assert float(rows[1]["cost"]) == pytest.approx((6 * 0.1 + 1 + 0.4) / 8)
    assert float(rows[1]["amount"]) == pytest.approx(250)
    assert float(rows[1]["above_dense"]) == pytest.approx(0.75**2)
    assert float(rows[1]["closed"]) == pytest.approx((0.9**2 - 0.75**2) / 0.9**2)
    names = ["units: dense", f"units: {CANDIDATES[1]}", f"units: {CANDIDATES[2]}"]
    assert [int(rows[1][name]) for name in names] == [1, 6, 1]


def test_the_table_marks_the_chosen_point_and_says_why():
    lines = table(calibration()).splitlines()
    assert max(map(len, lines)) <= 120
    (chosen,) = [line for line in lines if "<- chosen" in line]
    assert " ".join(chosen.split()) == "budget 0.3 <- chosen 25.0% 250 3.5625 +0.5625 30.6% 1 6 1"
    assert "dense 100.0% 1k 3.0000 +0.0000 100.0% 8 0 0" in [" ".join(line.split()) for line in lines]
    assert "layer 0  ...1" in lines and "layer 1  #..." in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("what gains most"))
    assert lines[start + 1].split() == ["layer", "1", "head", "0", "dense", "0.5"]
    assert lines[start + 2].startswith("layer 0 head 3  sliding_window") and lines[start + 2].endswith(
        "0.0625"
    )
    assert any("12 forward passes" in line and "5 of them to choose" in line for line in lines)


@pytest.mark.parametrize(
    ("measure", "shown"),
    [("kv_bytes", "0.244 KiB"), ("decode", "2.5e+05 ms")],
)
def test_costs_are_shown_in_their_own_unit_beside_the_density(measure, shown):
    (chosen,) = [line for line in table(calibration(measure)).splitlines() if "<- chosen" in line]
    assert shown in chosen and "0.250" in chosen


def test_a_choice_of_layers_is_one_line_and_nothing_chosen_is_said():
    result = calibration(count=1, kind="layer")
    assert "layers 0 to 1: 1#" in table(result)
    nothing = replace(result, chosen=result.frontier[0])
    assert "no unit was changed" in table(nothing)


@pytest.mark.parametrize(
    ("layers", "count", "kind"), [(2, 4, "head"), (80, 64, "head"), (6, 1, "layer")], ids=str
)
def test_pictures_are_drawn_from_the_saved_figures(layers, count, kind, tmp_path):
    pytest.importorskip("matplotlib")
    result = calibration("kv_bytes", layers, count, kind, "kl")
    written = save_calibration(result, tmp_path, pictures=True)
    assert [path.name for path in written[2:]] == ["frontier.png", "units.png"]
    first = [path.read_bytes() for path in written]
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in first[2:])
    from hf_sparse.calibrate.pictures import draw_pictures

    assert list(draw_pictures(json.loads(first[0])).values()) == first[2:]


def test_what_is_drawn_is_what_was_found(monkeypatch):
    """The curve has the frontier's points, the map the gains and the choice, and each cell its candidate's symbol."""
    pytest.importorskip("matplotlib")
    from hf_sparse.calibrate.pictures import frontier, units

    drawn = []
    modules = [
        __import__(f"hf_sparse.calibrate.pictures.{name}", fromlist=["png"]) for name in ("frontier", "units")
    ]
    for module in modules:
        monkeypatch.setattr(module, "png", drawn.append)
    result = calibration()
    figures = json.loads(json.dumps(result.as_json()))
    frontier(figures), units(figures)
    curve = drawn[0].axes[0].get_lines()[0]
    np.testing.assert_allclose(curve.get_xdata(), [10, 25, 100])
    np.testing.assert_allclose(curve.get_ydata(), [0.81, 0.5625, 0])
    np.testing.assert_allclose(drawn[1].axes[0].images[0].get_array(), result.gains[..., 0].clip(0))
    assert [text.get_text() for text in drawn[1].axes[0].texts] == list("...1" + "#...")
    colours = drawn[1].axes[1].images[0].get_array().reshape(-1, 3)
    same = (colours[:, None] == colours[None]).all(-1)
    choice = result.chosen.choice.flatten()
    assert (same == (choice[:, None] == choice[None])).all()
