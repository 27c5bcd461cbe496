"""hf-sparse probe: what it prints and writes, and what it says about mistakes."""

import json
import os

import pytest

from hf_sparse.cli import main
from hf_sparse.cli.probe import read_probe
from hf_sparse.evaluate.probes import Copy, NeedleMultikey, Passkey

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other


def test_prints_and_writes(tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "out"
    command = ["probe", str(tiny_model_folder), "--probe", "passkey:digits=3", "--probe", "copy:block=8"]
    command += [
        "--pattern",
        "sliding_window",
        "--pattern",
        "streaming_llm",
        "--window",
        "16",
        "--lengths",
        "80,120",
    ]
    command += ["--depths", "0,1", "--distances", "8,60", "--samples", "2", "--output", str(folder), "--plot"]
    status = main(command)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "passkey(digits=3): share of answers that are right" in out and "copy(block=8): share" in out
    assert sum(line.startswith("sliding_window(window=16) ") for line in out.splitlines()) == 4
    assert "sample/s" not in err and err.startswith("written: ")  # no bar without a terminal
    assert sorted(os.listdir(folder)) == [
        "copy_block_8.png",
        "evaluation.json",
        "passkey_digits_3.png",
        "probe.csv",
        "probe.json",
        "probe_samples.jsonl",
    ]
    figures = json.loads((folder / "probe.json").read_text())
    assert figures["runs"][0]["title"] == "dense"
    assert figures["config"]["model"] == str(tiny_model_folder)
    assert [len(run["cells"]) for run in figures["runs"]] == [8, 8, 8]
    assert 0 < figures["runs"][1]["density"] < figures["runs"][2]["density"] < 1
    assert main(command) == 0  # goes on behind the last row, and there is none left


def test_options_from_a_file(tiny_model_folder, texts, tmp_path, capsys):
    config = tmp_path / "probe.yaml"
    config.write_text(
        f"model: {tiny_model_folder}\nprobe: [needle]\nlengths: 90\ndepths: 0.5\nsamples: 1\nhaystack: {texts[:2]}\n"
    )
    assert main(["probe", "--config", str(config), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "needle: share of answers that are right, by depth, 2 samples each" in out


def test_an_adapter_brings_its_pattern(adapter_folder, capsys):
    assert (
        main(["probe", str(adapter_folder), "--probe", "passkey", "--lengths", "60", "--samples", "1"]) == 0
    )
    out = capsys.readouterr().out
    for title in (
        "dense ",
        "sliding_window(window=8) ",
        "dense + adapter ",
        "sliding_window(window=8) + adapter ",
    ):
        assert any(line.startswith(title) for line in out.splitlines()), title


def test_probes_are_read_with_their_options():
    assert read_probe("passkey") == Passkey()
    assert read_probe("needle_multikey:keys=3, values=uuids") == NeedleMultikey(keys=3, values="uuids")
    assert read_probe("copy:block=8") == Copy(block=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--probe", "passkeys"],
            "unknown probe 'passkeys'. Did you mean 'passkey'? Available: passkey, needle,",
        ),
        (
            ["--probe", "passkey:digit=3"],
            "'digit=3' is no option of passkey; write NAME=VALUE, its options: digits, ",
        ),
        (["--probe", "passkey:digits"], "'digits' is no option of passkey; write NAME=VALUE"),
        (["--probe", "passkey:digits=x"], "digits of passkey must be a whole number, got 'x'"),
        (["--lengths", "a,b"], "must be whole numbers separated by commas, got 'a,b'"),
        (["--lengths", ""], "must be whole numbers separated by commas, got ''"),
        (["--depths", "0;1"], "must be numbers separated by commas, got '0;1'"),
        (
            ["--depths", "2"],
            "a depth must lie between 0 (the begin) and 1 (right before the question), got 2.0",
        ),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be between 0 and"),
        (["--plot"], "--plot is about the output folder; name one with --output DIR"),
        (["--overwrite"], "--overwrite is about the output folder; name one with --output DIR"),
        (["--lengths", "0", "--pattern", "grouped_heads"], "--lengths must be >= 1, got 0"),
        (["--lengths", "8"], "length=8 is too short for passkey"),
        (["--haystack", "missing.txt"], "missing.txt"),
        (["--backend", "fast"], "fast"),
    ],
)
def test_mistakes(arguments, message, tiny_model_folder, capsys):
    command = ["probe", str(tiny_model_folder)]
    if "--probe" not in arguments:
        command += ["--probe", "passkey"]
    if "--lengths" not in arguments:
        command += ["--lengths", "60"]
    assert main([*command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("hf-sparse: error: ") and err.count("\n") == 1 and not out
