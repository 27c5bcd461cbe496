"""One text and its name, and what is said of those that are left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and the name it is reported under."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document that was left out, and why."""

    name: str
    reason: str


def named(documents: Iterable[Document | str]) -> Iterator[Document]:
    """Yield the documents; plain strings get their place as a name.

    Raises:
        ValueError: one text where a list of them belongs, or something that is no text.
    """
    if isinstance(documents, (str, bytes, Document)):
        raise ValueError("documents must be a list of texts, got a single one; put it into a list.")
    for place, document in enumerate(documents):
        if isinstance(document, str):
            document = Document(f"document {place}", document)
        if not isinstance(document, Document):
            kind = type(document).__name__
            raise ValueError(
                f"document {place} is {kind}, no text; give strings, or hf_sparse.documents.Document."
            )
        yield document


def fingerprint(documents: Iterable[Document]) -> str:
    """The SHA-256 of all names and texts, as hex: equal exactly where the documents and their order are equal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def refuse_empty(documents: Iterable[Document], cure: str = "give a file with text in it") -> None:
    """Raise ValueError for the first document that holds nothing but white space."""
    for document in documents:
        if not document.text.strip():
            raise ValueError(f"{document.name} holds no text; {cure}.")
