"""Which texts a command measures: files and folders, a dataset, or else the standard library."""

from __future__ import annotations

import argparse

from ..documents import Document, Skipped, Texts
from ..documents.decoding import ENCODING_ERRORS
from .options import dashed

LIBRARY_DOCUMENTS = 32  # of the standard library, where no number is given
_OPTIONS = (
    *("text", "glob", "encoding_errors", "column", "documents"),
    *("dataset", "dataset_config", "split", "streaming"),
)


def add_text_arguments(parser: argparse.ArgumentParser, split: str = "test") -> None:
    """Give the parser what `read_texts` reads; `split` is the split of the library, and of a dataset by default."""
    group = parser.add_argument_group(
        "texts", f"Without --text and --dataset: the {split} split of this Python's standard library."
    )
    group.add_argument(
        "--text",
        metavar="FILE|FOLDER",
        nargs="+",
        action="extend",
        help="UTF-8 text files, one document each; .jsonl, .json (an object per line) and .parquet files, one document "
        "per row; folders, every text, .jsonl and .parquet file in them that is not hidden",
    )
    group.add_argument(
        "--glob", metavar="PATTERN", help="files of the folders to read instead, in quotes, such as '*.log'"
    )
    group.add_argument("--dataset", metavar="NAME", help="hub id, or folder with the files of a dataset")
    group.add_argument(
        "--dataset-config", metavar="NAME", help="configuration of the dataset, such as wikitext-2-raw-v1"
    )
    group.add_argument("--split", metavar="NAME", help=f"split of the dataset (default {split})")
    group.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="read the first rows of the dataset, download no others",
    )
    group.add_argument("--column", metavar="NAME", help="column with the text of each row (default text)")
    group.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="the N longest documents, with --streaming the first N "
        f"(default: all of --text and --dataset, {LIBRARY_DOCUMENTS} of the library)",
    )
    group.add_argument(
        "--encoding-errors",
        choices=ENCODING_ERRORS,
        help="where a text is not UTF-8: stop (strict, default), put U+FFFD there, or leave the document out",
    )


def read_texts(args: argparse.Namespace, split: str = "test") -> tuple[list[Document], list[Skipped]]:
    """Return the documents in the order given, where a number is asked for the longest ones, and what was left out.

    `split` is that of the library, and of a dataset by default.

    Raises:
        ValueError: options that contradict each other, or texts that cannot be read.
    """
    given = {name: getattr(args, name) for name in _OPTIONS}
    return Texts(**given, spelled=lambda name: f"--{dashed(name)}").read(split, LIBRARY_DOCUMENTS)


def skipped_note(skipped: list[Skipped]) -> str:
    """Return one line on the documents that were left out."""
    first = f"{skipped[0].name} {skipped[0].reason}"
    return (
        f"1 document left out: {first}"
        if len(skipped) == 1
        else f"{len(skipped)} documents left out, first: {first}"
    )
