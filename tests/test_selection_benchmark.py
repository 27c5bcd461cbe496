"""The benchmark of content-based patterns: its rows on short texts, and its table."""

import json

import pytest
import torch

from benchmarks import selection
from benchmarks.selection import CALLS, DECODED, main, markdown, share
from hf_sparse.patterns import available_patterns, get_pattern


def test_every_content_based_pattern_has_a_row():
    assert sorted(CALLS) == [name for name in available_patterns() if get_pattern(name).content_based]


def test_rows_of_short_texts_and_their_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selection, "HEADS", ((2, 1),))
    monkeypatch.setattr(selection, "STEP_HEADS", ((2, 1),))
    monkeypatch.setattr(selection, "CALLS", {name: {} for name in CALLS})
    options = ["--lengths", "300", "--decode", "400", "--repeats", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["selection", "--threads", str(torch.get_num_threads()), *options])
    main()
    content = json.loads((tmp_path / "out.json").read_text())
    measures = [row["measure"] for row in content["rows"]]
    assert measures == ["forward"] * len(CALLS) + ["backward"] * 3 + ["decode"] * len(DECODED)
    assert all(0 < row["density"] <= 1 and row["seconds"] > 0 < row["dense"] for row in content["rows"])
    assert (tmp_path / "out.md").read_text() == markdown(content)
    assert capsys.readouterr().out.count("dense") == len(content["rows"])


def test_the_selection_is_compared_with_the_attention_that_it_saves():
    row = {"dense": 10.0, "seconds": 3.0, "selection": 1.0}
    assert share(row) == "12.5%"
    assert share({**row, "seconds": 12.0}) == ""
    assert share({**row, "selection": None}) == ""


def test_a_pattern_that_positions_decide_has_no_row(monkeypatch):
    monkeypatch.setattr("sys.argv", ["selection", "--patterns", "strided"])
    with pytest.raises(SystemExit):
        main()
