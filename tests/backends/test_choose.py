"""What `auto` picks, what explicit names refuse, and what the record says; devices that are not here are only named."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.backends import BACKENDS, Call, Inputs, attend, check_backend, preview, recording
from hf_sparse.backends.table import TABLE, order
from hf_sparse.patterns import get_pattern
from hf_sparse.plan import Constraint

from .cases import Shape, tensors

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
FIXED = get_pattern("sparse_transformer_fixed", block=64, summary=4)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a CUDA device of capability 9.0 and Triton, as far as the choice can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "triton" else found(name, *rest)
    )


def pick(
    pattern, device, dtype, length, *, backend="auto", head_size=64, gradients=True, sinks=False, **options
):
    inputs = Inputs(device, dtype, head_size, gradients, sinks)
    return preview(Call(pattern, **options), inputs, heads=4, length=length, backend=backend)


@pytest.mark.parametrize(
    ("pattern", "dtype", "length", "backend", "operator"),
    [
        (SlidingWindow(128), BF16, 4096, "cuda_flash", "flash_attention"),
        (StreamingLLM(4, 252), BF16, 4096, "cuda_flash", "flash_attention"),
        (Strided(64), BF16, 4096, "cuda_flash", "flash_attention"),
        (SlidingWindow(128), BF16, 300, "cuda_flash", "flash_attention"),
        (FIXED, BF16, 4096, "flex", "flex_attention"),
        (FIXED, BF16, 600, "torch", "tiled"),
        (SlidingWindow(128), FP32, 4096, "flex", "flex_attention"),
        (SlidingWindow(128), FP32, 600, "torch", "tiled"),
        (SlidingWindow(128), FP64, 4096, "torch", "tiled"),
        (Full(), BF16, 4096, "torch", "dense"),
        (SlidingWindow(4096), BF16, 4096, "torch", "dense"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_auto_on_cuda(pattern, dtype, length, backend, operator):
    assert pick(pattern, CUDA, dtype, length) == (backend, operator)


@pytest.mark.usefixtures("hopper")
def test_auto_leaves_out_what_cannot_run():
    window = SlidingWindow(128)
    assert pick(window, CUDA, BF16, 4096, dropout=0.1) == ("torch", "tiled")
    assert pick(window, CUDA, BF16, 4096, softcap=30.0) == ("flex", "flex_attention")
    assert pick(window, CUDA, FP32, 4096, head_size=256) == ("flex", "flex_attention")
    assert pick(window, CUDA, BF16, 4096, head_size=512) == ("torch", "tiled")
    assert pick(window, CUDA, BF16, 4096, sinks=True) == ("flex", "flex_attention")
    assert pick(window, CUDA, BF16, 600, sinks=True) == ("torch", "tiled")
    assert pick(Full(), CUDA, BF16, 600, sinks=True) == ("torch", "tiled")


def test_recorders_that_are_open_at_once_are_two():
    q, k, v, _ = tensors(Shape(2, 2, 9, 9))
    with recording() as outer:
        with recording() as inner:
            pass
        attend(q, k, v, Call(SlidingWindow(3)))
    assert (len(outer.calls), len(inner.calls)) == (1, 0)


def test_auto_without_triton_or_on_an_old_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert pick(SlidingWindow(128), CUDA, BF16, 4096) == ("torch", "tiled")
    with pytest.raises(ValueError, match="Triton, which is not installed"):
        pick(SlidingWindow(128), CUDA, BF16, 4096, backend="flex")


@pytest.mark.parametrize("device", [CPU, MPS], ids=str)
def test_auto_elsewhere_is_torch(device):
    for length in (100, 5000):
        assert pick(Longformer(64), device, FP32, length).backend == "torch"
        assert pick(Longformer(64), device, BF16, length).backend == "torch"
    assert pick(Longformer(64), CPU, FP32, 5000).operator == "flash+tiled"
    assert pick(Full(), device, FP32, 50) == ("torch", "dense")


def test_the_record_says_what_ran():
    q, k, v, _ = (x.detach() for x in tensors(Shape(2, 2, 60, 60), FP32))
    for backend, pattern, expected in [
        ("auto", SlidingWindow(9), ("torch", "flash+tiled")),
        ("auto", SlidingWindow(60), ("torch", "dense")),
        ("torch", SlidingWindow(60), ("torch", "flash+tiled")),
        ("reference", SlidingWindow(9), ("reference", "dense")),
    ]:
        with recording() as seen:
            attend(q, k, v, Call(pattern, Constraint()), backend=backend)
        assert (seen.calls[0].backend, seen.calls[0].operator) == expected
        shown = preview(Call(pattern), Inputs(CPU, FP32, 8), heads=2, length=60, backend=backend)
        assert shown == expected, "preview and attend must not differ"


def test_explicit_names_obey_or_raise_with_every_reason():
    for name in ("flex", "cuda_flash"):
        with pytest.raises(
            ValueError, match=rf"backend='{name}' cannot run this call: .*; .*; use backend='auto'"
        ):
            pick(SlidingWindow(8), MPS, FP64, 100, backend=name)
    with pytest.raises(
        ValueError, match=r"unknown backend 'fast'\. Available: auto, reference, torch, flex, cuda_flash"
    ):
        check_backend("fast")
    assert [check_backend(name) for name in BACKENDS] == list(BACKENDS)


def test_the_table_is_plain_and_says_where_it_comes_from():
    rows = [asdict(row) for row in TABLE]
    assert json.loads(json.dumps(rows)) == [
        {**row, "dtypes": list(row["dtypes"]), "backends": list(row["backends"])} for row in rows
    ]
    for row in TABLE:
        assert row.source and set(row.backends) < set(BACKENDS) and "torch" not in row.backends
        assert all(isinstance(getattr(torch, name), torch.dtype) for name in row.dtypes)
        assert order(row.device, row.dtypes[0], row.queries)[0] == row.backends[0]
    assert order("cpu", "float32", 10**6) == ("torch",)


def test_flex_attention_is_imported_when_it_is_asked_for():
    # Without the package's own __init__, whose transformers imports it for itself.
    code = (
        "import sys, types\n"
        "root = types.ModuleType('hf_sparse'); root.__path__ = [sys.argv[1]]; sys.modules['hf_sparse'] = root\n"
        "import torch; before = 'torch.nn.attention.flex_attention' in sys.modules\n"
        "import hf_sparse.backends\n"
        "print(before, 'torch.nn.attention.flex_attention' in sys.modules)"
    )
    folder = str(Path(hf_sparse.__file__).parent)
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    before, after = ran.stdout.split()
    assert before == after, ran.stderr
