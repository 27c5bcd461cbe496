"""Results on disk and as a table: every figure follows from the rows, and equal rows give equal bytes."""

import argparse
import copy
import csv
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.documents import Document
from hf_sparse.evaluate import output_folder as output_folder_module
from hf_sparse.evaluate import perplexity, save_results, table
from hf_sparse.evaluate.figures import as_json

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 900 : i * 900 + 400] for i in range(6)]
FILES = [
    "curves.csv",
    "evaluation.json",
    "per_document.jsonl",
    "results.csv",
    "results.json",
    "timing.csv",
]


@pytest.fixture
def result(tiny_model, tiny_tokenizer):
    return perplexity(
        tiny_model,
        tiny_tokenizer,
        [*TEXTS, ""],
        max_length=60,
        patterns=[hf_sparse.get_pattern("streaming_llm", sinks=2, window=6)],
        contexts=(20, 50),
        context_targets=8,
        key_tokens=16,
    )


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_figure_follows_from_the_files(result, tmp_path):
    written = save_results(result, tmp_path / "deep" / "folder")
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == FILES
    assert written[0].name == "results.json" and sorted(path.name for path in written) == FILES
    figures = json.loads(
        written[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    lines = (tmp_path / "deep" / "folder" / "per_document.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert figures["text"]["skipped_documents"] == [{"name": "document 6", "reason": "no text"}]
    assert figures["machine"]["versions"]["torch"] == torch.__version__
    assert figures["config"]["dtype"] == "float32" and figures["config"]["max_length"] == 60
    for run in figures["runs"]:
        own = [row for row in rows if row["run"] == run["title"]]
        tokens, size = (sum(row[key] for row in own) for key in ("tokens", "bytes"))
        assert (figures["text"]["tokens"], figures["text"]["bytes"], len(own)) == (tokens, size, 6)
        nats = sum(row["nats"] for row in own)
        assert run["nats_per_token"] == pytest.approx(nats / tokens)
        assert run["perplexity"] == pytest.approx(math.exp(nats / tokens))
        assert run["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
        timing = figures["timing"][run["title"]]
        assert timing["peak_memory_bytes"] > 50 * 2**20 and timing["tokens_per_second"] > 0
    assert figures["runs"][0]["pattern"] is None and figures["runs"][0]["held_against"] is None
    assert figures["runs"][1]["pattern"]["pattern"] == {
        "name": "streaming_llm",
        "options": {"sinks": 2, "window": 6, "positions": "absolute"},
    }
    assert figures["runs"][1]["nats_above_dense"]["units"] == 6
    assert figures["runs"][1]["held_against"] == "dense"


def test_csv_files_have_the_figures_of_results_json(result, tmp_path):
    figures = json.loads(save_results(result, tmp_path)[0].read_text())
    dense, sparse = read_csv(tmp_path / "results.csv")
    run = figures["runs"][1]
    assert [dense["run"], sparse["run"]] == [each["title"] for each in figures["runs"]]
    assert float(sparse["perplexity"]) == run["perplexity"] and int(sparse["calls"]) == run["calls"]
    assert int(sparse["kv_bytes"]) == run["kv_cache"]["bytes"] > 0
    for end in ("low", "high", "units"):
        assert float(sparse[f"nats_above_dense_{end}"]) == run["nats_above_dense"][end]
    assert dense["nats_above_dense"] == dense["nats_above_dense_low"] == ""
    points = [p for p in read_csv(tmp_path / "curves.csv") if p["run"] == run["title"]]
    context = [p for p in points if p["curve"] == "context"]
    assert [int(p["x"]) for p in context] == [20, 50]
    assert [float(p["nats_per_token"]) for p in context] == [
        p["nats_per_token"] for p in run["loss_by_context"]
    ]
    assert [float(p["low"]) for p in context] == [p["above_dense"]["low"] for p in run["loss_by_context"]]
    position = [p for p in points if p["curve"] == "position"]
    assert sum(int(p["tokens"]) for p in position) == figures["text"]["tokens"]
    timing = read_csv(tmp_path / "timing.csv")
    assert float(timing[1]["seconds"]) == figures["timing"][run["title"]]["seconds"]


def test_another_timing_changes_nothing_else(result, tmp_path):
    pytest.importorskip("matplotlib")
    slower = dataclasses.replace(
        result,
        runs=tuple(
            dataclasses.replace(
                run,
                seconds=run.seconds * (2 + i),
                tokens_per_second=run.tokens_per_second / (2 + i),
                served=dataclasses.replace(run.served, seconds=run.served.seconds * (2 + i)),
                peak_memory=run.peak_memory + 10**8,
            )
            for i, run in enumerate(result.runs)
        ),
    )
    for name, each in {"one": result, "two": slower, "again": result}.items():
        save_results(each, tmp_path / name, pictures=True, html=True)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "again", "two")
    ]
    assert contents[0] == contents[1], "saving twice gives other bytes"
    differ = {name for name in contents[0] if contents[0][name] != contents[2][name]}
    assert differ == {"results.json", "timing.csv", "quality_against_speed.png", "report.html"}
    one, two = (json.loads(each["results.json"]) for each in (contents[0], contents[2]))
    assert one.pop("timing") != two.pop("timing") and one == two
    pages = [
        each["report.html"].decode().split('<section id="timing">') for each in (contents[0], contents[2])
    ]
    assert pages[0][0] == pages[1][0]
    assert pages[0][1].split("</section>", 1)[1] == pages[1][1].split("</section>", 1)[1]


def test_few_documents_are_compared_by_blocks_and_it_says_so(tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 8192
    texts = [SOURCE[:16_000], SOURCE[16_000:17_000], SOURCE[17_000:18_000]]
    window = hf_sparse.SlidingWindow(window=16)
    result = perplexity(tiny_model, tiny_tokenizer, texts, max_length=5000, patterns=[window])
    interval = result.difference(result.runs[1], result.runs[0])
    blocks = sum(math.ceil(tokens / 2048) for tokens in result.tokens)
    assert (interval.unit, interval.units) == ("blocks of 2048 tokens", blocks)
    assert f"over {blocks} blocks of 2048 tokens: fewer than 5 documents" in table(result)
    (point, *_) = as_json(result)["runs"][1]["loss_by_position"]
    assert point["above_dense"]["units"] == 3
    assert point["above_dense"]["low"] is None, "an interval over 3 documents"


def test_table_shows_what_was_measured(result):
    runs = [
        dataclasses.replace(run, key_nats=run.nats / 10) for run in result.runs
    ]  # a random model has no key tokens
    result = dataclasses.replace(result, runs=tuple(runs), key_counts=result.tokens // 8)
    text = table(result)
    paragraphs = text.split("\n\n")
    (dense,) = (line for line in paragraphs[1].splitlines() if line.startswith("dense "))
    (sparse,) = (line for line in paragraphs[1].splitlines() if line.startswith("streaming_llm(sinks=2, "))
    first, second = result.runs
    assert f"{result.nats_per_token(first):.4f}" in dense and "100.0%" in dense
    for figure in (
        f"{result.perplexity(second):.3f}",
        f"{result.bits_per_byte(second):.4f}",
        f"{result.key_perplexity(second):.3f}",
        str(result.difference(second, first)),
    ):
        assert figure in sparse
    assert "6 documents" in paragraphs[0]
    assert "perplexity of the last 8 tokens of 6 documents" in paragraphs[2]
    for loss in result.loss_by_context(second):
        assert f"{math.exp(loss):.3f}" in paragraphs[2]
    assert "MiB" in paragraphs[3] and " ms" in paragraphs[3]
    assert f"key ppl: of {result.key_counts.sum()} tokens" in text
    assert "ran: streaming_llm(sinks=2, window=6): 2 layers, 12 calls" in text
    assert "skipped: 1 document (no text): document 6" in text
    assert "word ppl" not in text and "extrapolation" not in text


def test_table_shows_words_of_rolling_windows_and_says_extrapolation(tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 40
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=60, mode="rolling")
    text = table(result)
    assert "rolling windows of 60" in text and f"{result.byte_perplexity(result.runs[0]):.4f}" in text
    assert "word ppl" in text and "byte ppl" in text
    assert "extrapolation: 60 tokens are read at once, the model was trained on 40" in text


def test_table_stays_within_120_columns(tiny_model, tiny_tokenizer):
    windows = "|".join(f"sliding_window(window={2**i})" for i in range(3, 9))
    result = perplexity(tiny_model, tiny_tokenizer, [*TEXTS, ""], max_length=60, patterns=["longformer"])
    dense, sparse = result.runs
    many = [dataclasses.replace(sparse, label=f"{windows.replace('|', ' | ')} {i}") for i in range(20)]
    config = {**result.config, "mode": "rolling"}
    text = table(dataclasses.replace(result, runs=(dense, *many), config=config))
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("sliding_window(window=256)") >= 40


def test_document_names_cannot_break_the_table(tiny_model, tiny_tokenizer):
    documents = [Document("a\x1b[31m\nb", ""), Document("long", TEXTS[0])]
    text = table(perplexity(tiny_model, tiny_tokenizer, documents, max_length=40))
    assert r"a\x1b[31m\nb" in text and "\x1b" not in text


def test_a_failed_write_leaves_the_old_file(result, tmp_path, monkeypatch):
    save_results(result, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_folder_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_results(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("asked", ["pictures", "html"])
def test_without_matplotlib_nothing_is_written(result, tmp_path, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"plots need matplotlib; install it with: pip install 'hf_sparse\[plot\]'"
    ):
        save_results(result, tmp_path / "out", **{asked: True})
    assert not (tmp_path / "out").exists()
    save_results(result, tmp_path / "out")


def test_a_gap_needs_only_the_patterns_measured_both_ways(result):
    dense, sparse = result.runs
    other = dataclasses.replace(sparse, label="other")
    adapted = [copy.copy(dense), copy.copy(sparse)]
    runs = (dense, other, sparse, *(dataclasses.replace(run, adapter="adapter") for run in adapted))
    gaps = as_json(dataclasses.replace(result, runs=runs))["gap_closed"]
    assert [gap["pattern"] for gap in gaps] == [sparse.label]


def test_what_is_not_a_number_is_unknown(result):
    dense, sparse = result.runs
    nats = sparse.nats.copy()
    nats[0] = math.nan
    broken = dataclasses.replace(result, runs=(dense, dataclasses.replace(sparse, nats=nats)))
    (line,) = (
        line for line in table(broken).split("\n\n")[1].splitlines() if line.startswith("streaming_llm")
    )
    assert line.split()[4:6] == ["?", "?"] and "nan" not in line
    json.dumps(as_json(broken), allow_nan=False)
