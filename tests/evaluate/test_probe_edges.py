"""Probes of uncommon tokenizers, patterns, places and processes."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_sparse
from hf_sparse.evaluate.probes import Copy, Material, Passkey, as_json, probe
from hf_sparse.evaluate.probes import plot as plot_module
from hf_sparse.evaluate.probes import run as run_module
from hf_sparse.evaluate.processes import Processes

SMALL = {"lengths": [150], "depths": [0.0, 1.0], "samples": 3}


def words_only():
    """A tokenizer of whole words that has no numbers."""
    words = ["[UNK]", "grass", "is", "green", "PASS_KEY", "The", "=", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def merges_across_the_end_of_the_question():
    """A tokenizer of characters with one token more: "= ", of which the question has the begin, the answer the end."""
    characters = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    vocabulary = {character: i for i, character in enumerate([*characters, "= "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("=", " ")])))


def test_words_that_the_tokenizer_lacks_are_not_asked_for(tiny_model):
    """All answers would be the same unknown token."""
    with pytest.raises(
        ValueError, match=r"has no tokens for '\\nPASS_KEY = .*which passkey asks for; use .* copy"
    ):
        probe(tiny_model, words_only(), ["passkey"], **SMALL)


def test_an_answer_that_begins_within_a_token_of_the_question():
    tokenizer = merges_across_the_end_of_the_question()
    material = Material.of(tokenizer, None, 300)
    sample = Passkey(digits=3).make(material, 300, 0.5, np.random.default_rng(0))
    text = "".join(tokenizer.convert_ids_to_tokens(sample.ids))
    answer = tokenizer.convert_ids_to_tokens(sample.ids[-sample.answer :])
    assert answer[0] == "= " and len(answer) == 4 and "".join(answer[1:]).isdigit()
    assert text.count(f"PASS_KEY {''.join(answer)}") == 2 and len(sample.ids) == 300


def test_every_process_has_what_the_main_one_served(tiny_model, tiny_tokenizer, monkeypatch):
    class Second(Processes):
        def gather(self, rows):
            """What comes of both processes; the samples are all done here."""
            return [["of the main one"], *rows] if rows and isinstance(rows[0], list) else rows

        def share(self, items):
            return list(items)

    monkeypatch.setattr(run_module, "current_processes", lambda: Second(1, 2))
    monkeypatch.setattr("hf_sparse.evaluate.probes.run.Journal", SimpleJournal)
    result = probe(tiny_model, tiny_tokenizer, ["passkey"], **SMALL)
    assert [run.served for run in result.runs] == ["of the main one"]


class SimpleJournal:
    def __init__(self, *args):
        self.rows = []

    def append(self, rows):
        self.rows += rows

    def finish(self, order):
        return sorted(self.rows, key=order)


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        (hf_sparse.SlidingWindow(16), 16),
        (hf_sparse.get_pattern("dilated_window", window=16, dilation=2), 32),
        (hf_sparse.get_pattern("dilated_window", window=16, dilation=(1, 3)), 48),
        (hf_sparse.SlidingWindow(16) | hf_sparse.SlidingWindow(20), 20),
        (hf_sparse.get_pattern("rerope", window=16), None),
        (hf_sparse.get_pattern("self_extend", window=64, pattern=hf_sparse.SlidingWindow(8)), 8),
        (hf_sparse.get_pattern("longformer", window=(8, 16)), None),
        (hf_sparse.get_pattern("strided"), None),
    ],
    ids=str,
)
def test_the_mark_lies_where_the_window_ends(pattern, reach):
    assert run_module._window(pattern) == reach


def test_lines_go_from_near_to_far_in_whatever_order_distances_are_given(
    tiny_model, tiny_tokenizer, monkeypatch
):
    pytest.importorskip("matplotlib")
    window = hf_sparse.SlidingWindow(16)
    options = {"lengths": [100], "distances": [60, 8, 30], "samples": 2, "patterns": [window]}
    figures = as_json(probe(tiny_model, tiny_tokenizer, [Copy(block=8)], **options))
    drawn = []
    monkeypatch.setattr(plot_module, "png", drawn.append)
    plot_module.probe_pictures(figures)
    lines = drawn[0].axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[8, 30, 60], [8, 30, 60], [16, 16]]
    cells = {cell["place"]: cell["tokens_right"]["estimate"] for cell in figures["runs"][1]["cells"]}
    assert list(lines[1].get_ydata()) == [cells[8], cells[30], cells[60]]


def test_a_pattern_that_does_not_fit_the_model_is_found_before_anything_is_measured(
    tiny_model, tiny_tokenizer, tmp_path
):
    patterns = ["sliding_window", hf_sparse.Longformer(window=16, dilation=(1, 2, 3))]
    with pytest.raises(ValueError, match="dilation"):
        probe(tiny_model, tiny_tokenizer, ["passkey"], patterns=patterns, output=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"probes": ["copy"], "distances": [np.int64(64)]},
            "a distance must be a whole number of tokens, got",
        ),
        ({"probes": ["copy"], "distances": [64.0]}, "a distance must be a whole number of tokens, got 64.0"),
        ({"depths": ["0.5"]}, "a depth must be a number, got '0.5'"),
        ({"depths": [True]}, "a depth must be a number, got True"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        (
            {"prefill_chunk": 40, "batch_size": 2},
            "prefill_chunk=40 reads one sample at a time, got batch_size=2",
        ),
    ],
)
def test_mistakes(options, message, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    arguments = {"probes": ["passkey"], "lengths": [150], "samples": 2, "output": tmp_path / "out", **options}
    with pytest.raises(ValueError, match=message):
        probe(tiny_model, tiny_tokenizer, **arguments)
    assert not (tmp_path / "out").exists()


def test_one_run_that_finds_all_and_one_that_finds_nothing_are_told_apart_with_doubt(
    tiny_model, tiny_tokenizer
):
    result = probe(tiny_model, tiny_tokenizer, ["passkey"], patterns=[hf_sparse.SlidingWindow(8)], **SMALL)
    dense, sparse = result.runs
    object.__setattr__(dense, "right", dense.answered)
    object.__setattr__(sparse, "right", np.zeros_like(sparse.answered))
    cell = as_json(result)["runs"][1]["cells"][0]
    for name in ("accuracy", "tokens_right"):
        above = cell["above_dense"][name]
        assert above["estimate"] == -1.0 and above["low"] == -1.0 and -0.6 < above["high"] < 0
    json.dumps(cell, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_model_in_bfloat16(dtype, tiny_model, tiny_tokenizer):
    model = tiny_model.to(dtype)
    result = probe(model, tiny_tokenizer, ["passkey"], patterns=["sliding_window"], **SMALL)
    assert result.config["dtype"] == "bfloat16"
    assert all(np.isfinite(run.nats).all() for run in result.runs)
