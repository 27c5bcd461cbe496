"""Pictures: what they show, with two runs and with twenty."""

import argparse
import copy
import math
import sys
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.evaluate import (
    perplexity,
    plot_loss_by_position,
    plot_perplexity_by_context,
    plot_quality_against_speed,
)
from hf_sparse.evaluate.figures import as_json
from hf_sparse.evaluate.pictures import curves, draw_pictures, quality_against_speed
from hf_sparse.evaluate.pictures import quality_against_speed as draw_quality
from hf_sparse.evaluate.pictures.loss_by_position import loss_by_position
from hf_sparse.evaluate.pictures.perplexity_by_context import perplexity_by_context

pytest.importorskip("matplotlib")
quality_module = sys.modules[quality_against_speed.__module__]
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 900 : i * 900 + 400] for i in range(6)]


@pytest.fixture
def result(tiny_model, tiny_tokenizer):
    return perplexity(
        tiny_model,
        tiny_tokenizer,
        TEXTS,
        max_length=60,
        patterns=[hf_sparse.get_pattern("streaming_llm", sinks=2, window=6)],
        contexts=(20, 50),
        context_targets=8,
    )


@pytest.fixture
def figures(result):
    return as_json(result)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that the picture functions hand to `png`."""
    found = []
    for module in (curves, quality_module):
        monkeypatch.setattr(module, "png", lambda figure, png=module.png: found.append(figure) or png(figure))
    return found


def with_runs(figures, losses, speeds):
    """Sparse runs that lose so many nats/token to dense at every point, and read a prompt so many times as fast."""
    found = copy.deepcopy(figures)
    dense = found["runs"][0]
    for i, (loss, speed) in enumerate(zip(losses, speeds, strict=True)):
        run = copy.deepcopy(figures["runs"][1]) | {"title": f"a pattern with some options(window={i})"}
        interval = {"estimate": loss, "low": loss * 0.9, "high": loss * 1.1, "unit": "documents", "units": 6}
        run["nats_above_dense"] = interval
        run["nats_per_token"] = dense["nats_per_token"] + loss
        for name in ("loss_by_position", "loss_by_context"):
            for point, base in zip(run[name], dense[name], strict=True):
                if base["tokens"]:
                    point |= {"nats_per_token": base["nats_per_token"] + loss, "above_dense": dict(interval)}
        found["runs"].append(run)
        timing = found["timing"]["dense"]
        found["timing"][run["title"]] = timing | {"prefill_seconds": timing["prefill_seconds"] / speed}
    del found["runs"][1]
    return found


TWENTY = [
    0.0,
    -0.004,
    0.001,
    0.0011,
    0.02,
    0.02,
    0.021,
    0.3,
    0.31,
    0.32,
    0.5,
    0.6,
    0.7,
    0.8,
    1.2,
    1.3,
    1.4,
    2.0,
    3.0,
]
SPEEDS = [1 + 0.1 * (i % 7) for i in range(len(TWENTY))]


def test_all_pictures_are_drawn_and_the_same_twice(figures):
    pictures = draw_pictures(figures)
    assert list(pictures) == [
        "loss_by_position.png",
        "perplexity_by_context.png",
        "quality_against_speed.png",
    ]
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in pictures.values())
    assert draw_pictures(figures) == pictures


def test_only_pictures_with_data_are_drawn(figures):
    figures["runs"] = figures["runs"][:1]
    figures["config"]["contexts"] = []
    assert list(draw_pictures(figures)) == ["loss_by_position.png"]
    with pytest.raises(ValueError, match="no context curve was measured"):
        perplexity_by_context(figures)
    with pytest.raises(ValueError, match="no timed run with a pattern"):
        draw_quality(figures)


@pytest.mark.parametrize(
    "plot", [plot_loss_by_position, plot_perplexity_by_context, plot_quality_against_speed]
)
def test_pictures_of_a_result(result, tmp_path, monkeypatch, plot):
    path = plot(result, tmp_path / "deep" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plots need matplotlib"):
        plot(result, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_curves_show_the_figures_and_their_band(figures, drawn):
    perplexity_by_context(figures)
    above, below = drawn[0].axes
    dense, sparse = (run["loss_by_context"] for run in figures["runs"])
    lines = {line.get_label(): list(line.get_ydata()) for line in above.get_lines()}
    assert lines["dense"] == [math.exp(point["nats_per_token"]) for point in dense]
    assert lines[figures["runs"][1]["title"]] == [math.exp(point["nats_per_token"]) for point in sparse]
    (lost,) = (line for line in below.get_lines() if line.get_marker() == "o")
    assert list(lost.get_xdata()) == [20, 50]
    assert list(lost.get_ydata()) == [point["above_dense"]["estimate"] for point in sparse]
    band = below.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (
        min(point["above_dense"]["low"] for point in sparse),
        max(point["above_dense"]["high"] for point in sparse),
    )


@pytest.mark.parametrize("draw", [loss_by_position, perplexity_by_context])
def test_twenty_curves_are_told_apart_and_bad_ones_are_named(figures, drawn, draw):
    many = with_runs(figures, TWENTY, SPEEDS)
    many["config"]["trained_length"] = 30
    draw(many)
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert [name for name in names if "off the scale" in name] == [
        f"{many['runs'][i]['title']}: off the scale, {loss:.1f} nats above"
        for i, loss in ((18, 2.0), (19, 3.0))
    ]
    assert (
        len(names) == len(set(names)) == 1 + 19 + 1 and "trained on 30 tokens: extrapolation beyond" in names
    )
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == len(names)
    shown = [line for line in drawn[0].axes[0].get_lines() if len(line.get_xdata())]
    assert max(max(line.get_ydata()) for line in shown if line.get_marker() != "None") < 10**6
    drawn[0].canvas.draw()
    assert drawn[0].bbox.contains(*legend.get_window_extent().min)
    assert drawn[0].bbox.contains(*legend.get_window_extent().max)


def test_rounding_noise_is_not_blown_up(figures, drawn):
    loss_by_position(with_runs(figures, [1e-7], [1]))
    low, high = drawn[0].axes[1].get_ylim()
    assert low <= -0.01 and high >= 0.01


def test_nothing_but_bad_runs_can_be_drawn(figures, drawn):
    bad = with_runs(figures, [4.0, 5.0], [1, 2])
    assert set(draw_pictures(bad)) == {
        "loss_by_position.png",
        "perplexity_by_context.png",
        "quality_against_speed.png",
    }
    assert all(math.isfinite(end) for figure in drawn for axes in figure.axes for end in axes.get_ylim())


@pytest.mark.parametrize("number", [1, 2, len(TWENTY)])
def test_every_point_is_labelled_without_overlap(figures, drawn, number):
    draw_quality(with_runs(figures, TWENTY[-number:], SPEEDS[-number:]))
    (axes,) = drawn[0].axes
    drawn[0].canvas.draw()
    labels = {text.get_text(): text for text in axes.texts}
    assert len(labels) == number + 1 and "dense" in labels
    for loss, speed in zip(TWENTY[-number:], SPEEDS[-number:], strict=True):
        assert any(name.endswith(f"{loss:+.3f}, {speed:.3g}x") for name in labels)
    boxes = [label.get_window_extent() for name, label in labels.items()]
    # an annotation's own extent includes its leader line; the text alone must not touch another text
    plain = [super(type(label), label).get_window_extent() for label in labels.values()]
    for i, box in enumerate(plain):
        assert drawn[0].bbox.contains(*box.min) and drawn[0].bbox.contains(*box.max), "cut off"
        assert not any(box.overlaps(other) for other in plain[:i]), "labels overlap"
    assert len(boxes) == number + 1


def test_points_lie_where_the_figures_say(figures, drawn):
    draw_quality(with_runs(figures, [0.1, 2.0], [2.0, 0.5]))
    (axes,) = drawn[0].axes
    points = {
        line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.get_lines()
        if line.get_marker() in ("*", "o", "^")
    }
    assert points["*"] == (1, 0), "dense is the origin"
    assert points["o"] == (pytest.approx(2.0), 0.1)
    assert points["^"] == (pytest.approx(0.5), axes.get_ylim()[1]), "off the scale lies on the edge"
    bars = axes.collections[0].get_segments()[0][:, 1]
    assert list(bars) == [pytest.approx(0.09), pytest.approx(0.11)]
    assert "reading a prompt of" in axes.get_xlabel()


def test_without_a_prompt_speed_is_that_of_scoring(figures, drawn):
    timing = figures["timing"]
    title = figures["runs"][1]["title"]
    timing[title]["prefill_seconds"] = None
    draw_quality(figures)
    (axes,) = drawn[0].axes
    speed = timing[title]["tokens_per_second"] / timing["dense"]["tokens_per_second"]
    assert any(name.get_text().endswith(f"{speed:.3g}x") for name in axes.texts)
    assert "scoring" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.1, 0.9], [0.1, 0.9]),
        ([0.5, 0.5, 0.5], [0.5, 0.6, 0.7]),
        ([0.95, 0.96, 1.2], [0.8, 0.9, 1.0]),
        ([-0.3, 0.02], [0.0, 0.1]),
    ],
)
def test_spread(heights, expected):
    assert quality_module.spread(heights, 0.1) == pytest.approx(expected)


def test_a_run_that_is_not_a_number_is_named(figures, drawn):
    many = with_runs(figures, [0.1, 0.2], [1, 2])
    broken = many["runs"][2]
    broken["nats_above_dense"] = broken["nats_above_dense"] | {"estimate": None, "low": None, "high": None}
    for point in (*broken["loss_by_position"], *broken["loss_by_context"]):
        point |= {"nats_per_token": None, "above_dense": {"estimate": None, "low": None, "high": None}}
    draw_pictures(many)
    for figure in drawn[:2]:
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert f"{broken['title']}: off the scale, not a number" in names
    assert any("not a number, 2x" in text.get_text() for text in drawn[2].axes[0].texts)


@pytest.mark.parametrize("draw", [loss_by_position, perplexity_by_context])
def test_without_a_comparison_there_is_no_panel_for_it(figures, drawn, draw):
    draw(figures | {"runs": figures["runs"][:1]})
    draw(figures)
    assert [len(figure.axes) for figure in drawn] == [1, 2]
    assert drawn[0].axes[0].get_xlabel() == drawn[1].axes[1].get_xlabel() != ""
