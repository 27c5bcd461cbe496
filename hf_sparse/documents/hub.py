"""Documents out of a dataset of the hub, or of a local folder that `datasets` understands: one per row."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from .document import Document
from .rows import missing_column, row_text


def read_dataset(
    name: str,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    streaming: bool = False,
    limit: int | None = None,
) -> list[Document]:
    """Return what `iter_dataset` yields, all of it in memory."""
    return list(iter_dataset(name, config, split, column, streaming, limit))


def iter_dataset(
    name: str,
    config: str | None = None,
    split: str = "test",
    column: str = "text",
    streaming: bool = False,
    limit: int | None = None,
) -> Iterator[Document]:
    """Yield the rows of one split of a dataset as documents ``name:row``, counting from 1; null is an empty text.

    Args:
        name: a hub id, or a folder with data files.
        config: of a dataset with several, such as ``wikitext-2-raw-v1`` of ``wikitext``.
        split: also a part of one, such as ``test[:100]``, unless streaming.
        column: the one with the text.
        streaming: read rows as they arrive, instead of bringing all of them onto this machine first.
        limit: stop after so many rows, and read no more; None reads all.
    Raises:
        ValueError: a dataset that is not there or cannot be read, a split or column that it lacks, a column without
            texts, or `limit` < 1.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a whole number >= 1, got {limit!r}.")
    _check_name(name)
    dataset = _load(name, config, split, streaming)
    columns = dataset.column_names  # None where streaming finds out with the first row
    if columns is not None:
        if column not in columns:
            raise missing_column(f"the dataset {name}", column, columns)
        dataset = dataset.select_columns([column])  # pictures and sounds beside the text would be decoded
    rows = itertools.islice(_rows(dataset, name), limit)
    return _documents(rows, name, column)


def _check_name(name: str) -> None:
    if not name.strip():
        raise ValueError(
            f"the name of the dataset is empty, got {name!r}; give a hub id such as org/name, or a folder."
        )
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file, no dataset; give it as a text file, or name its folder.")
    if os.path.isdir(name):
        if any(os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"{name} was written by save_to_disk, which load_dataset does not read; write it with to_parquet."
            )
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}; check the spelling, or give a hub id such as org/name.")


def _load(name: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with _quiet_without_terminal():
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise _not_loaded(name, split, error) from None


def _not_loaded(name: str, split: str, error: Exception) -> ValueError:
    reason = _one_line(error)
    if re.search("(unknown|bad) split|split name|unrecognized instruction", reason, re.IGNORECASE):
        return ValueError(f"the dataset {name} has no split {split!r} ({reason}); choose another split.")
    if isinstance(error, ConnectionError):
        cure = (
            "check the spelling and the connection; with HF_HUB_OFFLINE=1 only local folders and what was "
            "downloaded before are found"
        )
    elif isinstance(error, FileNotFoundError):
        cure = "check the spelling, log in with hf auth login where it is private, or give a folder with data files"
    else:
        cure = "check the name and the configuration"
    return ValueError(f"the dataset {name} cannot be loaded ({reason}); {cure}.")


def _rows(dataset: Any, name: str) -> Iterator[Any]:
    from datasets.exceptions import DatasetsError

    try:
        yield from dataset
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the dataset {name} cannot be read to its end ({_one_line(error)}); try again."
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _documents(rows: Iterator[Any], name: str, column: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        where = f"{name}:{number}"
        if column not in row:
            raise missing_column(where, column, row)
        yield Document(where, row_text(row[column], where, column))


@contextlib.contextmanager
def _quiet_without_terminal() -> Iterator[None]:
    """Keep progress bars and log lines of `datasets` and the hub's client out of what is no terminal."""
    import datasets
    import huggingface_hub.utils

    with contextlib.ExitStack() as restored:
        if not sys.stderr.isatty():
            restored.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)
            for library in (datasets.utils, huggingface_hub.utils):
                if not library.are_progress_bars_disabled():
                    restored.callback(library.enable_progress_bars)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # the user's environment may insist on bars
                        library.disable_progress_bars()
        yield
