"""The Python standard library of this machine as documents, split into train, validation and test for good."""

import hashlib
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from .document import Document

SPLITS = ("train", "validation", "test")
MIN_BYTES = 500  # shorter files are stubs

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "ensurepip", "lib-dynload"}

# Written by programs, or copies of each other: a model that saw one of them knows the rest by heart.
_GENERATED = (
    "_sysconfigdata*",
    "config-*/*",
    "html/entities.py",
    "lib2to3/tests/data/*",
    "re/_casefix.py",
    "stringprep.py",
    "test/*_testcases.txt",
    "test/*/*_testcases.txt",
    "test/cjkencodings/*",
    "test/encoded_modules/*",
    "test/floating_points.txt",
    "test/*/floating_points.txt",
    "test/ieee754.txt",
    "test/*/ieee754.txt",
    "test/mathdata/*",
    "test/test_email/data/*",
    "test/tokenizedata/*",
)
_WRITTEN_ENCODINGS = {
    "__init__",
    "idna",
    "punycode",
    "utf_16",
    "utf_8_sig",
}  # the rest of encodings/ is tables


def standard_library(split: str) -> list[Document]:
    """Every source and text file of the running interpreter's standard library that belongs to a split.

    A file belongs to one split for good: the split hangs on the file's own name, not on its folder, so that a file
    keeps it when a later Python moves it (``test/test_enum.py``, ``test/test_enum/__init__.py``). About 90 % of the
    files are train, 3 % validation, 7 % test; ``pydoc_data/topics.py`` is always train. Generated tables and files
    that are not UTF-8 are left out. Sorted by name. Interpreters without a ``test`` folder give fewer documents.

    Raises:
        ValueError: the split is unknown, or this interpreter has no readable standard library.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    root = Path(sysconfig.get_path("stdlib"))
    documents = [Document(name, text) for name, text in _sources(root, split)]
    if not documents:
        raise ValueError(
            f"the standard library of this Python ({root}) holds no source files for the {split} split; "
            "use a Python installed with its .py files, or name your own text files."
        )
    return documents


def split_of(name: str) -> str:
    """The split of a standard library file, given its path relative to the library's root."""
    if name == "pydoc_data/topics.py":
        return "train"
    path = PurePosixPath(name)
    own_name = path.parent.name if path.stem in ("__init__", "__main__") else path.stem
    own_name = own_name.removeprefix("_py")  # datetime.py became _pydatetime.py
    bucket = int.from_bytes(hashlib.sha256(own_name.encode()).digest()[:8], "big") % 100
    return "validation" if bucket < 3 else "test" if bucket < 10 else "train"


def _sources(root: Path, split: str) -> Iterator[tuple[str, str]]:
    files = (path for suffix in ("py", "txt", "rst") for path in root.rglob(f"*.{suffix}"))
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        if not _SKIPPED_FOLDERS.isdisjoint(PurePosixPath(name).parts) or _is_generated(name):
            continue
        if split_of(name) != split or not path.is_file() or path.stat().st_size < MIN_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        yield name, text.replace("\r\n", "\n")


def _is_generated(name: str) -> bool:
    path = PurePosixPath(name)
    if path.parent.name == "encodings" and path.stem not in _WRITTEN_ENCODINGS:
        return True
    return any(fnmatch(name, pattern) for pattern in _GENERATED)
