"""The comparison of all patterns, run as a person runs it at a tiny size, and what its report says."""

import csv
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint, make_plan

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
LABELS = ["window-128", "atrous-16", "layered-512+dense/3"]
PARTS = ["quality", "prompt", "forward", "backward", "memory"]
PICTURES = ["quality_against_speed.png", "operators.png", "memory.png", "loss_by_position_256.png"]


def run(*arguments):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = (sys.executable, RECIPES / "compare_patterns.py", *map(str, arguments))
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The arguments of a comparison of a random model at a trained length and beyond it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=192,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(RECIPES / "tiny_base" / name, folder / "model" / name)
    texts = [folder / f"{i}.txt" for i in range(6)]
    for i, text in enumerate(texts):
        text.write_text("\n".join(f"line {j * (i + 3)} of a text" for j in range(100 if i else 3)))
    return [
        *("--model", folder / "model", "--text", *texts, "--lengths", "160,256", "--documents", 5),
        *("--repeats", 1, "--patterns", ",".join(LABELS)),
    ]


@pytest.fixture(scope="module")
def made(asked, tmp_path_factory):
    """The folder of the report and that of the parts."""
    folder = tmp_path_factory.mktemp("comparison")
    done = run(*asked, "--output", folder / "out", "--work", folder / "work")
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "no bars where nobody looks"
    return folder / "out", folder / "work"


@pytest.fixture
def recipe(monkeypatch, capsys):
    """The recipe, to be called in this process: gives the exit status and what was printed to both streams."""
    monkeypatch.syspath_prepend(str(RECIPES))
    compare_patterns = importlib.import_module("compare_patterns")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["recipes/compare_patterns.py", *map(str, arguments)])
        status = compare_patterns.main()
        return status, *capsys.readouterr()

    return call


