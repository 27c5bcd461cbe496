"""The command line: what it prints, writes and draws."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Literal

import pytest

import hf_sparse
from hf_sparse import cli
from hf_sparse.cli import main
from hf_sparse.cli.options import JSON_FILE
from hf_sparse.patterns import (
    Pattern,
    available_patterns,
    get_pattern,
    pattern_class,
    register_pattern,
    registry,
)
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
    assert {"loss_by_position.png", "per_document.jsonl", "results.csv"} <= set(os.listdir(out_folder))
    assert "report.html" not in os.listdir(out_folder)
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
        assert len(line.split("  --")[0]) > len(name) + 10, "no sentence about it"
        for field in dataclasses.fields(pattern_class(name)):
            assert f"--{field.name.replace('_', '-')} " in line


def test_eval_measures_a_union_and_a_stored_pattern(tiny_model_folder, texts, tmp_path, capsys):
    stored = {
        "version": 1,
        "pattern": {"per_head": [{"name": "sliding_window", "options": {"window": w}} for w in (2, 2, 9, 9)]},
        "layers": [1],
    }
    (tmp_path / "mine.json").write_text(json.dumps(stored))
    command = ["eval", str(tiny_model_folder), "--text", *texts, "--length", "100", "--quiet"]
    command += ["--pattern", "sliding_window|strided", "--window", "4", "--stride", "7"]
    command += ["--pattern", str(tmp_path / "mine.json"), "--output", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().err
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["label"] for run in runs][:2] == [
        "dense",
        "sliding_window(window=4) | strided(stride=7, anchor='relative')",
    ]
    assert runs[2]["pattern"]["layers"] == [1] and runs[2]["label"].endswith(" in layers 1")
    assert "per_head" in runs[2]["pattern"]["pattern"]


def test_eval_resolves_what_adapts_to_the_length(tiny_model_folder, texts, capsys):
    command = ["eval", str(tiny_model_folder), "--text", *texts, "--length", "64", "--quiet"]
    assert main([*command, "--pattern", "grouped_heads"]) == 0, capsys.readouterr().err
    assert "window=90" in capsys.readouterr().out  # 128 * sqrt(64 / 128)


def test_show_draws_the_picture_of_the_docstring(capsys):
    pictures = re.findall(r"    key .*(?:\n    \d.*)+", longformer_doc)
    for flags, picture in zip(([], ["--bidirectional"]), pictures[:2], strict=True):
        command = ["show", "longformer", "--window", "2", "--global-tokens", "0", "--length", "6", *flags]
        assert main(command) == 0
        shown = capsys.readouterr().out
        rows = [re.sub(r"^(\w+) +", r"\1 ", line) for line in shown.splitlines()[:7]]
        assert rows == [
            re.sub(r"^ +(\w+) +|  +bidirectional$", r"\1 ", line).rstrip() for line in picture.splitlines()
        ]
    assert "bidirectional: 24 of 36 pairs, density 66.7% at 6 tokens" in shown


@pytest.fixture
def own_registry(monkeypatch):
    """Patterns registered in the test are gone after it."""
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))


def test_every_option_a_new_pattern_brings_is_read_by_its_annotation(own_registry, capsys):
    @register_pattern("everything_else")
    @dataclasses.dataclass(frozen=True)
    class EverythingElse(Pattern):
        """For this test."""

        ratio: float | None = 0.5
        length: int | None = None  # the command has a --length of its own
        wrap: bool = False
        names: tuple[str, ...] = ()
        reach: int | tuple[int | None, ...] = 4
        grid: tuple[tuple[int, ...], ...] = ()
        corner: tuple[int, float] = (0, 1.0)
        mode: Literal["near", "far"] | int = "near"
        table: dict[str, int] | None = None

        def allows(self, context, head, query, key):
            return query >= key

    defaults = get_pattern("everything_else")

    def shown(*options):
        status = main(["show", "everything_else", "--length", "4", "--lengths", "4", *options])
        out, err = capsys.readouterr()
        return err if status else out

    for options, expected in {
        ("--ratio", "0.25"): {"ratio": 0.25},
        ("--ratio", "none"): {"ratio": None},
        ("--pattern-length", "7", "--wrap", "true"): {"length": 7, "wrap": True},
        ("--names", "a, b"): {"names": ("a", "b")},
        ("--reach", "5"): {"reach": 5},
        ("--reach", "5,"): {"reach": (5,)},
        ("--reach", "256,none,512"): {"reach": (256, None, 512)},
        ("--grid", "1,2;3"): {"grid": ((1, 2), (3,))},
        ("--grid", ""): {"grid": ()},
        ("--corner", "2,3"): {"corner": (2, 3.0)},
        ("--mode", "far"): {"mode": "far"},
        ("--mode", "3"): {"mode": 3},
    }.items():
        assert f"{dataclasses.replace(defaults, **expected)}, causal" in shown(*options), options
    for options, expected in {
        ("--ratio", "half"): "--ratio must be a number or none, got 'half'",
        ("--wrap", "maybe"): "--wrap must be true or false, got 'maybe'",
        ("--pattern-length", "x"): "--pattern-length must be a whole number or none, got 'x'",
        ("--names", "a,,b"): "--names must be words separated by commas, got 'a,,b'",
        ("--grid", "1;x"): "--grid must be lists separated by semicolons such as 1,2;3,4, got '1;x'",
        ("--corner", "1,2,3"): "--corner must be 2 values separated by commas, got '1,2,3'",
        ("--mode", "middle"): "--mode must be 'near' or 'far' or a whole number, got 'middle'",
        (
            "--table",
            "{}",
        ): "--table of everything_else cannot be written on the command line; put the pattern into a "
        'JSON file, {"name": "everything_else", "options": {"table": ...}}, and give its path',
    }.items():
        assert expected in shown(*options), options
    assert main(["patterns"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("everything_else")]
    assert "For this test.  --ratio 0.5 --length none --wrap false --names ''" in line
    assert f"--corner 0,1.0 --mode near --table {JSON_FILE}" in line


PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
import hf_sparse

@hf_sparse.register_pattern("every_other_{number}")
@dataclass(frozen=True)
class EveryOther(hf_sparse.Pattern):
    "Keys at an even distance."

    reach: tuple[int, ...] = (4,)

    def allows(self, context, head, query, key):
        return ((query - key) % 2 == 0) & (query - key < max(self.reach))
"""


