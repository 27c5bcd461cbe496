"""hf-sparse compare: evaluations side by side, and what cannot be compared."""

import csv
import json
import shutil

import pytest
import torch

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity, save_results
from hf_sparse.evaluate.compare import compare
from hf_sparse.evaluate.saved_results import read_results

TEXTS = [Document(f"text {i}", f"def function_{i}(x): return x + {i}\n" * 12) for i in range(6)]
WINDOW = hf_sparse.SlidingWindow(window=6)


@pytest.fixture
def folders(tiny_model, tiny_tokenizer, tmp_path):
    """The same tokens scored by two models: a/ and b/; the Results are in `results`."""
    found = {}
    for name in ("a", "b"):
        found[name] = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=60, patterns=[WINDOW])
        save_results(found[name], tmp_path / name)
        with torch.no_grad():
            tiny_model.lm_head.weight.mul_(0.5)
    return found, tmp_path


def run(capsys, *arguments):
    status = main(["compare", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_two_models_on_the_same_tokens(folders, capsys):
    results, tmp_path = folders
    status, out, err = run(capsys, tmp_path / "a", tmp_path / "b" / "results.json")
    assert status == 0, err
    a, b = results["a"], results["b"]
    first, same = a.difference(b.runs[1], a.runs[0]), a.difference(b.runs[1], a.runs[1])
    (line,) = [line for line in out.splitlines() if line.startswith("[2] sliding_window(window=6) ")]
    assert str(first) in line and str(same) in line and f"{b.perplexity(b.runs[1]):.3f}" in line
    (line,) = [line for line in out.splitlines() if line.startswith("[2] dense ")]
    assert line.count(str(a.difference(b.runs[0], a.runs[0]))) == 2
    (line,) = [line for line in out.splitlines() if line.startswith("[1] dense ")]
    assert "[+" not in line and "[-" not in line
    assert (
        "intervals: paired bootstrap over 6 documents" in out and max(map(len, out.splitlines()[3:])) <= 120
    )


def test_few_documents_are_compared_by_blocks(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.config.max_position_embeddings = 8192
    texts = [Document("long", "".join(document.text for document in TEXTS) * 4)]
    results = []
    for name in ("a", "b"):
        results.append(perplexity(tiny_model, tiny_tokenizer, texts, max_length=5000, patterns=[WINDOW]))
        save_results(results[-1], tmp_path / name)
    found = compare([tmp_path / "a", tmp_path / "b"]).runs[3].above_first
    assert found == results[0].difference(results[1].runs[1], results[0].runs[0])
    assert found.unit == "blocks of 2048 tokens" and found.units > 1


def test_the_comparison_is_written(folders, capsys):
    results, tmp_path = folders
    expected = results["a"].difference(results["b"].runs[0], results["a"].runs[0])
    status, _, err = run(capsys, tmp_path / "a", tmp_path / "b", "--output", tmp_path / "new" / "both.csv")
    assert status == 0 and "written" in err
    with open(tmp_path / "new" / "both.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["evaluation"], row["run"]) for row in rows][2] == ("2", "dense")
    assert (
        float(rows[2]["above_first"]) == expected.estimate
        and float(rows[2]["above_same_low"]) == expected.low
    )
    run(capsys, tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both.json")
    written = json.loads((tmp_path / "both.json").read_text())
    assert written["comparable"] and written["runs"][2]["above_first"]["high"] == expected.high
    assert written["runs"][0]["above_first"] is None


def test_without_rows_there_is_no_interval(folders, capsys):
    results, tmp_path = folders
    (tmp_path / "b" / "per_document.jsonl").unlink()
    status, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--output", tmp_path / "x.json")
    assert status == 0 and "no intervals with these, as per_document.jsonl is not beside them" in out
    expected = results["a"].difference(results["b"].runs[0], results["a"].runs[0]).estimate
    (line,) = [line for line in out.splitlines() if line.startswith("[2] dense ")]
    assert f"{expected:+.4f}" in line and f"{expected:+.4f} [" not in line
    found = json.loads((tmp_path / "x.json").read_text())["runs"][2]["above_first"]
    assert found["estimate"] == pytest.approx(expected) and found["low"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_length": 50}, "[2] has max_length 50, [1] 60"),
        ({"mode": "rolling"}, "[2] has mode rolling, [1] full"),
        ({"documents": TEXTS[:5]}, "[2] scored other tokens"),
    ],
)
def test_other_tokens_are_not_compared_per_token(tiny_model, tiny_tokenizer, folders, capsys, change, reason):
    _, tmp_path = folders
    arguments = {"documents": TEXTS, "max_length": 60, "patterns": [WINDOW]} | change
    other = perplexity(tiny_model, tiny_tokenizer, arguments.pop("documents"), **arguments)
    save_results(other, tmp_path / "c")
    status, out, _ = run(capsys, tmp_path / "a", tmp_path / "c", "--output", tmp_path / "c.csv")
    assert status == 0 and reason in out
    assert "bits/byte and word ppl are of other texts" in out
    assert (
        f"{other.bits_per_byte(other.runs[0]):.4f}" in out
        and f"{other.byte_perplexity(other.runs[0]):.4f}" in out
    )
    assert f"{other.perplexity(other.runs[0]):.3f}" not in out and "intervals" not in out
    header, *rows = csv.reader((tmp_path / "c.csv").read_text().splitlines())
    assert "perplexity" not in header and "bits_per_byte" in header
    assert all(row[header.index("above_first")] == "" for row in rows)


def test_the_same_tokens_read_otherwise_are_not_compared(tiny_model, tiny_tokenizer, folders, capsys):
    """Same text, same fingerprint, another window: the losses answer another question."""
    _, tmp_path = folders
    for name, length in (("c", 30), ("d", 40)):
        save_results(
            perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=length, mode="rolling"), tmp_path / name
        )
    found = compare([tmp_path / "c", tmp_path / "d"])
    assert found.reasons == ("[2] has max_length 40, [1] 30",)
    assert "other texts" not in found.table()


def edited(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_read_is_refused(folders, capsys):
    _, tmp_path = folders

    def refused(*arguments):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and not out and err.count("\n") == 1, err
        return err

    a, b = tmp_path / "a", tmp_path / "b"
    assert "name at least two results, got 1" in refused(a)
    assert "is named twice" in refused(a, b, a / "results.json")
    assert "nowhere cannot be read (No such file" in refused(a, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot be read (No such file" in refused(a, tmp_path / "empty")
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json holds no results of hf-sparse eval" in refused(a, tmp_path / "list.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "bytes.json is damaged or no JSON" in refused(a, tmp_path / "bytes.json")
    assert "must end in .csv or .json" in refused(a, b, "--output", tmp_path / "x.txt")
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in refused(a, b, "--output", tmp_path / "folder.csv")
    shutil.copytree(b, tmp_path / "c")
    whole = (b / "results.json").read_text()
    (tmp_path / "c" / "results.json").write_text(whole[: len(whole) // 2])
    assert "is damaged or no JSON" in refused(a, tmp_path / "c")


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_another_version_is_refused(folders, version):
    _, tmp_path = folders
    edited(tmp_path / "b", format=version)
    with pytest.raises(
        ValueError, match=r"was written by another version \(format .*, this one reads 2\); measure"
    ):
        read_results(tmp_path / "b")


def test_a_file_that_lacks_something_is_refused(folders):
    _, tmp_path = folders
    edited(tmp_path / "b", runs=[{"title": "dense"}], machine=None)
    with pytest.raises(
        ValueError, match=r"is damaged: it lacks machine\.device, runs\.bits_per_byte, .*measure"
    ):
        read_results(tmp_path / "b")


def test_rows_of_another_evaluation_are_refused(folders):
    _, tmp_path = folders
    rows = tmp_path / "a" / "per_document.jsonl"
    mine, other = rows.read_text(), (tmp_path / "b" / "per_document.jsonl").read_text()
    for content, message in (
        (other, "does not belong to results.json: the rows of dense give other sums"),
        ("".join(mine.splitlines(keepends=True)[:-1]), "does not belong to results.json"),
        (mine + mine.splitlines()[0], "does not belong to results.json"),
        (mine[:-20], "line 12 is damaged"),
        ('{"run": "dense"}\n' + mine, "line 1 is damaged"),
        (mine.replace('"run": "dense"', '"run": "dance"'), "line 1 is of no run in results.json"),
    ):
        rows.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path / "a")


def test_unknown_figures_stay_unknown(folders, capsys):
    """A model that overflowed gives nan: shown as unknown, not as zero, and no traceback."""
    _, tmp_path = folders
    figures = json.loads((tmp_path / "b" / "results.json").read_text())
    for figure in figures["runs"]:
        figure |= {"nats_per_token": None, "perplexity": None, "bits_per_byte": None}
    edited(tmp_path / "b", runs=figures["runs"])
    (tmp_path / "b" / "per_document.jsonl").unlink()
    status, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--output", tmp_path / "x.json")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("[2] dense ")]
    assert line.split()[2] == "?" and "+0.0" not in line
    assert json.loads((tmp_path / "x.json").read_text())["runs"][2]["above_first"]["estimate"] is None
