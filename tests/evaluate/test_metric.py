"""The metric for the library `evaluate`: its formulas, and that batches and processes do not matter."""

import ast
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import hf_sparse
from hf_sparse.evaluate.metric import SparsePerplexity

ROWS = {
    "nats": [30.5, 120.25, 7.1, 64.0],
    "tokens": [10, 60, 2, 32],
    "bytes": [41, 230, 9, 120],
    "words": [8, 44, 1, 25],
}


@pytest.fixture
def new(tmp_path):
    return lambda **options: SparsePerplexity(cache_dir=str(tmp_path), **options)


def rows(start, stop):
    return {name: column[start:stop] for name, column in ROWS.items()}


def test_formulas(new):
    found = new(keep_in_memory=True).compute(**ROWS)
    total = 30.5 + 120.25 + 7.1 + 64.0
    expected = {
        "nats_per_token": total / 104,
        "perplexity": math.exp(total / 104),
        "byte_perplexity": math.exp(total / 400),
        "word_perplexity": math.exp(total / 78),
        "bits_per_byte": total / (400 * math.log(2)),
        "macro_perplexity": math.exp((30.5 / 10 + 120.25 / 60 + 7.1 / 2 + 64.0 / 32) / 4),
        "tokens": 104,
        "documents": 4,
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]))


def test_a_uniform_model_has_the_size_of_its_vocabulary(new):
    tokens = [3, 500, 41]
    found = new(keep_in_memory=True).compute(
        nats=[n * math.log(400) for n in tokens], tokens=tokens, bytes=tokens, words=tokens
    )
    for name in ("perplexity", "byte_perplexity", "word_perplexity", "macro_perplexity"):
        assert found[name] == pytest.approx(400)


def test_sums_are_exact_in_any_order(new):
    nats, tokens = [2.0**53, 1.0, 1.0], [2**40, 1, 1]  # added from the left, the ones are lost
    one = new(keep_in_memory=True).compute(nats=nats, tokens=tokens, bytes=tokens, words=tokens)
    nats, tokens = nats[::-1], tokens[::-1]
    assert one == new(keep_in_memory=True).compute(nats=nats, tokens=tokens, bytes=tokens, words=tokens)


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_batches_and_single_rows_give_what_the_whole_gives(new, keep_in_memory):
    metric = new(keep_in_memory=keep_in_memory)
    metric.add_batch(**{name: np.array(column) for name, column in rows(2, 4).items()})
    metric.add(nats=ROWS["nats"][0], tokens=10, bytes=41, words=8)
    metric.add_batch(**rows(1, 2))
    assert metric.compute() == new(keep_in_memory=True).compute(**ROWS)
    assert metric.compute(**rows(0, 1))["documents"] == 1  # nothing is left of the first computation


def test_two_processes_give_what_one_gives(new):
    def work(process):
        metric = new(num_process=2, process_id=process, timeout=20)
        metric.add_batch(**rows(3 * process, 3 + process))  # three rows and one
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (0, 1))
    assert first == new(keep_in_memory=True).compute(**ROWS)
    assert second is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": [10, 60, 0, 32]}, "row 2 has 0 tokens"),
        ({"nats": [30.5, math.nan, 7.1, 64.0]}, "row 1 has nan nats"),
        ({"bytes": [0, 0, 0, 0]}, "have 0 bytes"),
        ({"words": [0, 0, 0, 0]}, "have 0 words"),
        ({name: [] for name in ROWS}, "all 0 rows together have 0 tokens"),
    ],
)
def test_rows_that_cannot_be_scored(new, change, message):
    with pytest.raises(ValueError, match=message):
        new(keep_in_memory=True).compute(**ROWS | change)


def test_a_hopeless_model_is_infinitely_perplexed(new):
    found = new(keep_in_memory=True).compute(nats=[1e6], tokens=[1], bytes=[1], words=[1])
    assert found["perplexity"] == math.inf and found["nats_per_token"] == 1e6


def imported_at_once(path):
    """What a file imports when it is imported itself, relative names with their dots."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_library_is_imported_only_with_the_metric():
    own = Path(hf_sparse.__file__).parent
    metric = own / "evaluate" / "metric.py"
    assert "evaluate" in imported_at_once(metric)
    for path in set(own.rglob("*.py")) - {metric}:
        found = set(imported_at_once(path))
        assert not found & {"evaluate", ".metric", ".evaluate.metric", "hf_sparse.evaluate.metric"}, path
