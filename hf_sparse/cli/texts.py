"""Which texts a command measures: files and folders, a dataset, or else the standard library."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable
from typing import Any

from ..documents import Document, Skipped, iter_dataset, iter_documents, standard_library
from ..documents.decoding import ENCODING_ERRORS

LIBRARY_DOCUMENTS = 32  # of the standard library, where no number is given
_OF_TEXT = ("glob", "encoding_errors")
_OF_DATASET = ("dataset_config", "split", "streaming")


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
    _check(args)
    skipped: list[Skipped] = []
    if args.text is not None:
        chosen = _given(args, ("column", *_OF_TEXT))
        documents = _longest(iter_documents(args.text, **chosen, skipped=skipped), args.documents)
        if not documents:
            raise ValueError(
                f"none of the texts is left: {skipped[0].name} {skipped[0].reason}; use --encoding-errors replace"
            )
        return documents, skipped
    if args.dataset is not None:
        chosen = {"split": split, **_given(args, ("column", "split", "streaming"))}
        limit = args.documents if args.streaming else None
        rows = iter_dataset(args.dataset, args.dataset_config, **chosen, limit=limit)
        return _longest(rows, args.documents), skipped
    wanted = LIBRARY_DOCUMENTS if args.documents is None else args.documents
    return _longest(standard_library(split), wanted), skipped


def skipped_note(skipped: list[Skipped]) -> str:
    """Return one line on the documents that were left out."""
    first = f"{skipped[0].name} {skipped[0].reason}"
    return (
        f"1 document left out: {first}"
        if len(skipped) == 1
        else f"{len(skipped)} documents left out, first: {first}"
    )


def _longest(documents: Iterable[Document], wanted: int | None) -> list[Document]:
    """Return the longest documents, of equals the first, in their order; no more of them are held at a time."""
    if wanted is None:
        return list(documents)
    found = heapq.nlargest(wanted, enumerate(documents), key=lambda found: (len(found[1].text), -found[0]))
    return [document for _, document in sorted(found, key=lambda found: found[0])]


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other."""
    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents must be >= 1, got {args.documents}")
    if args.text is not None and args.dataset is not None:
        raise ValueError("--text and --dataset both say what to read; give one of them")
    for names, wanted in ((_OF_TEXT, "text"), (_OF_DATASET, "dataset")):
        if getattr(args, wanted) is None and (given := _given(args, names)):
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--{flag} goes with --{wanted}, and there is none; give one, or leave --{flag} out"
            )
    if args.column is not None and args.text is None and args.dataset is None:
        raise ValueError(
            "--column goes with --text or --dataset, and there is none; give one, or leave it out"
        )
    if args.streaming and args.documents is None:
        raise ValueError("--streaming reads the first rows of a dataset; say how many with --documents N")


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
