"""Texts out of the rows of JSON lines and parquet files, with a defined outcome for every row that has none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .decoding import Decoder, iconv
from .paths import ROW_SUFFIXES, name_of, unreadable

PARQUET_ROWS = 256  # held in memory at a time


def has_rows(path: Path) -> bool:
    """True where each row of the file is a document."""
    return path.suffix.lower() in ROW_SUFFIXES


def iter_rows(path: Path, column: str, decoder: Decoder) -> Iterator[tuple[str, str | None]]:
    """Yield ``path:row`` and the text in a column of each row; None for a text that the decoder leaves out.

    Raises:
        ValueError: the file cannot be read or is not what its name says, a row lacks the column or holds no text in it.
    """
    rows = (
        _parquet(path, column, decoder)
        if path.suffix.lower() == ".parquet"
        else _json_lines(path, column, decoder)
    )
    for name, text in rows:
        yield name, None if text is None else decoder.check(text, name)


def row_text(value: Any, name: str, column: str) -> str:
    """Return the text in a column of a row; nothing (null) is an empty text.

    Raises:
        ValueError: the value is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{name} holds {kind} in the column {column!r}, no text; name a column of texts.")
    return value


def missing_column(name: str, column: str, columns: Iterable[object]) -> ValueError:
    """What to raise where a table or a row lacks a column."""
    known = ", ".join(map(str, columns)) or "none"
    return ValueError(f"{name} has no column {column!r}; name one of those it has: {known}.")


def _json_lines(path: Path, column: str, decoder: Decoder) -> Iterator[tuple[str, str | None]]:
    for number, raw in enumerate(_lines(path), 1):
        name = f"{name_of(path)}:{number}"
        line = decoder.decode(raw, name, "line", iconv(path))
        if line is None:
            yield name, None
        elif line.strip():
            yield name, _field(line, name, column)


def _field(line: str, name: str, column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not JSON ({error.msg} at character {error.pos}); write one JSON object per line."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{name} is no JSON that can be read ({error}); take the line out.") from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{name} is no JSON object; write one per line, such as {{"{column}": "..."}} '
            "(jq -c '.[]' makes such lines of an array)."
        )
    if column not in row:
        raise missing_column(name, column, row)
    return row_text(row[column], name, column)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise unreadable(path, error) from None


def _parquet(path: Path, column: str, decoder: Decoder) -> Iterator[tuple[str, str | None]]:
    for number, value in enumerate(_parquet_column(path, column), 1):
        name = f"{name_of(path)}:{number}"
        cure = f"write the column {column!r} again, as UTF-8."
        yield name, "" if value is None else decoder.decode(value, name, "row", cure)


def _parquet_column(path: Path, column: str) -> Iterator[bytes | None]:
    """Yield the bytes of each row's text: strings are not checked when written, and one bad row would hide others."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            schema = table.schema_arrow
            if column not in schema.names:
                raise missing_column(name_of(path), column, schema.names)
            kind = schema.field(column).type
            if not _is_text(kind):
                raise ValueError(
                    f"{path} holds {kind} in the column {column!r}, no texts; name a column of texts."
                )
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                yield from batch.column(0).cast(pa.large_binary()).to_pylist()
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} is no parquet file that can be read ({reason}); write it again.") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)
