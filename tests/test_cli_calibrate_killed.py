"""A calibration that is killed again and again ends with the files of one that was not, byte for byte."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Everything is imported once, then every run is a fork that kills itself at a row of its own choice: before it is
# written, with half of it on disk, or after.
KILL = """
import json, os, random, signal, sys
from pathlib import Path
from hf_sparse.cli import main
from hf_sparse.evaluate.journal import Journal

command, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
append = Journal.append

def run(name, at=None, half=False):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rows = 0
    def counted(self, new):
        nonlocal rows
        if rows == at:
            if half:
                with open(self._path(0), "ab") as file:
                    file.write(json.dumps(list(new)[0]).encode()[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        rows += 1
        append(self, new)
    Journal.append = counted
    code = 1
    try:
        code = main([*command, "--quiet", "--output", str(folder / f"{name}.json")])
    finally:
        os._exit(code)

def rows(name):
    path = folder / f"{name}.calibration" / "figures.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0

assert run("straight") == 0
whole, draw, killed = rows("straight"), random.Random(0), []
for number in range(kills):
    left = whole - rows("killed")
    code = run("killed", draw.randrange(max(1, 2 * left // (kills - number + 1))), half=number % 2 == 0)
    assert code == -signal.SIGKILL and not (folder / "killed.json").exists(), (code, left)
    killed.append(rows("killed"))
assert run("killed") == 0
print(json.dumps([whole, killed]))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_calibrations_go_on_to_the_same_bytes(tiny_model_folder, tmp_path, kills):
    text = tmp_path / "text.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    command = ["calibrate", str(tiny_model_folder), "--text", str(text), "--length", "48", "--samples", "2"]
    command += ["--budget", "0.4", "--candidates", "sliding_window:window=4", "sliding_window:window=16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILL, json.dumps(command), tmp_path, str(kills)],
        env={**environment, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    whole, killed = json.loads(done.stdout.splitlines()[-1])
    assert len(killed) == kills and killed == sorted(killed) and 0 < killed[-1] < whole
    for name in (
        ".json",
        ".calibration/calibration.json",
        ".calibration/frontier.csv",
        ".calibration/figures.jsonl",
    ):
        assert (tmp_path / f"killed{name}").read_bytes() == (tmp_path / f"straight{name}").read_bytes(), name
