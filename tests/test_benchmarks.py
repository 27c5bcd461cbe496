"""The benchmark suite runs from end to end on tiny lengths, and says what it did not measure."""

import json
import statistics

import pytest
import torch

from benchmarks import memory, operators, prefill
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.goals import GOALS, main_labels
from benchmarks.limits import limits
from benchmarks.peers import PEERS
from benchmarks.task import Shape, Task
from benchmarks.timing import Deadline, Failure, OutOfTime, Reading, interleaved
from hf_sparse import Pattern, SlidingWindow
from hf_sparse.backends import BACKENDS
from hf_sparse.patterns import static_patterns

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--heads", "2", "--head-dim", "8", "--repeats", "2"]


def run(folder, *arguments) -> tuple[int, dict, str]:
    """Return the exit code, the JSON record and the Markdown page of one run."""
    code = main([*SMALL, "--output", str(folder), *arguments])
    record = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in folder.iterdir()) == ["cpu.json", "cpu.md"]
    return code, record, (folder / "cpu.md").read_text(encoding="utf-8")


def row_of(record, **wanted) -> dict:
    (row,) = (row for row in record["rows"] if all(row.get(key) == value for key, value in wanted.items()))
    return row


def test_operators_beside_dense_and_peers(tmp_path, capsys):
    code, record, page = run(
        tmp_path,
        *("--patterns", "sliding_window(window=32)", "--lengths", "192"),
        *("--measures", "forward,backward,decode", "--peers", "SDPA,local"),
    )
    assert code == 0 and not record["partial"] and record["not_run"] == []
    label = "sliding_window(window=32)"
    methods = [(row["measure"], row["pattern"], row["method"]) for row in record["rows"]]
    each = [("dense", "dense SDPA"), (label, "hf_sparse")]
    peers = [(label, "SDPA with the pattern's mask"), (label, "local-attention")]
    assert methods == [
        *(("forward", *m) for m in each + peers),
        *(("backward", *m) for m in each + peers),
        *(("decode", *m) for m in each),
    ]
    ours = row_of(record, measure="forward", method="hf_sparse")
    dense = row_of(record, measure="forward", pattern="dense")
    assert ours["ratio"] == pytest.approx(dense["ms"] / ours["ms"], rel=2e-3)
    assert (
        ours["dense_ms"] == dense["ms"] and dense["ratio"] == 1 and dense["backend"] == ours["dense_backend"]
    )
    # 192 tokens: dense 18,528 pairs; each query sees 32 keys, the first 31 queries fewer.
    assert ours["pairs_limit"] == pytest.approx(18528 / (192 * 32 - 31 * 16), rel=1e-3)
    assert ours["tile_limit"] == pytest.approx(6 / 5)  # 64 x 64: the lower triangle, and without its corner
    assert ours["of_pairs_limit"] == pytest.approx(ours["ratio"] / ours["pairs_limit"], rel=2e-3)
    assert ours["rounds"] == 2 and ours["operator"] and ours["backend"] in BACKENDS
    assert row_of(record, measure="decode", method="hf_sparse")["pairs_limit"] == 192 / 32
    assert record["machine"]["versions"]["torch"] == torch.__version__ and record["machine"]["threads"]
    assert label in page and "SDPA with the pattern's mask" in page and "## One decode step" in page
    assert "x dense" in capsys.readouterr().out


def test_encoder_peers_are_fed_the_same_tensors(tmp_path):
    """transformers' Longformer passes the check against our definition; its BigBird draws other blocks."""
    _, record, page = run(
        tmp_path,
        *("--patterns", "longformer-257+64-both-sides", "bigbird-64-both-sides", "--lengths", "1024"),
        *("--measures", "backward", "--peers", "HF"),
    )
    for pattern, peer in (("longformer-257", "HF Longformer"), ("bigbird-64", "HF BigBird")):
        (row,) = (
            r for r in record["rows"] if r["method"].startswith(peer) and r["pattern"].startswith(pattern)
        )
        assert row["ms"] > 0 and not row["causal"] and row["note"]
    assert "HF LongformerSelfAttention" in page


