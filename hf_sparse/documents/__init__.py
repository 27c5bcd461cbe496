"""The texts everything here reads: the Python standard library of this machine, files, or a dataset."""

from .document import Document, Skipped, fingerprint, named, refuse_empty
from .files import iter_documents, read_documents, read_text_file
from .hub import iter_dataset, read_dataset
from .library import SPLITS, split_of, standard_library
from .paths import TEXT_SUFFIXES
from .texts import Texts

__all__ = [
    "SPLITS",
    "TEXT_SUFFIXES",
    "Document",
    "Skipped",
    "Texts",
    "fingerprint",
    "iter_dataset",
    "iter_documents",
    "named",
    "read_dataset",
    "read_documents",
    "read_text_file",
    "refuse_empty",
    "split_of",
    "standard_library",
]
