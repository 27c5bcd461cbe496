"""Which texts a model is adapted on, and how they become samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...documents import Document, Skipped, Texts
from ..data import check_short
from .fields import Section, check_filled, check_least, option


@dataclass
class TextArguments(Section):
    """The texts and what becomes of them; without `text` and `dataset`, the standard library of this Python."""

    text: list[str] | None = option(
        None,
        "UTF-8 text files, one document each; .jsonl, .json (an object per line) and .parquet files, one document per "
        "row; folders, every text, .jsonl and .parquet file in them; default, where no dataset is named: the train "
        "split of the Python standard library",
    )
    glob: str | None = option(None, "files of the folders to read instead, such as '*.log'")
    dataset: str | None = option(None, "hub id, or folder with the files of a dataset, instead of text")
    dataset_config: str | None = option(
        None, "configuration of the dataset, such as wikitext-103-raw-v1 of wikitext"
    )
    split: str | None = option(None, "split of the dataset; default: train")
    streaming: bool = option(
        False, "read the first rows of the dataset, as many as documents says, and download no others"
    )
    column: str | None = option(None, "column with the text of each row; default: text")
    documents: int | None = option(
        None, "the most documents that are read: the longest, with streaming the first; default: all"
    )
    encoding_errors: str | None = option(
        None,
        "where a text is not UTF-8: stop (strict, the default), put U+FFFD there (replace), or leave the document out "
        "(skip)",
    )
    length: int = option(2048, "tokens of a training sample, BOS and other special tokens included")
    short: str = option(
        "pack",
        "what becomes of pieces shorter than a sample: pack puts several into one, of which none sees another; pad "
        "gives each a sample of its own; drop leaves them out",
    )
    skip_shorter_than: int | None = option(
        None, "leave out documents of fewer tokens; default: none may be shorter than 2"
    )

    def __post_init__(self) -> None:
        check_filled("text", self.text)
        self._texts()
        check_least("length", self.length, 2)
        check_short(self.short)
        if self.skip_shorter_than is not None:
            check_least("skip_shorter_than", self.skip_shorter_than, 1)
        super().__post_init__()

    def read_texts(self) -> tuple[list[Document], list[Skipped]]:
        """Return the documents in the order given, and what `encoding_errors` left out.

        Raises:
            ValueError: texts that cannot be read, or none that is left.
        """
        return self._texts().read("train")

    def _texts(self) -> Texts:
        names = {field.name for field in dataclasses.fields(Texts)} - {"spelled"}
        return Texts(**{name: getattr(self, name) for name in names})