@pytest.fixture
def plugin(tmp_path, own_registry):
    path = tmp_path / "my_patterns.py"
    path.write_text(PLUGIN.format(number=1))
    return str(path)


def test_the_pattern_of_a_plugin_is_listed_shown_and_measured(plugin, tmp_path, texts, capsys):
    other = tmp_path / "other.py"
    other.write_text(PLUGIN.format(number=2))
    assert main(["patterns", "--plugin", plugin, "--plugin", str(other), "--plugin", plugin]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("every_other_1", "every_other_2"):
        assert any(re.match(rf"{name} +Keys at an even distance\.  --reach 4$", line) for line in lines)

    assert main(["--plugin", plugin, "show", "every_other_1", "--reach", "2,3", "--length", "6"]) == 0
    out = capsys.readouterr().out
    assert "\n5     . . . x . x\n" in out and "every_other_1(reach=(2, 3)), causal: 10 of 21 pairs" in out
    with pytest.raises(SystemExit):
        main(["show", "--help", f"--plugin={plugin}"])
    assert re.search(r"--reach VALUE +of every_other_1: 4", capsys.readouterr().out)

    base = str(Path(__file__).resolve().parents[1] / "recipes" / "tiny_base")
    command = [
        "eval",
        base,
        "--pattern",
        "every_other_1",
        "--reach",
        "9",
        "--text",
        texts[0],
        "--length",
        "40",
    ]
    assert main([*command, "--plugin", plugin, "--quiet", "--output", str(tmp_path / "out")]) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert (runs[1]["label"], runs[1]["layers"]) == ("every_other_1(reach=(9,))", 6)
    assert runs[1]["nats_per_token"] != runs[0]["nats_per_token"]


def test_a_checkpoint_with_a_plugin_pattern_asks_for_it(
    plugin, tiny_model, tiny_tokenizer, texts, tmp_path, capsys, monkeypatch
):
    from peft import LoraConfig, get_peft_model

    without = dict(registry._PATTERNS)
    hf_sparse.patterns.load_plugin(plugin)
    saved, adapter = tmp_path / "saved", tmp_path / "adapter"
    tiny_tokenizer.save_pretrained(saved)
    hf_sparse.patch_model(tiny_model, "every_other_1", reach=(6,))
    tiny_model.save_pretrained(saved)
    tiny_model.name_or_path = str(saved)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    hf_sparse.save_adapter(get_peft_model(tiny_model, config), adapter)

    for folder in (saved, adapter):
        command = ["eval", str(folder), "--text", texts[0], "--length", "40", "--quiet"]
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_PATTERNS", dict(without))
            assert main(command) == 2
            err = capsys.readouterr().err
            assert "names the pattern 'every_other_1'" in err and "--plugin FILE.py" in err
            assert err.count("\n") == 1 and str(folder) in err
        assert main([*command, "--plugin", plugin]) == 0
        assert "every_other_1(reach=(6,))" in capsys.readouterr().out


def test_help_names_the_commands(capsys):
    for arguments, word in (
        (["--help"], "patterns"),
        (["eval", "--help"], "--global-tokens"),
        (["calibrate", "--help"], "--candidates"),
        (["adapt", "--help"], "--lora-r"),
        (["merge", "--help"], "--overwrite"),
        (["--version"], "0."),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == 0
        assert word in capsys.readouterr().out
    assert set(cli.COMMANDS) == {
        *(
            "adapt",
            "analyze",
            "calibrate",
            "compare",
            "eval",
            "generate",
            "lm-eval",
            "merge",
            "patterns",
            "probe",
            "show",
        )
    }