def test_every_pattern_is_measured_on_the_model_and_on_the_operator(made):
    out, _ = made
    record = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert record["not_measured"] == [] and list(record["lengths"]) == ["160", "256"]
    with open(out / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 and {row["pattern"] for row in rows} == {"dense", *LABELS}
    for row in rows:
        n, parts = int(row["length"]), record["lengths"][row["length"]]
        assert row["extrapolation"] == str(n > 192)
        runs = {run["title"]: run for run in parts["quality"]["runs"]}
        assert float(row["perplexity"]) == runs[row["options"]]["perplexity"] > 1
        assert int(row["kv_bytes"]) > 0 and int(row["prompt_bytes"]) >= 0
        assert parts["quality"]["text"]["documents"] == 5, "the text that is too short is left out"
        if row["pattern"] == "dense":
            continue
        seconds = {label: prompt["seconds"] for label, prompt in parts["prompt"].items()}
        assert float(row["prompt_times"]) == seconds["dense"] / seconds[row["pattern"]]
        assert float(row["nats_above_dense"]) == runs[row["options"]]["nats_above_dense"]["estimate"]
        operator = row["pattern"] != "layered-512+dense/3"
        for column in ("pairs_limit", "forward_ms", "backward_times", "forward_bytes", "backward_bytes"):
            assert (float(row[column]) > 0) if operator else row[column] == "", column
    window = next(row for row in rows if (row["pattern"], row["length"]) == ("window-128", "256"))
    pairs = 256 * 128 - 128 * 127 / 2
    # The last token of a text is scored but not read, and would have seen 128 keys.
    assert float(window["keys_per_query"]) == pytest.approx((pairs - 128) / 255)
    assert float(window["pairs_limit"]) == pytest.approx(256 * 257 / 2 / pairs, rel=1e-3)


def test_the_page_answers_and_marks_what_is_beyond_the_training(made):
    out, _ = made
    page = (out / "report.html").read_text(encoding="utf-8")
    assert (
        page.index("Which pattern to take") < page.index("160 tokens</h2>") < page.index("One attention call")
    )
    assert "<h2>256 tokens (extrapolation)</h2>" in page and "160 tokens (extrapolation)" not in page
    assert "quality at 256 is extrapolation" in page and "trained on 192 tokens" in page
    assert page.count("data:image/png") == len(PICTURES) and "<script" not in page and 'src="http' not in page
    assert "python " in page and "compare_patterns.py" in page and torch.__version__ in page
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_report_only_makes_the_same_files_again(made, recipe, tmp_path):
    out, _ = made
    shutil.copy(out / "comparison.json", tmp_path)
    status, _, errors = recipe("--report-only", "--output", tmp_path)
    assert status == 0, errors
    for path in out.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_goes_on_with_the_parts_that_are_missing(made, asked, recipe, tmp_path):
    out, work = made
    again = tmp_path / "work"
    shutil.copytree(work, again)
    (again / "256" / "forward.json").unlink()
    memory = json.loads((again / "160" / "memory.json").read_text())
    del memory["atrous-16"]
    (again / "160" / "memory.json").write_text(json.dumps(memory))
    status, printed, errors = recipe(*asked, "--output", tmp_path / "out", "--work", again)
    assert status == 0, errors
    assert [line.split(";")[0] for line in printed.splitlines() if "/2" in line[:4]] == [
        "1/2  memory at 160 tokens",
        "2/2  forward at 256 tokens",
    ]
    before, after = (
        json.loads((folder / "comparison.json").read_text())["lengths"] for folder in (out, tmp_path / "out")
    )
    for n, part in ((n, part) for n in before for part in PARTS):
        if (n, part) not in (("160", "memory"), ("256", "forward")):
            assert after[n][part] == before[n][part], (n, part)
    assert after["160"]["memory"].keys() == before["160"]["memory"].keys()


def test_what_was_not_measured_is_said_and_the_rest_reported(asked, recipe, tmp_path):
    work = ("--output", tmp_path / "out", "--work", tmp_path / "work")
    status, _, errors = recipe(*asked, *work, "--minutes", 0)
    assert status == 1
    assert errors.count("not measured: ") == 10 and "--minutes" in errors
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Not measured</h2>" in page and "quality at 160 tokens: " in page and "<img" not in page


def test_a_single_document_has_no_interval(made, recipe, tmp_path):
    record = json.loads((made[0] / "comparison.json").read_text(encoding="utf-8"))
    for run in record["lengths"]["256"]["quality"]["runs"][1:]:
        run["nats_above_dense"] |= {"low": None, "high": None}
    (tmp_path / "comparison.json").write_text(json.dumps(record), encoding="utf-8")
    status, _, errors = recipe("--report-only", "--output", tmp_path)
    assert status == 0, errors
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<td>[+-]0\.\d{3}</td>", page) and re.search(r"<td>[+-]0\.\d{3} \[", page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--patterns", "window-129"), "there is no pattern 'window-129' here; choose from: window-128"),
        (("--lengths", "160,99999"), "no document has 99,999 tokens, the longest has"),
        (("--report-only",), "No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(asked, recipe, tmp_path, arguments, message):
    status, _, errors = recipe(*asked, "--output", tmp_path / "out", "--work", tmp_path / "work", *arguments)
    assert status == 2
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_comparison_are_not_mixed_in(made, asked, recipe, tmp_path):
    _, work = made
    status, _, errors = recipe(*asked, "--output", tmp_path, "--work", work, "--repeats", 2)
    assert status == 2 and "another comparison (other repeats)" in errors


def test_all_registered_patterns_are_there_with_about_as_many_keys(recipe):
    from compare_patterns_cases import CHOICES, EQUAL_TO_DENSE, PART_OF_UNIONS

    left_out = {EQUAL_TO_DENSE, PART_OF_UNIONS}
    assert {c.pattern.name for c in CHOICES if c.pattern.name} == {*static_patterns()} - left_out
    assert len({c.label for c in CHOICES}) == len({str(c.pattern) for c in CHOICES}) == len(CHOICES)
    others = {"window-128", "window-2048", "streaming-4+2044"}
    for choice in CHOICES:
        plan = make_plan(choice.pattern, Constraint(), 8192, 8192, heads=8)
        if choice.label not in others:
            assert 250 <= plan.pairs / 8192 <= 520, choice.label


def test_the_pattern_to_take_is_the_fastest_within_the_loss(recipe):
    from compare_patterns_rows import best_within, unbeaten

    def row(name, above, times):
        return {"pattern": name, "nats_above_dense": above, "prompt_times": times}

    rows = [
        row("dense", None, 1.0),
        row("slow", -0.01, 0.9),
        row("near", math.log(1.009), 2.0),
        row("worse", 0.03, 1.9),
        row("fast", 0.04, 3.0),
        row("unknown", 0.041, None),
        row("broken", 900.0, 9.0),
    ]
    assert unbeaten(rows) == {"near", "fast"}
    assert best_within(rows, 0.01)["pattern"] == "near"
    assert best_within(rows, 0.05)["pattern"] == "fast"
    assert best_within(rows[:2], 0.05) is None, "nothing is faster than dense"
