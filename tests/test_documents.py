import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from hf_sparse import documents
from hf_sparse.documents import (
    SPLITS,
    Document,
    Skipped,
    fingerprint,
    iter_documents,
    read_documents,
    read_text_file,
    refuse_empty,
    split_of,
    standard_library,
)


@pytest.fixture(scope="module")
def library() -> dict[str, list[Document]]:
    return {split: standard_library(split) for split in SPLITS}


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A stand-in for the standard library; returns a function that adds a file to it."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)

    def add(name: str, content: bytes = b"x = 1\n" * 200) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    return add


def names_found() -> list[str]:
    found = []
    for split in SPLITS:
        try:
            found += [document.name for document in standard_library(split)]
        except ValueError:
            continue
    return sorted(found)


def test_splits_share_no_file_and_no_text(library):
    names = [document.name for split in SPLITS for document in library[split]]
    assert len(names) == len(set(names))
    held_out = {document.text for split in ("validation", "test") for document in library[split]}
    assert held_out.isdisjoint(document.text for document in library["train"])


def test_splits_have_about_the_stated_shares(library):
    total = sum(len(found) for found in library.values())
    assert 0.85 < len(library["train"]) / total < 0.95
    assert 0.01 < len(library["validation"]) / total < 0.06
    assert 0.04 < len(library["test"]) / total < 0.11


def test_documents_are_the_files_sorted_by_name(library):
    root = Path(sysconfig.get_path("stdlib"))
    for split in SPLITS:
        names = [document.name for document in library[split]]
        assert names == sorted(names)
        first = library[split][0]
        assert first.text == (root / first.name).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def test_reading_twice_gives_the_same(library):
    assert standard_library("validation") == library["validation"]


def test_the_reference_topics_are_train(library):
    assert "pydoc_data/topics.py" in {document.name for document in library["train"]}


def test_no_tables_and_no_foreign_packages(library):
    for split in SPLITS:
        for document in library[split]:
            parts = document.name.split("/")
            assert {"site-packages", "__pycache__", "ensurepip"}.isdisjoint(parts)
            assert not parts[-1].startswith("_sysconfigdata")
            assert not (parts[0] == "encodings" and parts[-1].startswith(("cp", "iso", "mac_", "koi")))


def test_split_hangs_on_the_sha256_of_the_files_own_name():
    bucket = int.from_bytes(hashlib.sha256(b"argparse").digest()[:8], "big") % 100
    assert split_of("argparse.py") == ("validation" if bucket < 3 else "test" if bucket < 10 else "train")
    assert [split_of(name) for name in ("zipfile.py", "unittest/mock.py", "argparse.py")] == [
        "test",
        "validation",
        "train",
    ]


@pytest.mark.parametrize(
    "before, after",
    [
        ("zipfile.py", "zipfile/__init__.py"),
        ("unittest/test/test_loader.py", "test/test_unittest/test_loader.py"),
        ("datetime.py", "_pydatetime.py"),
    ],
)
def test_a_file_that_moves_in_a_later_python_keeps_its_split(before, after):
    assert split_of(before) == split_of(after)


@pytest.mark.parametrize(
    "name, content",
    [
        ("site-packages/pkg/module.py", b"x = 1\n" * 200),
        ("pkg/__pycache__/module.py", b"x = 1\n" * 200),
        ("encodings/cp1252.py", b"x = 1\n" * 200),
        ("test/cmath_testcases.txt", b"x = 1\n" * 200),
        ("test/mathdata/cmath_testcases.txt", b"x = 1\n" * 200),
        ("_sysconfigdata__linux_x86_64.py", b"x = 1\n" * 200),
        ("lib2to3/tests/data/py3_test_grammar.py", b"x = 1\n" * 200),
        ("latin.py", b"name = 'caf\xe9'\n" * 200),
        ("stub.py", b"x = 1\n"),
        ("module.so", b"x = 1\n" * 200),
    ],
)
def test_files_that_are_left_out(small_library, name, content):
    small_library("kept.py")
    small_library(name, content)
    assert names_found() == ["kept.py"]


