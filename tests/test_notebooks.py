"""The notebooks: they run as they are, and what is committed is what a run of them gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
PICTURES = {"1_tour": 4, "2_your_own_pattern": 3, "3_speed_and_memory": 3}  # at least
# A folder of the machine that ran it: "/home/...", "C:\...". Addresses on the web have a second slash before.
MACHINE_PATH = re.compile(r"(?<![\w/.:<])/(?:home|root|tmp|usr|opt|var|work|private|Users)/|[A-Z]:\\\\")
PNG = "iVBORw0KGgo"  # how a PNG begins in base64


def execute(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = (sys.executable, "-W", "error", FOLDER / "execute.py", *arguments)
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=290
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def faults(notebook, pictures):
    """Return what is wrong with a notebook's outputs; nothing where it ran to its end and tells only of its subject."""
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    found = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not run once from top to bottom")
    found += [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    found += ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]
    drawn = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    if len(drawn) < pictures or not all("".join(png).startswith(PNG) for png in drawn):
        found.append(f"{len(drawn)} pictures")
    told = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs])
    found += [match.group() for match in MACHINE_PATH.finditer(told)]
    return found


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_committed_holds_its_outputs_and_no_paths(name):
    assert faults(read(FOLDER / f"{name}.ipynb"), PICTURES[name]) == []


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_on_a_machine_without_settings(name, tmp_path):
    # Settings that would break it, were they read: a python3 kernel of another interpreter, a start-up file.
    home = tmp_path / "home"
    kernel = home / ".local/share/jupyter/kernels/python3/kernel.json"
    startup = home / ".ipython/profile_default/startup/first.py"
    for path, text in ((kernel, '{"argv": ["false"], "language": "python"}'), (startup, "1 / 0\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    committed = FOLDER / f"{name}.ipynb"
    before = committed.read_bytes()

    done = execute("--output", tmp_path, committed, HOME=str(home))

    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    made = read(tmp_path / committed.name)
    assert faults(made, PICTURES[name]) == []
    sources = [[cell["source"] for cell in notebook["cells"]] for notebook in (made, read(committed))]
    assert sources[0] == sources[1]
    assert committed.read_bytes() == before


def test_an_error_in_a_cell_ends_with_it_and_leaves_the_file(tmp_path):
    notebook = read(FOLDER / "1_tour.ipynb")
    notebook["cells"] = code_cells(notebook)[:1]
    notebook["cells"][0].update(source="import sys\nassert False, sys.executable", outputs=[])
    broken = tmp_path / "broken.ipynb"
    broken.write_text(json.dumps(notebook), encoding="utf-8")
    before = broken.read_bytes()

    done = execute(broken)

    assert done.returncode == 1
    assert f"AssertionError: {sys.executable}" in done.stderr, "it ran with the Python that runs the tests"
    assert broken.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.ipynb"]
