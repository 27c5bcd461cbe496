"""Which texts a person means: files and folders, a dataset, or else the standard library."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .decoding import Decoder
from .document import Document, Skipped
from .files import iter_documents
from .hub import iter_dataset
from .library import standard_library

_OF_TEXT = ("glob", "encoding_errors")
_OF_DATASET = ("dataset_config", "split", "streaming")


@dataclass(frozen=True)
class Texts:
    """What was asked for, checked when it is made; None is not given, and so is `streaming` where it is False.

    text: files and folders, see `iter_documents`, as are `glob`, `column` and `encoding_errors`.
    dataset: see `iter_dataset`, as are `dataset_config`, `split`, `column` and `streaming`.
    documents: the most that are returned: the longest, with `streaming` the first.
    spelled: gives the name under which messages speak of a setting.

    Raises:
        ValueError: settings that contradict each other, or an unknown value of `encoding_errors`.
    """

    text: Sequence[str] | None = None
    glob: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    streaming: bool | None = None
    column: str | None = None
    documents: int | None = None
    encoding_errors: str | None = None
    spelled: Callable[[str], str] = str

    def __post_init__(self) -> None:
        name = self.spelled
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"{name('documents')} must be >= 1, got {self.documents}")
        if self.text is not None and self.dataset is not None:
            raise ValueError(f"{name('text')} and {name('dataset')} both say what to read; give one of them")
        for names, wanted in ((_OF_TEXT, "text"), (_OF_DATASET, "dataset")):
            if getattr(self, wanted) is None and (given := self._given(names)):
                own = name(next(iter(given)))
                raise ValueError(
                    f"{own} goes with {name(wanted)}, and there is none; give one, or leave {own} out"
                )
        if self.column is not None and self.text is None and self.dataset is None:
            raise ValueError(
                f"{name('column')} goes with {name('text')} or {name('dataset')}, and there is none; give one, or "
                "leave it out"
            )
        if self.streaming and self.documents is None:
            raise ValueError(
                f"{name('streaming')} reads the first rows of a dataset; say how many with {name('documents')} N"
            )
        if self.encoding_errors is not None:
            Decoder(self.encoding_errors)

    def read(self, split: str, library_documents: int | None = None) -> tuple[list[Document], list[Skipped]]:
        """Return the documents in the order given, where a number is asked for the longest ones, and what was left out.

        Args:
            split: that of the library, and of a dataset by default.
            library_documents: the most that are returned of the library, where no number is given.
        Raises:
            ValueError: texts that cannot be read, or none that is left.
        """
        skipped: list[Skipped] = []
        if self.text is not None:
            chosen = self._given(("column", *_OF_TEXT))
            documents = _longest(iter_documents(self.text, **chosen, skipped=skipped), self.documents)
            if not documents:
                raise ValueError(
                    f"none of the texts is left: {skipped[0].name} {skipped[0].reason}; "
                    f"use {self.spelled('encoding_errors')} replace"
                )
            return documents, skipped
        if self.dataset is not None:
            chosen = {"split": split, **self._given(("column", "split", "streaming"))}
            limit = self.documents if self.streaming else None
            rows = iter_dataset(self.dataset, self.dataset_config, **chosen, limit=limit)
            return _longest(rows, self.documents), skipped
        wanted = library_documents if self.documents is None else self.documents
        return _longest(standard_library(split), wanted), skipped

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def _longest(documents: Iterable[Document], wanted: int | None) -> list[Document]:
    """Return the longest documents, of equals the first, in their order; no more of them are held at a time."""
    if wanted is None:
        return list(documents)
    found = heapq.nlargest(wanted, enumerate(documents), key=lambda found: (len(found[1].text), -found[0]))
    return [document for _, document in sorted(found, key=lambda found: found[0])]