def test_what_fails_is_recorded_with_its_reason(tmp_path, monkeypatch, capsys):
    def wrong(query, key, value, call, backend):
        if call.pattern == SlidingWindow(16):
            raise RuntimeError("no such kernel\nand a long story")
        return torch.zeros_like(query)

    monkeypatch.setattr(operators, "attend", wrong)
    absent = PEERS[2]._replace(make=lambda task: __import__("not_installed_here"))
    monkeypatch.setattr("benchmarks.suite.PEERS", (absent,))
    code, record, page = run(
        tmp_path,
        *("--patterns", "sliding_window(window=16)", "sliding_window(window=32)", "--lengths", "64"),
        *("--measures", "forward", "--peers", "local"),
    )
    assert code == 1
    assert row_of(record, pattern="sliding_window(window=16)", method="hf_sparse")["error"] == (
        "RuntimeError: no such kernel"
    )
    assert "WRONG by" in row_of(record, pattern="sliding_window(window=32)", method="hf_sparse")["error"]
    assert (
        "No module named"
        in row_of(record, pattern="sliding_window(window=32)", method="local-attention")["error"]
    )
    assert "ms" in row_of(record, pattern="dense")
    assert "not_installed_here" in page and "## Not measured" in page
    assert "not measured: RuntimeError: no such kernel" in capsys.readouterr().out


def test_memory_and_prefill(tmp_path, monkeypatch):
    measured = []

    def watched(case, is_dense, length, shape, backward, backend):
        measured.append(("dense" if is_dense else case.label, length, backward))
        return shape.unit_bytes(length, length) // 2

    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    monkeypatch.setattr(memory, "_in_a_process", watched)
    monkeypatch.setitem(prefill.MODELS, "cpu", tiny | heads)
    _, record, page = run(
        tmp_path,
        *(
            "--patterns",
            "sliding_window(window=16)",
            "--lengths",
            "64,128,256",
            "--measures",
            "memory,prefill",
        ),
    )
    label = "sliding_window(window=16)"
    assert measured == [(p, n, b) for n in (128, 256) for p in ("dense", label) for b in (False, True)]
    row = row_of(record, measure="memory_forward", pattern=label, length=256)
    assert row["multiple"] == 0.5 and row["goal"] == 1.2 and row["extra_bytes"] == 2 * 256 * 8 * 4 * 4 // 2
    row = row_of(record, measure="prefill", pattern=label, length=256)
    dense = row_of(record, measure="prefill", pattern="dense", length=256)
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / dense["tokens_per_second"], rel=5e-3)
    assert (row["heads"], row["kv_heads"], row["layers"]) == (4, 2, 2)
    assert row["pairs_limit"] >= 1 and 0 < dense["attention_share"] <= 1
    assert "## Peak memory of one call" in page and "## A whole model reading a prompt" in page


def test_extra_memory_is_measured_in_a_process_of_its_own():
    shape = Shape(4, 4, 32, torch.float32, CPU)
    extra = memory._in_a_process(CASES[0], False, 4096, shape, False, "auto")
    output = 4 * 4096 * 32 * 4
    assert 0.9 * output <= extra <= 100 * output  # allocators keep some; an n x n matrix would be 512 outputs


def test_time_that_is_over_is_said(tmp_path, capsys):
    arguments = ("--patterns", "window-128", "--lengths", "256", "--measures", "forward,decode")
    code, record, page = run(tmp_path, *arguments, "--minutes", "0")
    assert code == 0 and record["partial"] and record["rows"] == []
    assert [one["what"].split(" ")[0] for one in record["not_run"]] == ["forward", "decode", "forward"]
    assert all("window-128" in one["what"] and "--minutes" in one["reason"] for one in record["not_run"])
    assert "## Not run" in page and "3 parts were not run" in capsys.readouterr().out