def test_a_library_without_tests_is_only_smaller(small_library):
    for name in (
        "argparse.py",
        "encodings/idna.py",
        "json/decoder.py",
        "pydoc_data/topics.py",
        "email/notes.rst",
    ):
        small_library(name)
    assert len(names_found()) == 5


def test_line_ends_and_byte_order_marks_are_normalised(small_library):
    small_library("pydoc_data/topics.py", b"\xef\xbb\xbf" + b"x = 1\r\n" * 200)
    assert standard_library("train")[0].text == "x = 1\n" * 200


def test_a_library_without_sources_says_so(small_library, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no source files for the test split; use a Python installed with"
    ):
        standard_library("test")


def test_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, validation, test"):
        standard_library("dev")


def test_user_files_come_in_the_given_order_without_the_byte_order_mark(tmp_path):
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    second.write_bytes(b"tea\n")
    assert read_documents([first, str(second)]) == [
        Document(str(first), "café\n"),
        Document(str(second), "tea\n"),
    ]
    assert read_documents(str(second)) == [Document(str(second), "tea\n")]


def test_no_path_given():
    with pytest.raises(ValueError, match="no text files were given; name at least one"):
        read_documents([])


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt does not exist; check the spelling"):
        read_documents([tmp_path / "absent.txt"])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_file_that_is_not_utf8_names_byte_offset_line_and_cure(tmp_path, mark):
    (tmp_path / "latin.txt").write_bytes(mark + b"one\ntwo caf\xe9\n")
    message = (
        rf"latin\.txt is not UTF-8 \(byte 0xe9 at offset {len(mark) + 11}, line 2\); convert it first.*iconv"
    )
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / "latin.txt"])


def test_replace_and_skip_go_on_where_a_file_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"tea")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    kept = Document(names[1], "tea")
    assert read_documents(names, encoding_errors="replace") == [Document(names[0], "caf\ufffd"), kept]
    skipped: list[Skipped] = []
    assert read_documents(names, encoding_errors="skip", skipped=skipped) == [kept]
    assert skipped == [Skipped(names[0], "is not UTF-8 (byte 0xe9 at offset 3, line 1)")]


def test_unknown_ways_of_going_on_and_a_missing_list():
    with pytest.raises(
        ValueError, match="encoding_errors must be one of strict, replace, skip, got 'ignore'"
    ):
        iter_documents([__file__], encoding_errors="ignore")
    with pytest.raises(ValueError, match=r"encoding_errors='skip' needs skipped=\[\]"):
        iter_documents([__file__], encoding_errors="skip")


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf", b"\0" * 9])
def test_a_file_without_text_is_a_document_until_it_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    documents = read_documents(tmp_path / "empty.txt")
    assert documents == [Document(str(tmp_path / "empty.txt"), content.decode("utf-8-sig"))]
    if not content.startswith(b"\0"):
        with pytest.raises(ValueError, match=r"empty\.txt holds no text; give a file with text in it"):
            refuse_empty([Document("full", "text"), *documents])


@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_an_unreadable_file_names_the_cause(tmp_path, monkeypatch, call):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.txt").write_text("text")
    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(
        ValueError, match=r"secret\.txt cannot be read \(Permission denied\); check its permissions"
    ):
        read_documents([tmp_path / "secret.txt"])


def test_paths_are_checked_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"absent\.txt does not exist"):
        iter_documents([tmp_path / "a.txt", tmp_path / "absent.txt"])


