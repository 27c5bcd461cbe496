"""The benchmark of training steps: a cell of it, and its table."""

import json

from benchmarks import training_steps
from benchmarks.training_steps import main, markdown, measure


def test_a_cell_times_the_steps_after_the_first_and_their_memory():
    cell = {"objective": "distillation", "length": 600, "pattern": "longformer", "repeats": 2}
    found = measure({**cell, "threads": 1, "device": "cpu", "bf16": False})
    assert len(found["seconds"]) == 2
    assert min(found["seconds"]) > 0
    assert found["bytes"] > 600 * 4096 * 4  # the logits, in one chunk


def test_the_table_compares_with_dense_of_the_same_objective_and_length(monkeypatch, tmp_path, capsys):
    def measured(cell):
        if cell["pattern"] == "bigbird":
            return {**cell, "error": "it failed"}
        seconds = 8.0 if cell["pattern"] == "dense" else 2.0
        return {**cell, "seconds": [seconds], "median": seconds, "bytes": int(seconds * 2**20)}

    monkeypatch.setattr(training_steps, "in_a_process", measured)
    arguments = ["--patterns", "longformer,bigbird", "--threads", "1", "--output", str(tmp_path / "steps")]
    for lengths in ("8192", "4096"):
        monkeypatch.setattr("sys.argv", ["training_steps", *arguments, "--lengths", lengths])
        main()
    assert "distillation 4096 dense 8.00 s" in capsys.readouterr().out
    content = json.loads((tmp_path / "steps.json").read_text())
    assert [row["length"] for row in content["rows"]] == [4096, 4096, 4096, 8192, 8192, 8192] * 2
    written = markdown(content)
    assert written == (tmp_path / "steps.md").read_text()
    assert "| distillation | 4,096 | longformer | 2.00 | 4.00x | 2 | 4.00x |" in written
    assert "| language modelling | 8,192 | bigbird | it failed |  |  |  |" in written
