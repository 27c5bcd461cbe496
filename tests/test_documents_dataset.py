"""Documents out of datasets; the hub is out of reach."""

import json
import os
import sys

import datasets
import huggingface_hub.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_sparse.documents import Document, iter_dataset, read_dataset

ROWS = [f"row {i}" for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tested(tmp_path):
    """A folder with a dataset of two splits."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["seen"], "id": [0]}), folder / "train.parquet")
    pq.write_table(pa.table({"text": ROWS, "id": range(5)}), folder / "test.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_each_row_of_a_split_is_a_document(tmp_path, kind, streaming, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, texts in {"train": ["seen"], "test": [*ROWS, None]}.items():
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), folder / f"{split}.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    documents = read_dataset(str(folder), streaming=streaming)
    assert documents == [Document(f"{folder}:{i + 1}", text) for i, text in enumerate([*ROWS, ""])]
    assert [d.text for d in read_dataset(str(folder), split="train", streaming=streaming)] == ["seen"]
    assert capsys.readouterr() == ("", "")


def test_a_part_of_a_split_and_a_limit(tested):
    assert [d.text for d in read_dataset(tested, split="test[1:3]")] == ROWS[1:3]
    assert [d.text for d in read_dataset(tested, limit=2)] == ROWS[:2]
    assert len(read_dataset(tested, limit=9)) == 5


@pytest.mark.parametrize("columns", [["text"], None])
def test_a_limit_reads_no_more_rows(columns, monkeypatch):
    def rows():
        yield from ({"text": "a"}, {"text": "b"})
        raise AssertionError("a third row was read")

    features = columns and datasets.Features({name: datasets.Value("string") for name in columns})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    assert stream.column_names == columns
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert [d.text for d in read_dataset("some/name", streaming=True, limit=2)] == ["a", "b"]
    with pytest.raises(ValueError, match="has no column 'body'; name one of those it has: text"):
        read_dataset("some/name", column="body", streaming=True, limit=2)


def test_the_columns_beside_the_text_stay_unread(monkeypatch):
    read = []

    def decode(batch):
        read.extend(batch)
        return batch

    dataset = datasets.Dataset.from_dict({"picture": [b"x"], "text": ["x"]}).with_transform(decode)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    assert read_dataset("some/name") == [Document("some/name:1", "x")]
    assert read == ["text"]


def test_name_and_configuration_go_to_the_library(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_dataset("wikitext", "wikitext-2-raw-v1", "validation") == [Document("wikitext:1", "x")]
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "validation", "streaming": False})]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"split": "dev"},
            r"corpus has no split 'dev' \(.*'train'.*\); choose another split",
        ),
        ({"split": "t est"}, r"has no split 't est' \("),
        ({"split": "test["}, r"corpus has no split 'test\[' \("),
        (
            {"config": "big"},
            r"cannot be loaded \(BuilderConfig 'big' not found. Available: \['default'\]\); check the name",
        ),
        ({"column": "body"}, r"corpus has no column 'body'; name one of those it has: text, id\."),
        ({"column": "id"}, r"corpus:1 holds int in the column 'id', no text; name a column of texts"),
        ({"limit": 0}, r"limit must be a whole number >= 1, got 0"),
        ({"limit": True}, r"limit must be a whole number >= 1, got True"),
    ],
)
def test_mistakes(tested, arguments, streaming, expected):
    with pytest.raises(ValueError, match=expected):
        read_dataset(tested, **arguments, streaming=streaming)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "no-org/no-name",
            r"cannot be loaded \(Couldn't reach .*\); check the spelling .* HF_HUB_OFFLINE=1 only local",
        ),
        ("wikitext", r"the dataset wikitext cannot be loaded \(Couldn't reach"),
        ("./absent", r"there is no folder \./absent; check the spelling, or give a hub id"),
        ("/absent", r"there is no folder /absent"),
        ("a/b/c", r"there is no folder a/b/c"),
        (" ", r"the name of the dataset is empty, got ' '"),
        (__file__, r"is a file, no dataset; give it as a text file"),
    ],
)
def test_datasets_that_are_not_there(name, expected):
    with pytest.raises(ValueError, match=expected):
        iter_dataset(name)


def test_folders_that_are_no_datasets(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty cannot be loaded \(.*\); check the spelling.* folder with data files"
    ):
        iter_dataset(str(tmp_path / "empty"))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    with pytest.raises(ValueError, match=r"saved was written by save_to_disk, .*; write it with to_parquet"):
        iter_dataset(str(tmp_path / "saved"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_file_is_one_sentence_and_nothing_on_stderr(tested, streaming, capfd):
    path = os.path.join(tested, "test.parquet")
    os.truncate(path, 60)
    with pytest.raises(ValueError, match=r"cannot be loaded|cannot be read to its end") as caught:
        read_dataset(tested, streaming=streaming)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.fixture
def bars():
    """The libraries that show progress bars, switched on, whatever an earlier test did."""
    libraries = (datasets.utils, huggingface_hub.utils)
    off = [library for library in libraries if library.are_progress_bars_disabled()]
    for library in off:
        library.enable_progress_bars()
    yield libraries
    for library in off:
        library.disable_progress_bars()


def test_what_the_library_showed_before_it_shows_again(bars, monkeypatch):
    seen = []

    def load(*args, **kwargs):
        off = [library.are_progress_bars_disabled() for library in bars]
        seen.append((*off, datasets.logging.get_verbosity()))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    verbosity = datasets.logging.get_verbosity()
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        read_dataset("some/name")
        load()
    shown, hidden = (False, False, verbosity), (True, True, datasets.logging.CRITICAL)
    assert seen == [hidden, shown, shown, shown]
