"""Results on disk, as a table and as a picture."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse.evaluate import perplexity, plot_loss_by_position, save_results, table
from hf_sparse.evaluate import report as report_module

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 900 : i * 900 + 400] for i in range(6)]


@pytest.fixture
def result(tiny_model, tiny_tokenizer):
    return perplexity(tiny_model, tiny_tokenizer, [*TEXTS, ""], max_length=60, patterns=["streaming_llm"])


def test_every_figure_follows_from_the_files(result, tmp_path):
    written = save_results(result, tmp_path / "deep" / "folder")
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["per_document.jsonl", "results.json"]
    figures = json.loads(
        written[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    rows = [json.loads(line) for line in written[1].read_text().splitlines()]
    assert figures["text"]["skipped_documents"] == ["document 6"]
    assert figures["machine"]["versions"]["torch"] == torch.__version__
    assert figures["config"]["dtype"] == "float32" and figures["config"]["max_length"] == 60
    tokens, size = (sum(row[key] for row in rows) for key in ("tokens", "bytes"))
    assert (figures["text"]["tokens"], figures["text"]["bytes"]) == (tokens, size)
    for i, run in enumerate(figures["runs"]):
        nats = sum(row["runs"][i]["nats"] for row in rows)
        assert run["nats_per_token"] == pytest.approx(nats / tokens)
        assert run["perplexity"] == pytest.approx(math.exp(nats / tokens))
        assert run["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
        assert run["peak_memory_bytes"] > 50 * 2**20 and run["tokens_per_second"] > 0
    assert figures["runs"][0]["pattern"] is None
    assert figures["runs"][1]["pattern"]["pattern"] == {
        "name": "streaming_llm",
        "options": {"sinks": 4, "window": 1020, "positions": "absolute"},
    }
    assert figures["runs"][1]["nats_above_dense"]["units"] == 6


def test_few_documents_are_compared_by_blocks_and_it_says_so(tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 8192
    result = perplexity(
        tiny_model, tiny_tokenizer, [SOURCE[:16_000]], max_length=5000, patterns=["sliding_window"]
    )
    interval = result.difference(result.runs[1], result.runs[0])
    assert (interval.unit, interval.units) == ("blocks of 2048 tokens", math.ceil(result.tokens[0] / 2048))
    assert f"over {interval.units} blocks of 2048 tokens" in table(result)


def test_table_shows_what_ran(result):
    text = table(result)
    dense, sparse = (
        line
        for line in text.splitlines()
        if line.startswith(("dense ", "streaming_llm(sinks=4, window=1020) "))
    )
    assert f"{result.nats_per_token(result.runs[0]):.4f}" in dense and "100.0%" in dense
    assert f"{result.perplexity(result.runs[1]):.3f}" in sparse
    assert "6 documents" in text and "1 documents too short to score" in text


def test_a_failed_write_leaves_the_old_file(result, tmp_path, monkeypatch):
    save_results(result, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_results(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_loss_by_position(result, tmp_path / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_picture_without_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"plots need matplotlib; install it with: pip install 'hf_sparse\[plot\]'"
    ):
        plot_loss_by_position(result, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