def test_one_text_file_as_it_is_whatever_it_ends_in(tmp_path):
    path = tmp_path / "prompt.jsonl"
    path.write_text('{"text": "x"}\n')
    assert read_text_file(path) == Document(str(path), '{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"is a folder; name a text file in it"):
        read_text_file(tmp_path)
    with pytest.raises(ValueError, match=r"absent does not exist"):
        read_text_file(tmp_path / "absent")


@pytest.fixture
def folder(tmp_path):
    """A folder with texts, a table, settings, pictures and hidden files; the text of each file is its name."""
    folder = tmp_path / "corpus"
    for name in (
        "b.txt",
        "a.md",
        "a/z.TXT",
        "a/deep/c.py",
        "a.b/x.rst",
        ".hidden.txt",
        ".git/x.txt",
        "a/.x/y.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "config.json").write_text("{\n}")
    (folder / "picture.png").write_bytes(b"\xff\0")
    (folder / "run.log").write_text("run.log")
    return folder


def names_in(folder, **options):
    return [d.name.removeprefix(f"{folder}/") for d in read_documents([folder], **options)]


def test_a_folder_is_its_texts_sorted_without_what_is_hidden(folder):
    assert names_in(folder) == [
        *("a.b/x.rst", "a.md", "a/deep/c.py", "a/z.TXT", "b.txt"),
        *("rows.jsonl:1", "rows.jsonl:2"),
    ]
    assert [d.text for d in read_documents([folder])][3:6] == ["a/z.TXT", "b.txt", "one"]


def test_a_hidden_folder_is_read_where_it_is_named(folder):
    assert names_in(folder / ".git") == ["x.txt"]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.md", ["a.md"]),
        ("*.log", ["run.log"]),
        ("deep/*", ["a/deep/c.py"]),
        ("?.*", ["a.md", "a/deep/c.py", "b.txt", "a/z.TXT", "a.b/x.rst"]),
    ],
)
def test_a_glob_chooses_whatever_the_files_end_in(folder, glob, found):
    assert names_in(folder, glob=glob) == sorted(found)


def test_files_and_folders_mix_in_the_order_given_and_the_glob_is_for_folders(folder):
    paths = [folder / "run.log", folder / "a", folder / "rows.jsonl"]
    names = [d.name.removeprefix(f"{folder}/") for d in read_documents(paths, glob="*.py")]
    assert names == ["run.log", "a/deep/c.py", "rows.jsonl:1", "rows.jsonl:2"]


def test_pipes_and_links_to_nothing_are_no_files_of_a_folder(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to(folder / "absent")
    (folder / "loop").symlink_to(folder)
    assert "b.txt" in names_in(folder) and not {"pipe.txt", "gone.txt"} & set(names_in(folder))
    assert not any(name.startswith("loop") for name in names_in(folder))


def test_a_file_named_with_bytes_that_are_no_text_has_a_name_that_is(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("text")
    (document,) = read_documents([tmp_path])
    assert document.name == f"{tmp_path}/caf\ufffd.txt" and len(fingerprint([document])) == 64


def test_folders_that_hold_nothing_to_read(folder, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\0")
    with pytest.raises(
        ValueError, match=r"pictures holds no text, .* \(of 1 files\); name the files, or .* glob"
    ):
        iter_documents([folder, tmp_path / "pictures"])
    with pytest.raises(
        ValueError, match=r"holds no file that matches '\*\.xyz' \(of 9 files\); check the glob"
    ):
        iter_documents([folder], glob="*.xyz")
    with pytest.raises(ValueError, match=r"the glob '' matches no file"):
        iter_documents([folder], glob="")
    with pytest.raises(
        ValueError, match=r"the glob '\*\.md' chooses files of folders, and no folder is given"
    ):
        iter_documents([folder / "a.md"], glob="*.md")

    def refuse(*args, onerror, **kwargs):
        onerror(PermissionError(13, "Permission denied", str(folder / "a")))
        return []

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(ValueError, match=r"corpus/a cannot be read \(Permission denied\)"):
        iter_documents([folder])


def test_fingerprint_changes_with_names_texts_borders_and_order():
    base = [Document("a", "bc"), Document("d", "e")]
    variants = [
        base,
        base[::-1],
        [Document("ab", "c"), Document("d", "e")],
        [Document("a", "bcd"), Document("", "e")],
        [Document("a", "bx"), Document("d", "e")],
        base[:1],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(base) == fingerprint(list(base))
    assert len(fingerprint(base)) == 64


def test_the_package_needs_only_the_standard_library_until_it_is_asked_for_more():
    folder = Path(documents.__file__).parent
    sources = [path.read_text().splitlines() for path in folder.glob("*.py")]
    lines = [line for source in sources for line in source if line.startswith(("import ", "from "))]
    imported = {line.split()[1].split(".")[0] for line in lines} - {""}
    assert imported <= set(sys.stdlib_module_names), imported
