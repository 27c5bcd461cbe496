"""Rows on disk: what survives an interruption, what is refused, and that nothing is mixed or lost."""

import json
import os
import resource
from pathlib import Path

import pytest

from hf_sparse.evaluate.journal import IDENTITY, Journal
from hf_sparse.evaluate.output_folder import write_atomically
from hf_sparse.evaluate.processes import Processes

WHAT = {"model": "tiny", "max_length": 64, "runs": [["dense", None]], "seed": 0}
ROWS = [{"run": "dense", "document": i, "name": f"text {i}", "nats": 0.1 + i} for i in range(4)]


def place(row):
    return row["document"], row["run"]


def begin(folder, identity=WHAT, **settings):
    return Journal(folder, "rows", identity, **settings)


def content(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_are_taken_up_and_ordered(tmp_path):
    folder = tmp_path / "a" / "b"
    first = begin(folder)
    first.append([ROWS[2], ROWS[0]])
    second = begin(folder)
    assert second.rows == [ROWS[2], ROWS[0]]
    second.append([ROWS[1]])
    second.append([])
    assert second.finish(place) == ROWS[:3]
    assert content(folder) == [IDENTITY, "rows.jsonl"]
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == ROWS[:3]
    assert json.loads((folder / IDENTITY).read_text()) == WHAT
    before = (folder / "rows.jsonl").read_bytes()
    assert begin(folder).finish(place) == ROWS[:3]
    assert (folder / "rows.jsonl").read_bytes() == before


def test_without_a_folder_rows_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = begin(None)
    journal.append(ROWS[::-1])
    assert journal.finish(place) == ROWS and not content(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_last_line_that_was_cut_off_is_measured_again(tmp_path, kept):
    begin(tmp_path).append(ROWS[:2])
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    os.truncate(path, second + kept if kept >= 0 else len(whole) - 1)
    resumed = begin(tmp_path)
    assert resumed.rows == ROWS[:1]
    resumed.append([ROWS[1]])
    assert path.read_bytes() == whole


def test_zeros_behind_the_last_row_are_cut_off(tmp_path):
    begin(tmp_path).append(ROWS[:1])
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(500))  # a file system that had made room before the power went
    assert begin(tmp_path).rows == ROWS[:1]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"run": "den', "17", "", "\x00\x00", '"\xff"'])
def test_a_damaged_line_between_others_is_named(tmp_path, line):
    begin(tmp_path).append(ROWS[:3])
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged; delete that line"):
        begin(tmp_path)
    path.write_bytes(b"\n".join(lines[:1] + lines[2:]) + b"\n")
    assert begin(tmp_path).rows == [ROWS[0], ROWS[2]]


def test_another_evaluation_is_refused_and_says_what_differs(tmp_path):
    begin(tmp_path).append(ROWS)
    other = {**WHAT, "max_length": 128, "backend": "x" * 100}
    with pytest.raises(ValueError) as caught:
        begin(tmp_path, other)
    message = str(caught.value)
    assert f"{tmp_path} holds other figures (max_length: 64, now 128; backend: null, now " in message
    assert "--overwrite" in message and "\n" not in message and len(message) < 300 + len(str(tmp_path))
    with pytest.raises(ValueError, match="and 1 more"):
        begin(tmp_path, {**other, "seed": 1, "model": "other"})
    assert begin(tmp_path).rows == ROWS, "a refusal changes nothing"
    anew = begin(tmp_path, other, overwrite=True)
    assert anew.rows == [] and content(tmp_path) == [IDENTITY]
    assert json.loads((tmp_path / IDENTITY).read_text()) == other


def test_of_long_values_the_place_where_they_differ_is_shown(tmp_path):
    begin(tmp_path, {"list": [*["the same"] * 20, 64, *["and on"] * 20]})
    with pytest.raises(ValueError) as caught:
        begin(tmp_path, {"list": [*["the same"] * 20, 32, *["and on"] * 20]})
    before, now = str(caught.value).split("list: ...")[1].split(", now ...")
    assert ' 64, "and on"' in before and ' 32, "and on"' in now and len(now) < 140


def test_overwriting_goes_on_where_the_evaluation_is_the_same(tmp_path):
    begin(tmp_path).append(ROWS)
    assert begin(tmp_path, overwrite=True).rows == ROWS


def test_rows_that_nothing_says_the_origin_of_are_refused(tmp_path):
    begin(tmp_path).append(ROWS)
    (tmp_path / IDENTITY).unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl exists, but no evaluation\.json says what it is of"):
        begin(tmp_path)
    assert begin(tmp_path, overwrite=True).rows == []
    (tmp_path / IDENTITY).write_text("{")
    with pytest.raises(ValueError, match=r"its evaluation\.json cannot be read"):
        begin(tmp_path)


def test_files_of_others_stay(tmp_path):
    names = ["rows.backup.jsonl", "rows.jsonl.gz", "other.jsonl", "results.json"]
    for name in names:
        (tmp_path / name).write_text("not ours\n")
    journal = begin(tmp_path, overwrite=True)
    journal.append(ROWS)
    journal.finish(place)
    assert content(tmp_path) == sorted([*names, IDENTITY, "rows.jsonl"])
    assert {(tmp_path / name).read_text() for name in names} == {"not ours\n"}


def test_of_two_rows_of_the_same_the_first_counts(tmp_path):
    again = {**ROWS[0], "nats": 7.0}
    journal = begin(tmp_path)
    journal.append([ROWS[0]])
    journal.append([again, ROWS[1]])
    assert journal.finish(place) == ROWS[:2]


def test_one_process_goes_on_with_the_files_of_three(tmp_path):
    begin(tmp_path)
    for rank, row in zip((0, 1, 2), ROWS, strict=False):
        name = "rows.jsonl" if rank == 0 else f"rows.{rank}.jsonl"
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    with open(tmp_path / "rows.2.jsonl", "a") as file:
        file.write('{"cut')
    one = begin(tmp_path)
    assert sorted(one.rows, key=place) == ROWS[:3]
    one.append([ROWS[3]])
    assert one.finish(place) == ROWS
    assert content(tmp_path) == [IDENTITY, "rows.jsonl"]


def test_each_process_appends_to_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, rows: rows)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    begin(tmp_path, processes=Processes(0, 2)).append([ROWS[0]])
    begin(tmp_path, processes=Processes(1, 2)).append([ROWS[1]])
    assert content(tmp_path) == [IDENTITY, "rows.1.jsonl", "rows.jsonl"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), [1.0, float("-inf")], {"a": float("nan")}])
