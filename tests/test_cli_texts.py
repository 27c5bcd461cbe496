"""The options that say which texts a command measures."""

import argparse
import json

import datasets
import pytest

from hf_sparse.cli import main
from hf_sparse.cli.texts import LIBRARY_DOCUMENTS, add_text_arguments, read_texts, skipped_note
from hf_sparse.documents import Document, Skipped
from hf_sparse.documents import texts as texts_module


def read(*arguments):
    parser = argparse.ArgumentParser()
    add_text_arguments(parser)
    return read_texts(parser.parse_args([str(argument) for argument in arguments]))


def texts_of(*arguments):
    documents, skipped = read(*arguments)
    assert skipped == []
    return [document.text for document in documents]


@pytest.fixture
def folder(tmp_path):
    """Rows of 1, 3, 2, 3 and 2 characters, a text and a note."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": text, "other": text.upper()} for text in ("a", "bbb", "cc", "ddd", "ee")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "note.log").write_text("note")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_without_texts_the_longest_of_the_standard_library(monkeypatch):
    every = [Document(f"{i:02}.py", "x" * (i * 7 % 50)) for i in range(50)]  # each length once
    monkeypatch.setattr(texts_module, "standard_library", {"test": every}.get)
    documents, skipped = read()
    assert documents == [d for d in every if len(d.text) >= 50 - LIBRARY_DOCUMENTS] and skipped == []
    assert sorted(len(d.text) for d in read("--documents", "2")[0]) == [48, 49]


def test_files_folders_globs_and_columns(folder):
    assert texts_of("--text", folder) == ["a", "bbb", "cc", "ddd", "ee"]
    assert texts_of("--text", folder, "--glob", "*.log") == ["note"]
    assert texts_of("--text", folder / "note.log", "--text", folder, "--column", "other")[:3] == [
        "note",
        "A",
        "BBB",
    ]


@pytest.mark.parametrize(
    ("number", "found"),
    [(1, ["bbb"]), (2, ["bbb", "ddd"]), (3, ["bbb", "cc", "ddd"]), (9, ["a", "bbb", "cc", "ddd", "ee"])],
)
def test_a_number_takes_the_longest_of_equals_the_first_in_their_order(folder, cache, number, found):
    assert texts_of("--text", folder, "--documents", number) == found
    assert texts_of("--dataset", folder, "--documents", number) == found


def test_streaming_takes_the_first(folder, cache):
    assert texts_of("--dataset", folder, "--streaming", "--documents", 2) == ["a", "bbb"]


def test_every_option_of_a_dataset_arrives(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"body": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    flags = (
        "--dataset",
        "wikitext",
        "--dataset-config",
        "wikitext-2-raw-v1",
        "--split",
        "train",
        "--column",
        "body",
    )
    assert texts_of(*flags) == ["x"]
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "train", "streaming": False})]


def test_what_is_left_out_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("tea")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read("--text", tmp_path)
    assert texts_of("--text", tmp_path, "--encoding-errors", "replace") == ["caf\ufffd", "tea"]
    documents, skipped = read("--text", tmp_path, "--encoding-errors", "skip")
    assert [d.text for d in documents] == ["tea"]
    assert skipped == [Skipped(f"{tmp_path}/a.txt", "is not UTF-8 (byte 0xe9 at offset 3, line 1)")]
    assert skipped_note(skipped) == f"1 document left out: {skipped[0].name} {skipped[0].reason}"
    assert skipped_note(skipped * 3).startswith(f"3 documents left out, first: {tmp_path}/a.txt is not UTF-8")
    with pytest.raises(ValueError, match=r"none of the texts is left: .*a\.txt is not UTF-8"):
        read("--text", tmp_path / "a.txt", "--encoding-errors", "skip")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--documents", "0"], "--documents must be >= 1, got 0"),
        (["--text", "a.txt", "--dataset", "x"], "--text and --dataset both say what to read; give one"),
        (["--split", "test"], "--split goes with --dataset, and there is none"),
        (["--split", "", "--text", "a.txt"], "--split goes with --dataset, and there is none"),
        (["--dataset-config", "x"], "--dataset-config goes with --dataset"),
        (["--streaming", "--documents", "3"], "--streaming goes with --dataset"),
        (["--dataset", "x", "--streaming"], "--streaming reads the first rows .* with --documents N"),
        (["--glob", "*.md"], "--glob goes with --text"),
        (["--dataset", "x", "--glob", "*.md"], "--glob goes with --text"),
        (["--dataset", "x", "--encoding-errors", "skip"], "--encoding-errors goes with --text"),
        (["--column", "body"], "--column goes with --text or --dataset"),
        (["--text", __file__, "--column", "body"], "the column 'body' is one of JSON lines or parquet files"),
        (["--text", __file__, "--glob", "*.md"], r"the glob '\*\.md' chooses files of folders"),
        (["--dataset", ""], "the name of the dataset is empty"),
        (["--dataset", "no/name"], "the dataset no/name cannot be loaded .* HF_HUB_OFFLINE"),
    ],
)
def test_contradictions_and_mistakes(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        read(*arguments)


def test_eval_says_what_it_left_out(tiny_model_folder, tmp_path, texts, capsys):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    command = ["eval", tiny_model_folder, "--text", tmp_path / "bad.txt", *texts, "--encoding-errors", "skip"]
    assert main([*map(str, command), "--length", "30", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "6 documents, 174 tokens scored" in out
    assert f"note: 1 document left out: {tmp_path}/bad.txt is not UTF-8" in err
