"""An evaluation that is killed again and again ends with the results of one that was not."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
DOCUMENTS = [(f"text {i}", SOURCE[i * 700 : i * 700 + 300 + 90 * i]) for i in range(6)]

# Everything is imported once, then every run is a fork: a process of its own, killed from outside at a random moment.
# The disk is slowed down, so that moments within a write are as likely as those between.
KILL = """
import json, os, random, signal, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_sparse.documents import Document
from hf_sparse.evaluate import evaluation, journal, perplexity, save_results

model, folder, documents, kills = sys.argv[1:]
documents = [Document(name, text) for name, text in json.loads(documents)]
SLOW = 0.01  # seconds
evaluation.key_positions = lambda whole, short: (short > whole + 0.1).nonzero()[0]  # else a random model has none

class SlowFile:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, content):
        for begin in range(0, len(content), len(content) // 3 + 1):
            self.file.write(content[begin : begin + len(content) // 3 + 1])
            self.file.flush()
            time.sleep(SLOW)
    def flush(self):
        pass
    def fileno(self):
        return self.file.fileno()

def slow(function):
    def slowed(*arguments):
        time.sleep(SLOW)
        result = function(*arguments)
        time.sleep(SLOW)
        return result
    return slowed

def evaluate(output):
    plain = os.fdopen
    os.fdopen = lambda handle, mode: SlowFile(plain(handle, mode))
    journal.open = lambda path, mode: SlowFile(open(path, mode))
    os.fsync, os.replace = slow(os.fsync), slow(os.replace)
    result = perplexity(
        AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model), documents,
        max_length=150, patterns=["sliding_window", "random"], batch_size=2, contexts=[60, 90], context_targets=32,
        key_tokens=24, output=output,
    )
    save_results(result, output)

def run(output, seconds=None):
    started = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            evaluate(output)
            code = 0
        finally:
            os._exit(code)
    ended = 0
    while not ended:
        if seconds is not None and time.monotonic() - started > seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code == 0, time.monotonic() - started

def state(output):
    rows = Path(output, "per_document.jsonl")
    if not Path(output, "evaluation.json").exists():
        return "nothing"
    if Path(output, "results.json").exists():
        return "results"
    content = rows.read_bytes() if rows.exists() else b""
    torn = "" if not content or content.endswith(b"\\n") else " and a torn one"
    return f"{content.count(bytes([10]))} rows{torn}"

whole, length = run(f"{folder}/straight")
assert whole
draw, killed, output = random.Random(0), [], 0
while len(killed) < int(kills):  # an evaluation that got to its end is kept, and the next one begins in a new folder
    ended, _ = run(f"{folder}/killed-{output}", draw.uniform(0, length))
    output += ended
    killed += [] if ended else [f"{output}: " + state(f"{folder}/killed-{output}")]
assert run(f"{folder}/killed-{output}")[0]
print(json.dumps(killed))
"""


def without_timing(path):
    """Return the content of a file of results, byte for byte but for its timing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        values = [json.loads(text)]
    elif path.suffix == ".jsonl":
        values = [json.loads(line) for line in text.splitlines()]
    else:
        return text
    return [json.dumps({key: value[key] for key in value if key != "timing"}) for value in values]


def results(folder):
    """Return the files of an evaluation that hold more than timing; what a killed write left lies in hidden ones."""
    return {
        path.name: without_timing(path)
        for path in folder.iterdir()
        if "timing" not in path.name and not path.name.startswith(".")
    }


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_results_are_the_same(tiny_model_folder, tmp_path, kills):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILL, tiny_model_folder, tmp_path, json.dumps(DOCUMENTS), str(kills)],
        cwd=tmp_path,
        env={**environment, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print("killed with", ", ".join(found))
    assert len(found) == kills
    straight = results(tmp_path / "straight")
    assert {"evaluation.json", "per_document.jsonl", "results.json"} <= straight.keys()
    rows = [json.loads(row) for row in straight["per_document.jsonl"]]
    assert len(rows) == len(DOCUMENTS) * 3 and all(row["key_nats"] > 0 for row in rows)
    for folder in tmp_path.glob("killed-*"):
        assert results(folder) == straight, folder.name
