"""The streaming recipes, run as a person runs them, at a small size."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


def run(*command):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        (sys.executable, *map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=180
    )


def test_the_chat_keeps_one_cache_that_stays_the_same_size():
    done = run("recipes/streaming_chat.py", "--window", 60, "--max-new-tokens", 70)
    assert done.returncode == 0, done.stderr
    states = re.findall(r"\[([\d,]+) tokens seen, ([\d,]+) kept in ([\d.]+) MiB\]", done.stdout)
    seen = [int(state[0]) for state in states]
    assert len(seen) == 5 and seen[-1] > 300 and seen == sorted(set(seen))
    assert len({size for _, _, size in states[2:]}) == 1, "the window is full"
    assert all(int(kept) <= 60 + 4 + 128 for _, kept, _ in states[1:])
    assert "def push(self, item):" in done.stdout


def test_the_curve_measures_every_run_and_draws_it(tmp_path):
    done = run(
        *(
            "recipes/streaming_curve.py",
            "--tokens",
            700,
            "--dense-tokens",
            500,
            "--window",
            60,
            "--every",
            100,
        ),
        *(
            "--repeats",
            3,
            "--generate",
            30,
            "--results",
            tmp_path / "out" / "s.json",
            "--plot",
            tmp_path / "s.png",
        ),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "s.json").read_text())
    assert record["command"].startswith("python recipes/streaming_curve.py --tokens 700")
    assert record["machine"]["versions"]["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    runs = {name: run["samples"] for name, run in record["runs"].items()}
    control, streaming, window, absolute, dense = runs.values()
    assert list(runs)[1:] == [
        "streaming_llm(sinks=4, window=60, positions='cache')",
        "sliding_window(window=64)",
        "streaming_llm(sinks=4, window=60)",
        "dense",
    ]
    assert [s["tokens"] for s in streaming] == [100 * n for n in range(1, 8)] and len(dense) == 5
    for sparse in (streaming, window, absolute):
        assert len({s["bytes"] for s in sparse[2:]}) == 1
    token_bytes = 2 * 6 * 4 * 32 * 4  # keys and values, layers, heads, size of a head, float32
    assert streaming[-1]["bytes"] <= (60 + 4 + 128) * token_bytes
    assert [s["bytes"] for s in dense] == [s["tokens"] * token_bytes for s in dense]
    first = {run[0]["loss"] for run in (control, streaming, absolute)}
    assert max(first) - min(first) < 0.05, "all begin with the same text"
    assert control[-1]["loss"] != streaming[-1]["loss"] != absolute[-1]["loss"]
    assert all(s["step_seconds"] > 0 for s in streaming)
    assert [mark["tokens"] for mark in record["generate"]] == [30]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


def test_losses_of_chunks_are_those_of_single_tokens(tmp_path):
    losses = []
    for chunk in (1, 37):
        results = tmp_path / f"{chunk}.json"
        done = run(
            *(
                "recipes/streaming_curve.py",
                "--tokens",
                240,
                "--dense-tokens",
                1,
                "--window",
                20,
                "--every",
                80,
            ),
            *("--repeats", 1, "--chunk", chunk, "--results", results, "--plot", tmp_path / "s.png"),
        )
        assert done.returncode == 0, done.stderr
        runs = json.loads(results.read_text())["runs"]
        losses.append([s["loss"] for run in runs.values() for s in run["samples"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_summary_compares_the_end_with_the_beginning(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    summary = runpy.run_path(str(RECIPES / "streaming_report.py"))["summary"]

    def samples(loss, stop=20_000):
        return [
            {
                "tokens": n,
                "bytes": min(n, 1500),
                "step_seconds": 1e-3,
                "loss": loss(n),
            }
            for n in range(1000, stop + 1, 1000)
        ]

    rising, flat = samples(lambda n: n / 10_000), samples(lambda n: 0.25)
    found = summary(rising, flat)
    assert found.pop("bytes") == [1500, 1500]
    assert found == pytest.approx(
        {
            "loss_early": 0.6,  # 2,000 to 10,000
            "loss_late": 1.95,  # 19,000 and 20,000
            "above_control_early": 0.35,
            "above_control_late": 1.7,
        }
    )
    assert summary(samples(lambda n: 1.0, stop=10_000), flat) == {}


def test_mistakes_are_one_sentence_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("recipes/streaming_curve.py", "--results", tmp_path / "file" / "s.json")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run("recipes/streaming_curve.py", "--tokens", 10**9, "--results", tmp_path / "s.json")
    assert done.returncode == 2 and "held-out files have" in done.stderr
    assert not (tmp_path / "s.json").exists()
