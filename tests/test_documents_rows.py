"""Documents out of the rows of JSON lines and parquet files."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_sparse.documents import Document, Skipped, iter_documents, read_documents
from hf_sparse.documents.rows import PARQUET_ROWS


@pytest.fixture
def lines(tmp_path):
    """Writes lines into a file and returns its path."""

    def write(*rows, name="a.jsonl"):
        raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(raw) + b"\n")
        return tmp_path / name

    return write


@pytest.fixture
def table(tmp_path):
    """Writes columns into a parquet file and returns its path."""

    def write(**columns):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    return write


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSONL"])
def test_each_line_is_a_document_named_by_its_number(lines, name):
    path = lines(
        b'\xef\xbb\xbf{"text": "caf\xc3\xa9"}\r', b"", {"text": "two\nlines", "id": 3}, b" \t", name=name
    )
    assert read_documents(path) == [Document(f"{path}:1", "café"), Document(f"{path}:3", "two\nlines")]


def test_another_column_and_nothing_in_it(lines, table):
    for path in (lines({"text": 1, "body": "x"}, {"body": None}), table(text=[1, 2], body=["x", None])):
        assert read_documents(path, column="body") == [Document(f"{path}:1", "x"), Document(f"{path}:2", "")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b"{",
            r"a\.jsonl:2 is not JSON \(Expecting property name .* at character \d\); write one JSON object per line",
        ),
        (b'{"text": "x"} {"text": "y"}', r"a\.jsonl:2 is not JSON \(Extra data at character 14\)"),
        (b"\0\0", r"a\.jsonl:2 is not JSON"),
        (b"[" * 100_000, r"a\.jsonl:2 is no JSON that can be read"),
        (b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:2 is no JSON that can be read"),
        (b'[{"text": "x"}]', r"a\.jsonl:2 is no JSON object; write one per line.*jq -c"),
        (b'"x"', r"a\.jsonl:2 is no JSON object"),
        (b'{"id": 1, "body": "x"}', r"a\.jsonl:2 has no column 'text'; name one of those it has: id, body\."),
        (b"{}", r"a\.jsonl:2 has no column 'text'; name one of those it has: none\."),
        (b'{"text": 1}', r"a\.jsonl:2 holds int in the column 'text', no text; name a column of texts"),
        (b'{"text": ["x"]}', r"a\.jsonl:2 holds list in the column 'text'"),
        (
            b'{"text": "caf\xe9"}',
            r"a\.jsonl:2 is not UTF-8 \(byte 0xe9 at offset 13 of the line\); convert.*iconv",
        ),
        (
            rb'{"text": "ab\ud800"}',
            r"a\.jsonl:2 holds a lone surrogate \(\\ud800 at character 2 of the text\); .*write both halves",
        ),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(lines, line, expected):
    documents = iter_documents(lines({"text": "fine"}, line))
    assert next(documents).text == "fine"
    with pytest.raises(ValueError, match=expected):
        next(documents)


def test_both_halves_of_a_character_are_one(lines):
    (document,) = read_documents(lines(rb'{"text": "\ud83d\ude42"}'))
    assert document.text == "🙂"


def test_lines_that_are_no_text_are_replaced_or_skipped(lines):
    path = lines(b'{"text": "caf\xe9"}', rb'{"text": "x\udc00y"}', {"text": "fine"})
    assert [d.text for d in read_documents(path, encoding_errors="replace")] == [
        "caf\ufffd",
        "x\ufffdy",
        "fine",
    ]
    skipped: list[Skipped] = []
    assert read_documents(path, encoding_errors="skip", skipped=skipped) == [Document(f"{path}:3", "fine")]
    assert [s.name for s in skipped] == [f"{path}:1", f"{path}:2"]
    assert "not UTF-8" in skipped[0].reason and "lone surrogate" in skipped[1].reason


def test_skipping_is_for_texts_not_for_broken_lines(lines):
    with pytest.raises(ValueError, match="is not JSON"):
        read_documents(lines(b"{"), encoding_errors="skip", skipped=[])


def test_a_line_of_ten_million_bytes(lines):
    text = "word " * 2_000_000
    assert read_documents(lines({"text": text}))[0].text == text


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_each_row_of_a_parquet_file_is_a_document(tmp_path, kind):
    rows = PARQUET_ROWS + 3
    texts = pa.array([f"caf\u00e9 {i}" for i in range(rows)]).cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(rows)), "text": texts}), path, row_group_size=100)
    documents = read_documents(path)
    assert documents == [Document(f"{path}:{i + 1}", f"café {i}") for i in range(rows)]


def test_no_more_rows_are_read_than_are_asked_for(table, monkeypatch):
    batches = []
    read = pq.ParquetFile.iter_batches

    def count(self, *args, **kwargs):
        for batch in read(self, *args, **kwargs):
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    documents = iter_documents(table(text=["x"] * (3 * PARQUET_ROWS)))
    assert [next(documents).text for _ in range(3)] == ["x"] * 3
    documents.close()
    assert batches == [PARQUET_ROWS]


def bad_strings():
    """A column of strings of which the second is not UTF-8, as a careless writer makes it."""
    raw = pa.array([b"fine", b"caf\xe9"])
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_a_row_of_a_parquet_file_that_is_not_utf8(table):
    path = table(text=bad_strings())
    with pytest.raises(
        ValueError, match=r"a\.parquet:2 is not UTF-8 \(byte 0xe9 at offset 3 of the row\); write"
    ):
        read_documents(path)
    assert [d.text for d in read_documents(path, encoding_errors="replace")] == ["fine", "caf\ufffd"]
    skipped: list[Skipped] = []
    assert len(read_documents(path, encoding_errors="skip", skipped=skipped)) == len(skipped) == 1


def test_mistakes_in_parquet_files(table, tmp_path):
    path = table(id=[1], body=["x"])
    with pytest.raises(
        ValueError, match=r"a\.parquet has no column 'text'; name one of those it has: id, body\."
    ):
        read_documents(path)
    with pytest.raises(ValueError, match=r"a\.parquet holds int64 in the column 'id', no texts"):
        read_documents(path, column="id")
    path.write_bytes(path.read_bytes()[:-9])
    for content in (path.read_bytes(), b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"a\.parquet is no parquet file that can be read \(.*\); write it again"
        ):
            read_documents(path)


def test_a_damaged_page_is_no_lack_of_permissions(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 999]}), path, compression="snappy", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[8:60] = b"\xff" * 52
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"is no parquet file that can be read") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_files_without_rows(tmp_path, table):
    (tmp_path / "a.jsonl").write_text("\n \n")
    for path in (tmp_path / "a.jsonl", table(text=pa.array([], pa.string()))):
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(path))} holds no rows; give a file with at least one"
        ):
            read_documents(path)


def test_a_column_needs_rows(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        ValueError, match="the column 'body' is one of JSON lines or parquet files, and no such file"
    ):
        iter_documents([tmp_path], column="body")
