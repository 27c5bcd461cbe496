"""Documents out of files and folders: one per text file, one per row of JSON lines and parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from .decoding import Decoder, iconv
from .document import Document, Skipped
from .paths import is_folder, list_files, name_of, unreadable
from .rows import has_rows, iter_rows


def read_documents(
    paths: Iterable[str | PathLike[str]],
    *,
    glob: str | None = None,
    column: str | None = None,
    encoding_errors: str = "strict",
    skipped: list[Skipped] | None = None,
) -> list[Document]:
    """Return what `iter_documents` yields, all of it in memory."""
    return list(
        iter_documents(paths, glob=glob, column=column, encoding_errors=encoding_errors, skipped=skipped)
    )


def iter_documents(
    paths: Iterable[str | PathLike[str]],
    *,
    glob: str | None = None,
    column: str | None = None,
    encoding_errors: str = "strict",
    skipped: list[Skipped] | None = None,
) -> Iterator[Document]:
    """Yield the documents of files and folders, in the order given.

    - A ``.jsonl`` or ``.json`` file holds one JSON object per line (blank lines are passed over), a ``.parquet`` file a
      table; every row is a document, named ``path:row``, counting lines or rows from 1. Null is an empty text.
    - Any other file is one document, named by its path.
    - Of a folder the files ending in `TEXT_SUFFIXES`, ``.jsonl`` and ``.parquet`` are read, those of its folders too,
      sorted by path. Hidden files and folders are left out, links to folders are not followed.

    Byte order marks are dropped. An empty document is a document. No more is read than is asked for.

    Args:
        glob: of folders, read the files that match this instead, whatever they end in: ``*.md``, ``docs/*.txt``.
        column: of the rows, the one with the text; by default ``text``.
        encoding_errors: where a text is not valid UTF-8 or Unicode: "strict" raises, "replace" puts U+FFFD in the place
            of what is wrong, "skip" leaves the document out.
        skipped: what "skip" leaves out is appended to this list.
    Raises:
        ValueError: no path was given, one is missing, cannot be read or is not what its name says, a folder without
            texts, a file without rows, a row without the column or with no text in it, `glob` without a folder,
            `column` without rows, or "skip" without `skipped`. Paths are checked at once, contents as they are read.
    """
    if encoding_errors == "skip" and skipped is None:
        raise ValueError("encoding_errors='skip' needs skipped=[], a list that takes what is left out.")
    decoder = Decoder(encoding_errors, [] if skipped is None else skipped)
    named = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not named:
        raise ValueError("no text files were given; name at least one UTF-8 text file.")
    files = list_files([Path(path) for path in named], glob)
    if column is not None and not any(map(has_rows, files)):
        raise ValueError(
            f"the column {column!r} is one of JSON lines or parquet files, and no such file is given; leave it out."
        )
    wanted = "text" if column is None else column
    return (document for file in files for document in _documents(file, wanted, decoder))


def read_text_file(path: str | PathLike[str]) -> Document:
    """Return one UTF-8 text file as one document, whatever it ends in.

    Raises:
        ValueError: it is missing, is a folder, cannot be read or is not UTF-8.
    """
    path = Path(path)
    if is_folder(path):
        raise ValueError(f"{path} is a folder; name a text file in it.")
    (document,) = _text(path, Decoder())
    return document


def _documents(path: Path, column: str, decoder: Decoder) -> Iterator[Document]:
    if not has_rows(path):
        yield from _text(path, decoder)
        return
    empty = True
    for name, text in iter_rows(path, column, decoder):
        empty = False
        if text is not None:
            yield Document(name, text)
    if empty:
        raise ValueError(f"{path} holds no rows; give a file with at least one.")


def _text(path: Path, decoder: Decoder) -> Iterator[Document]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    text = decoder.decode(raw, name_of(path), "file", iconv(path))
    if text is not None:
        yield Document(name_of(path), text)
