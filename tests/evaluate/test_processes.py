"""Several processes measure what one measures: figures, files, and how they end when one of them fails."""

import argparse
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from hf_sparse.documents import Document
from hf_sparse.evaluate import evaluation, perplexity
from hf_sparse.evaluate.processes import PATIENCE, Processes, current_processes

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
DOCUMENTS = [(f"text {i}", SOURCE[i * 700 : i * 700 + 200 + 90 * i]) for i in range(5)]
SETTINGS = {
    "max_length": 120,
    "patterns": ["streaming_llm"],
    "contexts": [40, 80],
    "context_targets": 16,
    "key_tokens": 16,
}

EVALUATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_sparse.documents import Document
from hf_sparse.evaluate import evaluation, perplexity
from hf_sparse.evaluate.processes import current_processes
from hf_sparse.evaluate.scoring import CausalScorer

evaluation.key_positions = lambda whole, short: (short > whole + 0.1).nonzero()[0]  # else a random model has none

model, folder, documents, settings, failing = sys.argv[1:]
documents = [Document(name, text) for name, text in json.loads(documents)]
model, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
processes = current_processes()
if failing and processes.rank == int(failing):
    def nats(self, jobs):
        raise ValueError("the weights of process " + failing + " are damaged")
    CausalScorer.nats = nats
sums = {}
for batch_size, count in ((1, 5), (2, 5), (1, 1)):
    name = f"{batch_size}-{count}"
    result = perplexity(model, tokenizer, documents[:count], batch_size=batch_size, output=f"{folder}/{name}",
                        progress=True, **json.loads(settings))
    sums[name] = [
        [run.title, run.nats.tolist(), run.key_nats.tolist(), run.calls, run.density, run.served.kv_bytes]
        for run in result.runs
    ]
if processes.is_main:
    print("one of", processes.world)
with open(f"{folder}/sums.{processes.rank}.json", "w") as file:
    json.dump(sums, file)
"""


def launch(arguments, processes, tmp_path, timeout=200):
    """Run python with the arguments under accelerate, in so many processes; with --cpu it starts one only."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env={**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launch_evaluation(processes, model_folder, tmp_path, failing=""):
    script, folder = tmp_path / "evaluate.py", tmp_path / f"results-{processes}"
    script.write_text(EVALUATE)
    folder.mkdir()
    arguments = [script, model_folder, folder, json.dumps(DOCUMENTS), json.dumps(SETTINGS), failing]
    return folder, launch(list(map(str, arguments)), processes, tmp_path)


@pytest.fixture
def lenient_key_tokens(monkeypatch):
    """The rule of the script above, in this process."""
    monkeypatch.setattr(evaluation, "key_positions", lambda whole, short: (short > whole + 0.1).nonzero()[0])


def assert_equals_one_process(folder, processes, model, tokenizer):
    """Compare what every process found, and what is on disk, with an evaluation in this process."""
    found = [json.loads((folder / f"sums.{rank}.json").read_text()) for rank in range(processes)]
    assert all(sums == found[0] for sums in found), "every process gives the whole result"
    for name, runs in found[0].items():
        batch_size, count = map(int, name.split("-"))
        documents = [Document(*document) for document in DOCUMENTS[:count]]
        alone = perplexity(model, tokenizer, documents, batch_size=batch_size, **SETTINGS)
        for run, (title, nats, key_nats, *counted) in zip(alone.runs, runs, strict=True):
            assert title == run.title and counted == [run.calls, run.density, run.served.kv_bytes]
            np.testing.assert_allclose(nats, run.nats, rtol=1e-6)
            np.testing.assert_allclose(key_nats, run.key_nats, rtol=1e-6)
            assert min(key_nats) > 0
        rows = [json.loads(line) for line in (folder / name / "per_document.jsonl").read_text().splitlines()]
        assert [(row["document"], row["run"]) for row in rows] == [
            (row["document"], row["run"]) for row in alone.rows
        ]
        for row, same in zip(rows, alone.rows, strict=True):
            assert row.keys() == same.keys() and row["name"] == same["name"]
            np.testing.assert_allclose(row["block_nats"], same["block_nats"], rtol=1e-6)
            assert row.get("key_positions") == same.get("key_positions")
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == ["evaluation.json", "per_document.jsonl"], "the part files are merged"


@pytest.mark.usefixtures("lenient_key_tokens")
def test_two_processes_measure_what_one_does(tiny_model, tiny_tokenizer, tiny_model_folder, tmp_path):
    folder, done = launch_evaluation(2, tiny_model_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["one of 2"], "only the main process prints"
    assert_equals_one_process(folder, 2, tiny_model, tiny_tokenizer)


@pytest.mark.parametrize(
    "failing", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=lambda rank: f"process {rank}"
)
def test_when_one_process_fails_all_end_with_its_message(tiny_model_folder, tmp_path, failing):
    folder, done = launch_evaluation(2, tiny_model_folder, tmp_path, failing)
    assert done.returncode != 0 and not done.stdout
    assert f"ValueError: the weights of process {failing} are damaged" in done.stderr
    assert not list(folder.glob("sums.*"))


@pytest.mark.slow
@pytest.mark.usefixtures("lenient_key_tokens")
def test_three_processes_measure_what_one_does(tiny_model, tiny_tokenizer, tiny_model_folder, tmp_path):
    folder, done = launch_evaluation(3, tiny_model_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equals_one_process(folder, 3, tiny_model, tiny_tokenizer)


@pytest.mark.slow
def test_the_command_line_measures_in_two_processes_and_prints_once(tiny_model_folder, texts, tmp_path):
    command = ["eval", str(tiny_model_folder), "--pattern", "streaming_llm", "--length=100", "--text", *texts]
    done = launch(["-m", "hf_sparse.cli", *command, "--output", "two"], 2, tmp_path)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "hf_sparse.cli", *command, "--device", "cpu", "--output", "one"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for run, same in zip(two["runs"], one["runs"], strict=True):
        assert run["nats_per_token"] == pytest.approx(same["nats_per_token"], rel=1e-6)
        assert (run["calls"], run["kv_cache"]) == (same["calls"], same["kv_cache"])
    assert len(done.stdout.splitlines()) == len(alone.stdout.splitlines()), "only the main process prints"
    assert done.stderr.count("written: ") == 1, "only the main process writes results"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_every_item_goes_to_one_process(world, count):
    shares = [Processes(rank, world).share(range(count)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_each_think_they_are_alone_are_refused(monkeypatch, name):
    from accelerate import PartialState

    PartialState._reset_state()
    PartialState()  # as a script does on a machine without a GPU: it looks for no other process
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate runs 1, so each would"):
        current_processes()
    PartialState._reset_state()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_processes() == Processes(0, 1)
    assert current_processes().is_main and current_processes().gather([1, 2]) == [1, 2]
    assert timedelta(days=1) < PATIENCE, "a process waits for the one with the longest documents"