def test_rows_of_the_same_machine_are_kept_and_others_dropped(tmp_path, monkeypatch, capsys):
    arguments = ("--measures", "decode", "--peers", "none", "--patterns", "window-128")
    run(tmp_path, *arguments, "--lengths", "128")
    _, record, _ = run(tmp_path, *arguments, "--lengths", "256")
    assert [row["length"] for row in record["rows"]] == [128, 128, 256, 256]
    before = row_of(record, length=128, method="hf_sparse")
    record["rows"][1]["ms"] = -1.0
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    _, record, _ = run(tmp_path, *arguments, "--lengths", "128")
    assert len(record["rows"]) == 4 and row_of(record, length=128, method="hf_sparse")["ms"] > 0
    assert row_of(record, length=128, method="hf_sparse").keys() == before.keys()
    record["machine"]["versions"]["torch"] = "1.0"
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    _, record, _ = run(tmp_path, *arguments, "--lengths", "512")
    assert {row["length"] for row in record["rows"]} == {512}
    assert "4 earlier rows of another machine or other versions are dropped" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    real = operators.measure

    def measure(unit, suite, deadline):
        if unit.length == 256:
            raise KeyboardInterrupt
        return real(unit, suite, deadline)

    monkeypatch.setattr(operators, "measure", measure)
    arguments = (
        "--measures",
        "decode",
        "--peers",
        "none",
        "--patterns",
        "window-128",
        "--lengths",
        "128,256",
    )
    code, record, page = run(tmp_path, *arguments)
    assert code == 130 and record["partial"] and {row["length"] for row in record["rows"]} == {128}
    assert "interrupted" in record["not_run"][0]["reason"] and "not complete" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patterns", "sliding_windw"], "unknown pattern 'sliding_windw'"),
        (["--patterns", "sliding_window(widow=3)"], "no option 'widow'"),
        (["--patterns", "a b c"], "is no pattern of the suite"),
        (["--measures", "forward,speed"], "unknown measure 'speed'"),
        (["--peers", "nobody"], "no peer's name begins with 'nobody'"),
        (["--lengths", "4K,many"], "lengths are whole numbers"),
        (["--heads", "6", "--kv-heads", "4"], "multiple of --kv-heads, got 6 and 4"),
        (["--backends", "tpu"], "unknown backend 'tpu'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_registered_pattern_has_a_row():
    """`full` is what all are compared with, `sinks` a part; the others put patterns together or move far keys."""
    built_in = {name for name in static_patterns() if not name.startswith("test_")}
    assert {case.name for case in CASES} == built_in - {"full", "layered", "rerope", "self_extend", "sinks"}
    assert main_labels("cpu") | main_labels("cuda") <= {case.label for case in CASES}
    assert all(label in main_labels(device) for device in GOALS for label in GOALS[device]["forward"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_limits_are_those_of_the_written_mask(case):
    n, heads, tile = 1024, 4, 64
    pattern: Pattern = case.pattern(n)
    mask = pattern.mask(n, heads=heads, causal=case.causal)
    blocks = n // tile
    held = mask.view(heads, blocks, tile, blocks, tile).any(4).any(2).sum().item() / heads
    dense = blocks * (blocks + 1) / 2 if case.causal else blocks**2
    found = limits(pattern, n, heads, case.causal, tile)
    pairs = n * (n + 1) / 2 if case.causal else n**2
    assert found.pairs == pytest.approx(pairs / (mask.sum().item() / heads))
    assert found.mask_tiles == pytest.approx(dense / held)
    assert found.tiles >= found.mask_tiles


def test_limits_of_a_window_at_16k():
    found = [limits(SlidingWindow(512), 16384, 8, True, tile) for tile in (128, 64)]
    assert [round(one.pairs, 1) for one in found] == [16.3, 16.3]
    assert [round(one.tiles, 1) for one in found] == [13.1, 14.5]


def test_the_check_sees_a_wrong_output():
    task = Task(CASES[6], 512, Shape(4, 2, 8, torch.float32, CPU))
    q, k, v, _ = task.shape.tensors(512, 512)
    right = operators._ours(task, "reference", q, k, v)
    assert task.error(q, k, v, right) < 1e-5
    right[0, 1, 511] += 0.01
    assert task.error(q, k, v, right) == pytest.approx(0.01, abs=1e-4)


def test_functions_take_turns_and_slow_peers_get_fewer_rounds(monkeypatch):
    turns = []
    seconds = {"ours": 3.0, "peer": 2.0, "quick": 0.5, "dense": 6.0}
    monkeypatch.setattr("benchmarks.timing.Clock.seconds", lambda self, function, calls: function())

    def work(name):
        def call():
            turns.append(name)
            return seconds[name]

        return call

    def broken():
        raise ValueError("out of order")

    found = interleaved(
        {name: work(name) for name in seconds} | {"broken": broken},
        5,
        CPU,
        Deadline(),
        full={"ours", "dense"},
    )
    warm = [name for name in seconds for _ in range(2)]
    assert turns == warm + ["ours", "peer", "quick", "dense"] * 3 + ["ours", "quick"] * 2
    assert [len(found[name].seconds) for name in seconds] == [5, 3, 5, 3]
    assert found["broken"] == Failure("ValueError: out of order") and found["ours"].calls == 1
    with pytest.raises(OutOfTime, match="needs about 6 s"):
        interleaved({"peer": work("peer")}, 5, CPU, Deadline.after(5 / 60))


def test_quartiles_of_a_reading():
    reading = Reading(1, [1.0, 2.0, 3.0, 4.0, 10.0])
    low, _, high = statistics.quantiles(reading.seconds, n=4)
    assert (reading.median, reading.iqr) == (3.0, high - low)
    assert Reading(1, [2.0]).iqr == 0.0
