"""The arrows between the layers, read off the import statements, and what importing the package does not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_sparse"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each layer may import of the package; `documents` is a leaf that only the top may read.
BELOW = {
    "documents": set(),
    "patterns": set(),
    "selectors": {"patterns"},
    "plan": {"patterns", "selectors"},
    "backends": {"patterns", "selectors", "plan"},
    "hf": {"patterns", "selectors", "plan", "backends"},
    "evaluate": {"patterns", "selectors", "plan", "backends", "hf", "documents"},
    "calibrate": {"patterns", "selectors", "plan", "backends", "hf", "evaluate", "documents"},
    "analyze": {"patterns", "selectors", "plan", "backends", "hf", "evaluate", "calibrate", "documents"},
    "train": {"patterns", "selectors", "plan", "backends", "hf", "evaluate", "documents"},
    "cli": {
        *("patterns", "selectors", "plan", "backends", "hf"),
        *("evaluate", "calibrate", "analyze", "train", "documents"),
    },
}
MEET_TRANSFORMERS = {"hf", "evaluate", "calibrate", "analyze", "train", "cli"}
JOIN_BACKENDS = {"__init__", "choose"}  # files of backends/ that may know several backends


def modules_imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of every module a file imports, lazily or not; `from . import x` gives the name of x."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer a dotted name of the package lies in, None for the package itself and for names it re-exports."""
    parts = module.split(".")
    return parts[1] if parts[0] == "hf_sparse" and len(parts) > 1 and parts[1] in BELOW else None


def file_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_source_file_belongs_to_a_known_layer():
    layers = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    assert layers <= {*BELOW, "__init__", "__main__"}


@pytest.mark.parametrize("path", SOURCES, ids=file_id)
def test_imports_follow_the_arrows(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer not in BELOW:
        return  # the package's own __init__ hands out names of every layer
    imported = list(modules_imported(path))
    back = {
        name
        for name in imported
        if layer_of(name) not in {None, layer} and layer_of(name) not in BELOW[layer]
    }
    assert not back, f"{file_id(path)} imports {sorted(back)}, against the arrows"
    if layer not in MEET_TRANSFORMERS:
        host = {name for name in imported if name.split(".")[0] in {"transformers", "peft", "accelerate"}}
        assert not host, f"{file_id(path)} imports {sorted(host)}; only {sorted(MEET_TRANSFORMERS)} may"


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends").rglob("*.py")), ids=file_id)
def test_backends_do_not_import_each_other(path):
    own = (
        path.relative_to(PACKAGE / "backends").parts[0].removesuffix(".py")
    )  # a backend is a file or a folder
    if own in JOIN_BACKENDS:
        return
    imported = {
        m.split(".")[2] for m in modules_imported(path) if layer_of(m) == "backends" and m.count(".") > 1
    }
    every = {entry.name.removesuffix(".py") for entry in (PACKAGE / "backends").iterdir()}
    # what every backend is asked and reports, and the blocks that a call reads besides its plan
    foreign = (imported & every) - {own, "call", "selected"}
    assert not foreign, f"{file_id(path)} imports {sorted(foreign)}; only choose.py joins backends"


def test_no_drawer_files_and_no_long_ones():
    folders = [PACKAGE, ROOT / "recipes", ROOT / "benchmarks"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(paths) > len(SOURCES)
    drawers = [file_id(p) for p in paths if p.stem in {"utils", "util", "common", "helpers", "misc"}]
    assert not drawers
    long = {file_id(p): n for p in paths if (n := len(p.read_text(encoding="utf-8").splitlines())) > 300}
    assert not long


IMPORT_ONLY = """
import sys
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
optional = {"datasets", "evaluate", "peft", "matplotlib"}
before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
own = {k: v for k, v in vars(modeling_llama).items()}
methods = dict(vars(modeling_llama.LlamaAttention))
import hf_sparse
assert hf_sparse.patch_model and hf_sparse.load, "the public names are there"
loaded = optional & set(sys.modules)
assert not loaded, f"import hf_sparse loads {sorted(loaded)}"
assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in before.items()), "a function was replaced"
added = set(ALL_ATTENTION_FUNCTIONS.valid_keys()) - set(before)
assert all(name.startswith("sparse_") for name in added), added
assert dict(vars(modeling_llama.LlamaAttention)) == methods, "LlamaAttention was patched"
assert all(getattr(modeling_llama, k) is v for k, v in own.items()), "modeling_llama was patched"
print("names only")
"""


def test_importing_the_package_adds_names_only():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ONLY], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (run.returncode, run.stdout.strip()) == (0, "names only"), run.stderr