@pytest.mark.parametrize("on_disk", [True, False])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number, on_disk):
    journal = begin(tmp_path if on_disk else None)
    journal.append([ROWS[0]])
    with pytest.raises(ValueError) as caught:
        journal.append([{**ROWS[1], "nats": number}])
    assert 'nats of {"run": "dense", "document": 1, "name": "text 1"} is not finite' in str(caught.value)
    assert journal.rows == [ROWS[0]]
    if on_disk:
        assert begin(tmp_path).rows == [ROWS[0]]


@pytest.mark.parametrize("room", [0, 30, 200])
def test_a_full_disk_is_named_and_loses_no_row(tmp_path, room):
    journal = begin(tmp_path)
    journal.append(ROWS[:1])
    path = tmp_path / "rows.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = {**ROWS[1], "block_nats": [0.1] * 100}
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        with pytest.raises(ValueError) as caught:
            journal.append([long])
        with pytest.raises(OSError) as whole:
            write_atomically(tmp_path / "results.json", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value) and "make room, then run the same again" in str(caught.value)
    assert str(tmp_path / "results.json") in str(whole.value)
    assert content(tmp_path) == [IDENTITY, "rows.jsonl"]
    resumed = begin(tmp_path)
    assert resumed.rows == ROWS[:1]
    resumed.append([long])
    assert begin(tmp_path).rows == [ROWS[0], long]


def test_a_full_disk_at_the_end_keeps_the_rows(tmp_path, monkeypatch):
    journal = begin(tmp_path)
    journal.append(ROWS[::-1])

    def full(path, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: .*rows\.jsonl"):
        journal.finish(place)
    monkeypatch.undo()
    assert content(tmp_path) == [IDENTITY, "rows.jsonl"]
    assert begin(tmp_path).finish(place) == ROWS


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write in")
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"output /proc/zz cannot be written .*; name another folder"):
        begin("/proc/zz")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; name a folder"):
        begin(tmp_path / "file" / "folder")


def test_a_run_whose_folder_another_evaluation_took_ends_at_its_next_row(tmp_path):
    old = begin(tmp_path)
    old.append(ROWS[:1])
    other = {**WHAT, "seed": 1}
    new = begin(tmp_path, other, overwrite=True)
    for end in (lambda: old.append([ROWS[1]]), lambda: old.finish(place)):
        with pytest.raises(ValueError, match=f"something else was begun in {tmp_path} while this ran"):
            end()
    new.append([ROWS[3]])
    assert begin(tmp_path, other).rows == [ROWS[3]]


def test_two_runs_of_the_same_evaluation_at_once_find_the_same_rows(tmp_path):
    one, two = begin(tmp_path), begin(tmp_path)
    for row in ROWS:
        one.append([row])
        two.append([row])
    assert one.finish(place) == ROWS
    written = (tmp_path / "rows.jsonl").read_bytes()
    assert two.finish(place) == ROWS
    assert (tmp_path / "rows.jsonl").read_bytes() == written
