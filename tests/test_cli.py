"""The command line: what it prints, writes and draws."""

import dataclasses
import json
import os
import re

import pytest

import hf_sparse
from hf_sparse import cli
from hf_sparse.cli import main
from hf_sparse.patterns import Pattern, available_patterns, pattern_class, register_pattern, registry
from hf_sparse.patterns.longformer import __doc__ as longformer_doc

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other


def test_eval_prints_and_writes(tiny_model_folder, texts, tmp_path, capsys):
    out_folder = tmp_path / "out"
    command = ["eval", str(tiny_model_folder), "--pattern", "sliding_window", "--pattern", "streaming_llm"]
    command += ["--window", "16", "--sinks", "2", "--text", *texts, "--length", "100"]
    status = main([*command, "--output", str(out_folder), "--plot", "--quiet"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert (
        "6 documents, " in out
        and "sliding_window(window=16)" in out
        and "streaming_llm(sinks=2, window=16)" in out
    )
    assert sorted(os.listdir(out_folder)) == ["loss_by_position.png", "per_document.jsonl", "results.json"]
    figures = json.loads((out_folder / "results.json").read_text())
    assert [run["label"] for run in figures["runs"]] == [
        "dense",
        "sliding_window(window=16)",
        "streaming_llm(sinks=2, window=16)",
    ]
    assert figures["config"]["model"] == str(tiny_model_folder)
    assert f"{figures['runs'][1]['perplexity']:.3f}" in out
    assert 0 < figures["runs"][1]["density"] < figures["runs"][2]["density"] < 1


def test_eval_reads_the_standard_library_without_texts(tiny_model_folder, capsys):
    assert main(["eval", str(tiny_model_folder), "--length", "50", "--documents", "3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "3 documents, 147 tokens scored" in out and "sliding_window" not in out


def test_documents_picks_the_longest_in_their_order(tiny_model_folder, texts, tmp_path, capsys):
    arguments = ["eval", str(tiny_model_folder), "--text", texts[5], texts[0], texts[3], "--documents", "2"]
    assert main([*arguments, "--length", "40", "--quiet", "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_document.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [texts[5], texts[3]]


def test_eval_of_an_adapter_shows_the_recovery(adapter_folder, texts, tmp_path, capsys):
    command = ["eval", str(adapter_folder), "--text", *texts, "--length", "100", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for title in (
        "dense ",
        "sliding_window(window=8) ",
        "dense + adapter ",
        "sliding_window(window=8) + adapter ",
    ):
        assert sum(line.startswith(title) and "MiB" in line for line in out.splitlines()) >= 1, title
    assert "gap closed by the adapter, sliding_window(window=8): " in out
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures["gap_closed"][0]["control"] == "the same adapter run dense"
    assert [run["adapter"] for run in figures["runs"]] == [None, None, "adapter", "adapter"]


def test_eval_of_a_base_with_adapter_and_control(adapter_folder, tiny_model_folder, texts, tmp_path, capsys):
    command = [
        "eval",
        str(tiny_model_folder),
        "--adapter",
        str(adapter_folder),
        "--control",
        str(adapter_folder),
    ]
    command += ["--pattern", "streaming_llm", "--window", "8", "--text", *texts, "--length", "60", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, control = figures["runs"][2], figures["runs"][-1]
    assert (control["label"], control["adapter"]) == ("dense", "control")
    assert control["nats_per_token"] == pytest.approx(dense["nats_per_token"], rel=1e-6)
    assert "streaming_llm(sinks=4, window=8) + adapter" in capsys.readouterr().out


def test_a_saved_pattern_is_measured_without_being_named(tiny_model, tiny_tokenizer, texts, tmp_path, capsys):
    folder = tmp_path / "saved"
    hf_sparse.patch_model(tiny_model, "streaming_llm", sinks=1, window=9, layers=[0])
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert main(["eval", str(folder), "--text", *texts, "--length", "60", "--quiet"]) == 0
    assert "streaming_llm(sinks=1, window=9) in layers 0" in capsys.readouterr().out


def test_patterns_lists_every_pattern_with_its_options(capsys):
    assert main(["patterns"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == available_patterns()
    for line, name in zip(lines, available_patterns(), strict=True):
        for field in dataclasses.fields(pattern_class(name)):
            assert f"--{field.name.replace('_', '-')} " in line


def test_show_draws_the_picture_of_the_docstring(capsys):
    for flags, picture in zip(
        ([], ["--bidirectional"]), re.findall(r"    key .*(?:\n    \d.*)+", longformer_doc), strict=True
    ):
        assert (
            main(["show", "longformer", "--window", "2", "--global-tokens", "0", "--length", "6", *flags])
            == 0
        )
        drawn = capsys.readouterr().out
        rows = [re.sub(r"^(\w+) +", r"\1 ", line) for line in drawn.splitlines()[:7]]
        assert rows == [re.sub(r"^ +(\w+) +", r"\1 ", line) for line in picture.splitlines()]
    assert "bidirectional: 24 of 36 pairs, density 66.7% at 6 tokens" in drawn


def test_a_new_pattern_brings_its_options(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))

    @register_pattern("everything_else")
    @dataclasses.dataclass(frozen=True)
    class EverythingElse(Pattern):
        """For this test."""

        ratio: float = 0.5
        length: int | None = None  # the command has a --length of its own
        wrap: bool = False
        names: tuple[str, ...] = ()

        def allows(self, context, head, query, key):
            return query >= key

    options = [
        "--ratio",
        "0.25",
        "--pattern-length",
        "7",
        "--wrap",
        "true",
        "--names",
        "a, b",
        "--length",
        "4",
    ]
    assert main(["show", "everything_else", *options]) == 0
    assert "everything_else(ratio=0.25, length=7, wrap=True, names=('a', 'b'))" in capsys.readouterr().out
    assert main(["show", "everything_else", "--pattern-length", "none", "--length", "4"]) == 0
    assert "length=None" in capsys.readouterr().out
    assert main(["show", "everything_else", "--wrap", "maybe"]) == 2
    assert "--wrap must be true or false, got 'maybe'" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    for arguments, word in (
        (["--help"], "patterns"),
        (["eval", "--help"], "--global-tokens"),
        (["--version"], "0."),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == 0
        assert word in capsys.readouterr().out
    assert set(cli.COMMANDS) == {"eval", "patterns", "show"}
