"""Which cells a run of the benchmark suite measures, in what order, and how it keeps what it has."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import operators
from benchmarks.__main__ import main
from benchmarks.estimate import Estimate
from benchmarks.goals import main_labels
from benchmarks.report import _reasons
from benchmarks.results import checksum
from benchmarks.suite import parser, read, units
from benchmarks.task import Shape


def run(folder, *arguments) -> dict:
    """Return the JSON record of one run."""
    small = ["--device", "cpu", "--heads", "2", "--head-dim", "8", "--repeats", "2", "--output", str(folder)]
    assert main([*small, *arguments]) == 0
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8"))


def suite_of(*arguments):
    return read(parser().parse_args(["--device", "cpu", *arguments]))


def test_default_lengths_are_those_with_something_to_say():
    cells = {}
    for unit in units(suite_of()):
        labels = [case.label for case in unit.cases]
        cells.setdefault((unit.measure, unit.causal, "window-512" in labels), []).append(unit.length)
        assert not unit.with_peers or unit.length in (4096, 16384)
    assert sorted(cells["forward", True, True]) == [1024, 4096, 16384, 32768]
    assert cells["backward", True, True] == cells["forward", True, True]
    assert sorted(cells["forward", False, False]) == [4096, 16384]
    assert cells["forward", True, False] == [16384] and cells["memory", True, True] == [16384]
    assert cells["decode", True, True] == cells["decode", True, False] == [32768]
    given = {unit.length for unit in units(suite_of("--lengths", "2K,3K")) if unit.measure != "memory"}
    assert given == {2048, 3072}


def test_a_gpu_with_little_time_measures_operators_first_and_peers_last():
    suite = suite_of("--minutes", "5")
    suite = replace(suite, shape=replace(suite.shape, device=torch.device("cuda")), main=main_labels("cuda"))
    made = list(units(suite))
    measures = [unit.measure for unit in made]
    assert [(unit.measure, unit.length) for unit in made[:4]] == [
        (measure, length) for length in (16384, 65536) for measure in ("forward", "backward")
    ]
    assert measures[8:15] == ["decode"] * 6 + ["memory"]
    first_with_peers = next(i for i, unit in enumerate(made) if unit.with_peers)
    assert all(unit.with_peers for unit in made[first_with_peers:])
    graphed = {case.label for unit in made if unit.graphed for case in unit.cases}
    assert graphed == {"window-1024", "streaming-4+1020"}


def test_missing_cells_are_measured_and_others_left_alone(tmp_path, monkeypatch, capsys):
    arguments = ("--measures", "forward,decode", "--peers", "none", "--lengths", "128,256")
    run(tmp_path, *arguments, "--patterns", "window-128")
    record = run(tmp_path, *arguments, "--patterns", "window-128", "window-512", "--missing")
    assert {row["pattern"] for row in record["rows"]} == {"dense", "window-128", "window-512"}
    measured = []
    real = operators.measure
    monkeypatch.setattr(operators, "measure", lambda unit, *rest: measured.append(unit) or real(unit, *rest))
    capsys.readouterr()
    run(tmp_path, *arguments, "--patterns", "window-128", "window-512", "--missing")
    assert measured == [] and capsys.readouterr().out.startswith("0 parts")
    file = tmp_path / "cpu.json"
    record = json.loads(file.read_text())
    broken = next(row for row in record["rows"] if row["method"] == "hf_sparse")
    file.write_text(
        json.dumps(
            record | {"rows": [{**row, "error": "no"} if row == broken else row for row in record["rows"]]}
        )
    )
    run(tmp_path, *arguments, "--patterns", "window-128", "window-512", "--missing")
    assert [(unit.measure, unit.length) for unit in measured] == [(broken["measure"], broken["length"])]
    assert [case.label for case in measured.pop().cases] == [broken["pattern"]]
    run(tmp_path, *arguments, "--patterns", "window-128", "--missing", "--head-dim", "16")
    assert len(measured) == 4
    monkeypatch.setattr("benchmarks.results.checksum", lambda: "other code")
    run(tmp_path, *arguments, "--patterns", "window-128", "--missing")
    assert len(measured) == 8


def test_the_checksum_follows_the_code(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/code.py"):
        (package / name).write_text("one = 1\n")
    monkeypatch.setattr("hf_sparse.__file__", str(package / "__init__.py"))
    before = checksum()
    (package / "part" / "data.json").write_text("{}")
    assert checksum() == before
    (package / "part" / "code.py").write_text("one = 2\n")
    assert checksum() != before


def test_the_estimate_learns_from_what_is_done(monkeypatch):
    monkeypatch.setattr(Estimate, "_probed", lambda self: 1e-8)
    suite = suite_of()
    estimate, made = Estimate(suite), list(units(suite))
    before = estimate.left(made[1:])
    assert before == pytest.approx(sum(estimate.seconds(unit) for unit in made[1:]))
    assert estimate.seconds(made[3]) > estimate.seconds(made[2]) > 10  # the backward pass, at 32K
    estimate.done(made[0], 2 * estimate.seconds(made[0]))
    assert estimate.left(made[1:]) == pytest.approx(2 * before)


def test_tensors_on_a_gpu_lie_as_projections_leave_them():
    shape = Shape(4, 2, 8, torch.bfloat16, torch.device("cuda"))
    drawn = []

    class Generator:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "randn", lambda size, **options: drawn.append(size) or torch.empty(size))
        q, k, _, grad = shape.tensors(32, 32)
        assert (q.shape, k.shape) == ((1, 4, 32, 8), (1, 2, 32, 8))
        assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, grad))
        q, k, _, _ = shape.tensors(1, 32)  # a cache
        assert k.is_contiguous() and k.shape == (1, 2, 32, 8)


def test_reasons_are_said_once_and_many_patterns_are_counted():
    rows = [
        {
            "pattern": f"p{number}",
            "method": "peer",
            "measure": measure,
            "length": length,
            "error": "is not here",
        }
        for number in range(5)
        for measure in ("forward", "backward")
        for length in (1024, 4096)
        if measure == "forward" or number < 2
    ]
    assert _reasons(rows)[2] == (
        "- peer: is not here (forward at 1,024, 4,096 tokens: 5 patterns; backward at 1,024, 4,096 tokens: p0, p1)"
    )
