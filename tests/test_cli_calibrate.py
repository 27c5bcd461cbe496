"""hf-sparse calibrate: from a model and texts to a pattern file; mistakes are said before the model is loaded."""

import argparse
import json
import os
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import Full, SlidingWindow, StreamingLLM, Strided, load_pattern, save_pattern
from hf_sparse.cli import main
from hf_sparse.cli.candidates import read_candidate
from hf_sparse.documents import Document
from hf_sparse.evaluate.journal import Journal
from hf_sparse.hf import SparseSettings

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
MEASURE = ["--length", "48", "--samples", "2", "--budget", "0.4"]
CANDIDATES = ["--candidates", "sliding_window:window=4", "sliding_window:window=16"]


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(SOURCE[:2000], encoding="utf-8")
    return str(path)


@pytest.fixture
def command(tiny_model_folder, long_text):
    return ["calibrate", str(tiny_model_folder), "--text", long_text, *MEASURE, *CANDIDATES]


def test_from_a_model_to_a_pattern_that_eval_takes(command, tiny_model_folder, long_text, tmp_path, capsys):
    output = tmp_path / "new" / "pattern.json"
    assert main([*command, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    said, *written = err.splitlines()
    assert re.search(r"2 layers x 4 units .*at most \d+ forward passes .* 2 windows of 48 tokens", said)
    assert (
        f"written: {output}, {tmp_path / 'new' / 'pattern.calibration' / 'calibration.json'}" in written[-2]
    )
    assert written[-1] == f"next: hf-sparse eval {tiny_model_folder} --pattern {output}"
    assert out.startswith(f"{tiny_model_folder}, float32 on ") and "<- chosen" in out
    report = json.loads((tmp_path / "new" / "pattern.calibration" / "calibration.json").read_text())
    assert report["chosen"]["cost"] <= 0.4 and report["config"]["length"] == 48
    assert {member for layer in load_pattern(output).patterns for member in (layer.members or (layer,))} <= {
        Full(),
        SlidingWindow(4),
        SlidingWindow(16),
    }
    again = ["eval", str(tiny_model_folder), "--text", long_text, "--pattern", str(output), "--length", "48"]
    assert main([*again, "--quiet", "--output", str(tmp_path / "eval")]) == 0
    runs = json.loads((tmp_path / "eval" / "results.json").read_text())["runs"]
    assert runs[1]["pattern"]["pattern"] == report["pattern"] and 0.3 < runs[1]["density"] < 0.42


def test_options_reach_the_calibration_and_may_come_from_a_file(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config = tmp_path / "calibrate.yaml"
    config.write_text(
        "candidates: ['sliding_window:window=6']\nunit: kv_head\nof: kv_bytes\ntokens: 400\nscore: head_output\n"
        "objective: kl\nstages: 2\nbeyond: 1\nbackend: torch\nseed: 3\nplot: true\nbudget: 0.5\nlength: 40\n"
    )
    model, text = command[1], command[3]
    arguments = [
        "calibrate",
        model,
        "--config",
        str(config),
        "--text",
        text,
        "--samples",
        "3",
        "--length",
        "44",
    ]
    output, report = tmp_path / "p.json", tmp_path / "why"
    assert main([*arguments, "--output", str(output), "--report", str(report)]) == 0, capsys.readouterr().err
    assert set(os.listdir(report)) == {
        "calibration.json",
        "evaluation.json",
        "figures.jsonl",
        "frontier.csv",
        "frontier.png",
        "units.png",
    }
    figures = json.loads((report / "calibration.json").read_text())
    expected = {
        "unit": "kv_head",
        "objective": "kl",
        "length": 44,
        "samples": 3,
        "backend": "torch",
        "seed": 3,
    }
    assert expected.items() <= figures["config"].items()
    assert figures["cost"]["of"] == "kv_bytes" and figures["cost"]["tokens"] == 400
    assert figures["config"]["candidates"] == ["full()", "sliding_window(window=6)"]


def test_a_saved_pattern_is_replaced_while_it_is_measured(
    command, tiny_model_folder, tiny_tokenizer, adapter_folder, tmp_path, capsys
):
    """A patched model, and the base of an adapter, give the pattern that the dense model gives."""
    patched = tmp_path / "patched"
    hf_sparse.patch_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        "strided",
        stride=7,
    ).save_pretrained(patched)
    tiny_tokenizer.save_pretrained(patched)
    for name, model in (("dense", tiny_model_folder), ("patched", patched), ("adapted", adapter_folder)):
        output = tmp_path / f"{name}.json"
        assert main(["calibrate", str(model), *command[2:], "--quiet", "--output", str(output)]) == 0
    capsys.readouterr()
    values = [
        json.loads((tmp_path / f"{name}.calibration" / "calibration.json").read_text())["uniform"][0]["value"]
        for name in ("dense", "patched", "adapted")
    ]
    assert values[0] == values[1] != values[2]  # the adapter's weights count, the saved pattern does not
    assert (tmp_path / "dense.json").read_bytes() == (tmp_path / "patched.json").read_bytes()


def test_the_validation_split_is_read_unless_told(tiny_model_folder, tmp_path, monkeypatch, capsys):
    from hf_sparse.documents import texts

    asked = []

    def library(split):
        asked.append(split)
        return [Document("a", SOURCE[:2000])]

    monkeypatch.setattr(texts, "standard_library", library)
    arguments = ["calibrate", str(tiny_model_folder), *MEASURE, *CANDIDATES, "--quiet"]
    assert main([*arguments, "--output", str(tmp_path / "p.json")]) == 0, capsys.readouterr().err
    assert asked == ["validation"]


def test_candidates_are_read_with_their_options(tmp_path):
    assert read_candidate("sliding_window") == SlidingWindow()
    assert read_candidate("streaming_llm:window=8, sinks=2") == StreamingLLM(window=8, sinks=2)
    union = read_candidate("sliding_window:window=8|strided:stride=5")
    assert union == SlidingWindow(8) | Strided(5)
    assert read_candidate("longformer:window=8,global-tokens=0,1").global_tokens == (0, 1)
    assert read_candidate(str(save_pattern(union, tmp_path / "union.json"))) == union
    save_pattern(SparseSettings(union, layers=(0,)), tmp_path / "layers.json")
    with pytest.raises(ValueError, match=r"layers\.json also names layers or a backend"):
        read_candidate(str(tmp_path / "layers.json"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--budget", "0"], "--budget must be above 0 and at most 1"),
        (["--budget", "2"], "--budget must be above 0 and at most 1, a share of what the dense model costs, got 2.0"),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--length", "1"], "--length must be >= 2, got 1"),
        (["--tokens", "0"], "--tokens must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--backend", "fast"], "unknown backend 'fast'"),
        (["--stages", "0"], "--stages must be a whole number >= 1, got 0"),
        (["--beyond", "-1"], "--beyond must be a whole number >= 0, got -1"),
        (["--score", "gate_gradiant"], "unknown score 'gate_gradiant'. Did you mean 'gate_gradient'?"),
        (["--score", "learned_gates:step=3"], "'step=3' is no option of learned_gates"),
        (["--score", "learned_gates:steps=x"], "steps of learned_gates must be a whole number, got 'x'"),
        (["--score", "head_output", "--rescore", "stage"], "so --rescore stage changes nothing; leave it out"),
        (["--candidates", "sliding_windw"], "unknown pattern 'sliding_windw'. Did you mean 'sliding_window'?"),
        (["--candidates", "sliding_window:windw=3"], "'sliding_window' has no option 'windw'. Did you mean 'window'?"),
        (["--candidates", "sliding_window:window=x"], "window must be a whole number, got 'x'"),
        (["--candidates", "sliding_window:4"], "'4' is no option of sliding_window; write NAME=VALUE"),
        (["--candidates", "./none.json"], "the pattern file ./none.json cannot be read"),
        (["--unit", "heads"], "argument --unit: invalid choice: 'heads'"),
        (["--output", "pattern.txt"], "--output must end in .json, as --pattern knows files by that"),
        (["--output", __file__ + "/p.json"], "is a file; name a folder"),
        (["--report", __file__], "is a file; name a folder"),
        (["--text", "none.txt"], "none.txt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_sentence_before_the_model_is_loaded(long_text, tmp_path, capsys, flags, expected):
    command = ["calibrate", "/nowhere/model", "--text", long_text, "--output", str(tmp_path / "p.json")]
    assert main([*command, *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert expected in said
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--budget", "0.05"], "--budget 0.05 is below the 0.1582 that the cheapest candidates need"),
        (["--samples", "900"], "windows of --length 48 tokens, and --samples 900 are asked for"),
        (["--of", "kv_bytes"], "2 key-value heads here; use --unit kv_head"),
    ],
)
def test_what_only_the_model_can_tell_names_the_options_too(command, tmp_path, capsys, flags, expected):
    assert main([*command, "--output", str(tmp_path / "p.json"), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_a_file_that_no_calibration_wrote_is_kept(command, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert main([*command, "--quiet", "--output", str(mine)]) == 2
    assert f"--output {mine} exists, and no calibration beside it" in capsys.readouterr().err
    assert mine.read_text() == "{}"
    assert main([*command, "--quiet", "--output", str(mine), "--overwrite"]) == 0
    first = load_pattern(mine)
    assert main([*command, "--quiet", "--output", str(mine), "--budget", "1"]) == 0  # figures are used again
    assert load_pattern(mine) != first


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(command, tmp_path, monkeypatch, capsys):
    append, rows = Journal.append, []

    def counted(self, new):
        if len(rows) == 7:
            raise KeyboardInterrupt
        rows.append(append(self, new))

    assert main([*command, "--quiet", "--output", str(tmp_path / "straight.json")]) == 0
    cut = [*command, "--quiet", "--output", str(tmp_path / "cut.json")]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", counted)
        assert main(cut) == 130
    assert f"note: {tmp_path / 'cut.calibration'} keeps every figure so far" in capsys.readouterr().err
    assert len((tmp_path / "cut.calibration" / "figures.jsonl").read_text().splitlines()) == 7
    assert main(cut) == 0
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "straight.json").read_bytes()
