"""The whole calibration: it finds the head that matters, takes what it announced, and goes on where it stopped."""

import json
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from hf_sparse import GlobalTokens, PerLayer, SlidingWindow, calibrate, patch_model
from hf_sparse.calibrate import run as run_module
from hf_sparse.calibrate import timing
from hf_sparse.calibrate.ledger import ROWS_FILE, Ledger
from hf_sparse.calibrate.scores import SCORES, GateGradient, LearnedGates
from hf_sparse.evaluate.journal import Journal
from hf_sparse.evaluate.processes import Processes

from .writers import LENGTH, WRITER, texts, tokenizer, writer

WINDOW = SlidingWindow(4)


def calibrated(model=None, **options):
    settings = {
        "candidates": [WINDOW],
        "budget": 0.4,
        "tokenizer": tokenizer(),
        "length": LENGTH,
        "samples": 2,
    }
    settings |= {"stages": 2, "beyond": 1}
    return calibrate(writer() if model is None else model, texts(), **{**settings, **options})


def counting(model, length=LENGTH):
    """Count the passes that the first layer of a model really makes, a backward pass as 2."""
    made = []

    def seen(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        if out.shape[1] == length:
            made.append(1)
            if out.requires_grad:
                out.register_hook(lambda grad: made.append(2))

    model.model.layers[0].register_forward_hook(seen)
    return made


def figures(result):
    """Return what of a result says whether another found the same."""
    points = [
        [point.label, point.choice.tolist(), point.cost, point.values.tolist()] for point in result.frontier
    ]
    return [points, result.chosen.choice.tolist(), result.gains.tolist(), result.passes]


EVERY = [
    (name, rescore, objective)
    for number, (name, score) in enumerate(SCORES.items())
    for place, rescore in enumerate([True, False, "unit"] if score.sees_choice else [False])
    for objective in [("loss", "kl")[(number + place) % 2]]
]


@pytest.mark.parametrize(("name", "rescore", "objective"), EVERY)
def test_every_way_takes_the_passes_it_says_and_no_more_than_announced(name, rescore, objective):
    model, said = writer(), []
    made = counting(model)
    score = LearnedGates(steps=4, penalty=1e-4) if name == "learned_gates" else name
    result = calibrated(model, score=score, rescore=rescore, objective=objective, announce=said.append)
    assert (
        len(said) == 1 and "2 layers x 4 units (head), candidates full(), sliding_window(window=4)" in said[0]
    )
    announced = int(said[0].split("at most ")[1].split()[0])
    # Scores that watch one dense pass compute its attention a second time, for which they count another.
    twice = name in ("attention_mass", "head_output", "layer_output")
    assert result.passes == sum(made) / 2 + twice
    assert result.passes <= announced
    assert result.chosen.cost <= 0.4
    if name not in ("attention_mass", "head_output"):
        found = (np.argwhere(result.chosen.choice == 0)).tolist()
        assert found == [list(WRITER)], "the one head that matters"
        assert result.closed(result.chosen) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("unit", ["kv_head", "layer"])
def test_larger_units_hold_the_head_that_matters(unit):
    result = calibrated(unit=unit, budget=0.7)
    place = [WRITER[0], WRITER[1] // result.units.size]
    assert np.argwhere(result.chosen.choice == 0).tolist() == [place]


def test_the_result_is_a_pattern_and_a_frontier():
    model = writer()
    result = calibrated(model, candidates=(WINDOW, "dilated_window", SlidingWindow(9)), beyond=2)
    assert isinstance(result.pattern, PerLayer)
    assert result.pattern == result.units.pattern(result.chosen.choice, result.candidates)
    costs = [point.cost for point in result.frontier]
    assert costs == sorted(costs) and costs[-1] == 1 and result.frontier[-1].choice.sum() == 0
    assert [point.label for point in result.uniform] == list(map(str, result.candidates))
    assert result.cheapest.cost == min(point.cost for point in result.uniform)
    with torch.no_grad():
        patch_model(model, result.pattern)
        values = []
        for text in texts():
            ids = torch.tensor([[2, *tokenizer()(text, add_special_tokens=False)["input_ids"][:LENGTH]]])
            logits = model(input_ids=ids[:, :-1]).logits[0]
            values.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    assert set(np.round(result.chosen.values, 4)) <= set(np.round(values, 4))
    json.dumps(result.as_json(), allow_nan=False)


def test_the_model_is_afterwards_what_it_was():
    model = patch_model(writer().train(), "sliding_window", window=2)
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state, saved = torch.get_rng_state(), dict(model.config.sparse_attention)
    attributes = [sorted(vars(module)) for module in model.modules()]
    calibrated(model, checkpointing=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {
        "lm_head.weight"
    }
    assert all(weight.grad is None for weight in model.parameters())
    assert flags == [module.training for module in model.modules()]
    assert model.config.sparse_attention == saved and torch.equal(torch.get_rng_state(), state)
    assert attributes == [sorted(vars(module)) for module in model.modules()]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options", [{}, {"score": "ablation", "rescore": "unit"}], ids=["gradient", "ablation"]
)
def test_an_interrupted_run_goes_on_and_finds_the_same(tmp_path, monkeypatch, options):
    whole = calibrated(**options)
    figure, left = Ledger.figures, [3]

    def interrupted(self, step, passes, running, compute):
        def counted(number):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return compute(number)

        return figure(self, step, passes, running, counted)

    monkeypatch.setattr(Ledger, "figures", interrupted)
    for stop in (3, 4):
        left[0] = stop
        with pytest.raises(KeyboardInterrupt):
            calibrated(output=tmp_path, **options)
    assert len(rows_of(tmp_path)) == 7
    left[0] = 10_000
    result = calibrated(output=tmp_path, **options)
    assert figures(result) == figures(whole)
    rows = rows_of(tmp_path)
    assert len({(row["step"], row["window"]) for row in rows}) == len(rows) == 7 + 10_000 - left[0]
    model = writer()
    made = counting(model)
    assert figures(calibrated(model, output=tmp_path, **options)) == figures(whole) and not made


def test_another_budget_takes_the_score_from_the_same_folder(tmp_path):
    calibrated(output=tmp_path, rescore=False, budget=0.4)
    model = writer()
    made = counting(model)
    other = calibrated(model, output=tmp_path, rescore=False, budget=0.5)
    assert sum(made) / 2 <= 4 and 3 not in made, "new choices alone are measured, without a gradient"
    assert figures(other) == figures(calibrated(rescore=False, budget=0.5))


def test_a_folder_of_another_calibration_is_refused(tmp_path):
    places = tuple(range(0, 26, 2))
    calibrated(output=tmp_path, candidates=[GlobalTokens(places) | WINDOW], budget=0.9, score="head_output")
    other = (*places[:6], 13, *places[7:])
    assert str(GlobalTokens(places)) == str(GlobalTokens(other)), "their names cut long lists"
    with pytest.raises(ValueError, match=r"holds other figures \(candidates: "):
        calibrated(
            output=tmp_path, candidates=[GlobalTokens(other) | WINDOW], budget=0.9, score="head_output"
        )
    calibrated(output=tmp_path, candidates=[WINDOW], overwrite=True, score="head_output")
    with pytest.raises(ValueError, match="holds other figures"):
        calibrated(output=tmp_path, candidates=[WINDOW], score="head_output", samples=3)


@dataclass(frozen=True)
class Threads(Processes):
    """One of two threads that stand for processes."""

    rank: int = 0
    world: int = 2
    shared: list = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = None

    def gather(self, rows):
        self.shared[self.rank] = rows
        self.wait()
        found = [row for own in self.shared for row in own]
        self.wait()
        return found

    def wait(self):
        self.barrier.wait(60)


@pytest.mark.parametrize(
    "options", [{"objective": "kl", "samples": 3}, {"score": "layer_output", "samples": 1}], ids=str
)
def test_two_processes_find_what_one_does(tmp_path, monkeypatch, options):
    alone = calibrated(**options)
    shared, barrier, results, local = [None, None], threading.Barrier(2), {}, threading.local()
    monkeypatch.setattr(run_module, "current_processes", lambda: local.own)
    counts = {}

    def work(rank):
        local.own = Threads(rank, 2, shared, barrier)
        model = writer()
        counts[rank] = counting(model)
        results[rank] = calibrated(model, output=tmp_path, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert figures(results[0]) == figures(results[1]) == figures(alone)
    twice = options["samples"] if "score" in options else 0
    assert sum(map(sum, counts.values())) == alone.passes * options["samples"] - twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "figures.jsonl"]


def test_times_are_measured_once_and_kept(tmp_path, monkeypatch):
    asked = []

    def seconds(model, patterns, tokens, measure, backend, progress=False):
        asked.append((len(patterns), tokens, measure))
        return [1.0, 0.2, 0.7]

    monkeypatch.setattr(timing, "measure_seconds", seconds)
    said = []
    for _ in range(2):
        result = calibrated(of="prefill", tokens=64, budget=0.45, output=tmp_path, announce=said.append)
    assert asked == [(3, 64, "prefill")]
    assert said[0].endswith("of 2 texts, after 18 readings of 64 tokens that are timed")
    assert result.costs.measure == "prefill" and result.chosen.cost <= 0.45
    assert result.costs.mixed == pytest.approx(0.05), "halves were predicted to take 0.6, and took 0.7"
    assert result.chosen.cost > result.chosen.density
    with pytest.raises(
        ValueError, match=r"budget=0.1 is below the 0.2 .* prefill at 64 tokens\); raise it to 0.2"
    ):
        calibrated(of="prefill", tokens=64, budget=0.1, output=tmp_path)


def test_bytes_of_keys_are_a_budget():
    result = calibrated(of="kv_bytes", unit="kv_head", budget=0.4, tokens=2000, length=LENGTH)
    assert result.chosen.cost <= 0.4 and result.costs.tokens == 2000
    assert np.argwhere(result.chosen.choice == 0).tolist() == [[1, 1]]


def test_an_option_of_a_score_is_taken():
    assert calibrated(score=GateGradient((0.0, 1.0))).passes > calibrated(score=GateGradient()).passes


def test_progress_counts_every_figure_once(tmp_path):
    class Bar:
        counted = 0

        def update(self, passes):
            self.counted += passes

    for _ in range(2):  # the second time all figures are in the journal
        bar = Bar()
        ledger = Ledger(Journal(tmp_path, ROWS_FILE, {}), Processes(), 2, bar)
        for _ in range(2):
            assert ledger.figures("a step", 3.0, nullcontext, lambda number: number * 5) == [0, 5]
        assert (bar.counted, ledger.passes, ledger.spent) == (6, 3, {"a step": 3})
