"""Two processes write one checkpoint together, and go on from it with the same bits."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from .runs import adapter, names, same

PROGRAM = """
import sys
from pathlib import Path
from checkpoints.runs import Killed, make_trainer

place = Path(sys.argv[1])
make_trainer(place, "straight", max_steps=4, limit=1).train()
try:
    make_trainer(place, "run", kill_at=2, max_steps=4, limit=1).train()
except Killed:
    make_trainer(place, "run", max_steps=4, limit=1, resume_from_checkpoint="auto").train("auto")
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = (Path(__file__).resolve().parents[3], Path(__file__).resolve().parents[1])
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for run in (tmp_path / "run", tmp_path / "straight"):
        assert names(run) == ["checkpoint-4"]
        assert {"random_state_0.json", "random_state_1.json"} <= set(names(run / "checkpoint-4"))
    assert same(*(adapter(tmp_path / run / "checkpoint-4") for run in ("run", "straight")))
