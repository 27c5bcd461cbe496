"""Which texts a training reads."""

import json

import datasets
import pytest

from hf_sparse.documents import Skipped, standard_library
from hf_sparse.train import AdaptationArguments, ConfigParser


def texts_of(**settings):
    documents, skipped = AdaptationArguments(**settings).read_texts()
    assert skipped == []
    return [document.text for document in documents]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": text, "other": text.upper()} for text in ("a", "bbb", "cc", "ddd", "ee")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "note.log").write_text("note")
    return folder


def test_by_default_the_train_split_of_the_standard_library():
    documents, _ = AdaptationArguments().read_texts()
    assert [document.name for document in documents] == [d.name for d in standard_library("train")]
    longest = max(documents, key=lambda document: len(document.text))
    assert AdaptationArguments(documents=1).read_texts() == ([longest], [])


def test_files_folders_columns_and_globs(folder):
    assert texts_of(text=[str(folder)]) == ["a", "bbb", "cc", "ddd", "ee"]
    assert texts_of(text=[str(folder)], column="other", documents=2) == ["BBB", "DDD"]
    assert texts_of(text=[str(folder)], glob="*.log") == ["note"]


def test_the_train_split_of_a_dataset_and_with_streaming_its_first_rows(folder):
    assert texts_of(dataset=str(folder), column="other") == ["A", "BBB", "CC", "DDD", "EE"]
    assert texts_of(dataset=str(folder), documents=2) == ["bbb", "ddd"]
    assert texts_of(dataset=str(folder), documents=2, streaming=True) == ["a", "bbb"]
    with pytest.raises(ValueError, match="has no split 'test'"):
        texts_of(dataset=str(folder), split="test")


def test_what_is_not_utf8_is_left_out_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("tea")
    documents, skipped = AdaptationArguments(text=[str(tmp_path)], encoding_errors="skip").read_texts()
    assert [document.text for document in documents] == ["tea"]
    assert skipped == [Skipped(f"{tmp_path}/a.txt", "is not UTF-8 (byte 0xe9 at offset 3, line 1)")]
    with pytest.raises(ValueError, match=r"none of the texts is left: .*; use encoding_errors replace"):
        AdaptationArguments(text=[f"{tmp_path}/a.txt"], encoding_errors="skip").read_texts()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": 0}, "documents must be >= 1, got 0"),
        ({"text": []}, "text is an empty list"),
        ({"text": ["a.txt"], "dataset": "x"}, "text and dataset both say what to read; give one"),
        ({"split": "test"}, "split goes with dataset, and there is none"),
        ({"text": ["a.txt"], "dataset_config": "x"}, "dataset_config goes with dataset"),
        ({"streaming": True, "documents": 3}, "streaming goes with dataset"),
        ({"dataset": "x", "streaming": True}, "streaming reads the first rows .* with documents N"),
        ({"dataset": "x", "glob": "*.md"}, "glob goes with text"),
        ({"dataset": "x", "encoding_errors": "skip"}, "encoding_errors goes with text"),
        ({"text": ["a.txt"], "encoding_errors": "no"}, "must be one of strict, replace, skip, got 'no'"),
        ({"column": "body"}, "column goes with text or dataset"),
        ({"short": "cut"}, "short must be one of pack, pad, drop, got 'cut'"),
        ({"length": 1}, "length must be a whole number >= 2, got 1"),
        ({"skip_shorter_than": 0}, "skip_shorter_than must be a whole number >= 1, got 0"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        AdaptationArguments(**settings)
    assert "\n" not in str(caught.value)


def test_a_yaml_file_and_the_command_line_say_the_same(tmp_path):
    parser = ConfigParser((AdaptationArguments,))
    path = tmp_path / "c.yaml"
    path.write_text("dataset: org/name\nstreaming: true\ndocuments: 7\nshort: pad\nskip_shorter_than: 5\n")
    words = [
        "--dataset",
        "org/name",
        "--streaming",
        "--documents",
        "7",
        "--short",
        "pad",
        "--skip_shorter_than",
        "5",
    ]
    (written,), (given,) = parser.parse(["--config", str(path)]), parser.parse(words)
    assert written == given and written.streaming is True and written.skip_shorter_than == 5
