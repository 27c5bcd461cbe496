"""hf-sparse analyze: from a model and texts to a table and a heat map; mistakes are said before the model is loaded."""

import argparse
import json
from pathlib import Path

import pytest

from hf_sparse import Strided, save_pattern
from hf_sparse.cli import main

MEASURE = ["--length", "64", "--samples", "2", "--queries", "8", "--density", "0.4", "--quiet"]


@pytest.fixture
def command(tiny_model_folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return ["analyze", str(tiny_model_folder), "--text", str(path), *MEASURE]


def test_from_a_model_to_a_table_and_a_picture(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "folder"
    assert main([*command, "--out", str(output)]) == 0
    out, err = capsys.readouterr()
    files = ["analysis.json", "mass.csv", "heatmap.png"]
    assert err == f"written: {', '.join(str(output / name) for name in files)}\n"
    assert sorted(path.name for path in output.iterdir()) == sorted(files)
    model, heading, *rest = out.splitlines()
    assert model == f"{command[1]}, float32 on cpu"
    assert (
        "40.0%; windows of 64 tokens: 2 (of documents: 1), queries of each: 8"
        in f"{heading} {rest[0].strip()}"
    )
    saved = json.loads((output / "analysis.json").read_text())
    for pattern in saved["patterns"]:
        (row,) = [line for line in rest if line.split("  ")[0].startswith(pattern["label"][:20])]
        assert f"{pattern['density']:.1%}" in row and f"{pattern['mean_mass']:.3f}" in row
    assert sum(line.startswith(("layer 0:", "layer 1:", "layers 0-1:")) for line in rest) in (1, 2)
    assert max(map(len, out.splitlines()[1:])) <= 120
    assert main([*command, "--output", str(output)]) == 2
    assert "analysis.json exists; name another folder, or replace it (--overwrite)" in capsys.readouterr().err
    assert main([*command, "--output", str(output), "--overwrite", "--seed", "1"]) == 0
    again = json.loads((output / "analysis.json").read_text())
    assert again["config"]["seed"] == 1 and again["patterns"][0]["mass"] != saved["patterns"][0]["mass"]


def test_a_size_that_is_given_is_kept_and_any_other_fitted(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    save_pattern(Strided(9), tmp_path / "nine.json")
    given = [
        "sliding_window:window=7",
        "streaming_llm:sinks=3",
        "strided",
        "sliding_window:window=5|strided:stride=6",
    ]
    options = [word for text in (*given, str(tmp_path / "nine.json")) for word in ("--pattern", text)]
    assert main([*command, *options, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())["patterns"]
    window, streaming, strided, both, nine = (one["pattern"] for one in saved)
    assert window["options"] == {"window": 7}
    assert streaming["options"]["sinks"] == 3 and 8 < streaming["options"]["window"] < 16
    assert strided["options"]["stride"] == 3 and nine["options"]["stride"] == 9
    assert [one["label"] for one in saved][3] == "sliding_window(window=5) | strided(stride=6)"
    assert both["union"][0] == {"name": "sliding_window", "options": {"window": 5}}
    assert saved[1]["density"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--density", "0"], "--density must be above 0 and at most 1"),
        (["--density", "1.5"], "a share of dense attention's pairs, got 1.5"),
        (["--pattern", "sliding_windw"], "unknown pattern 'sliding_windw'. Did you mean 'sliding_window'?"),
        (["--pattern", "strided:strde=4"], "strde"),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--queries", "0"], "--queries must be >= 1, got 0"),
        (["--seq-len", "1"], "--length must be >= 2, got 1"),
        (["--seed", "-1"], "--seed must be"),
        (["--overwrite"], "name one with --output DIR"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(command, options, said, capsys, monkeypatch):
    monkeypatch.setattr("hf_sparse.cli.analyze.load_model", lambda args: pytest.fail("the model was loaded"))
    assert main([*command, *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_an_output_that_is_a_file_and_an_empty_text_are_refused(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text(" \n")
    assert main([*command, "--output", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert main([*command[:2], "--text", str(tmp_path / "empty.txt"), *MEASURE]) == 2
    assert "none of the 1 documents has 2 tokens" in capsys.readouterr().err


def test_texts_shorter_than_a_window_are_refused_in_the_words_of_the_command_line(command, capsys):
    assert main([*command, "--length", "4000"]) == 2
    err = capsys.readouterr().err
    assert "the texts hold 0 windows of --length 4000 tokens, and --samples 2 are asked for" in err
    assert err.count("\n") == 1
