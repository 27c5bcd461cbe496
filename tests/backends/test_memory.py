"""What one call allocates: no tensor with two n-sized dimensions, and little beyond inputs and output."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse import Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.backends import Call, attend
from hf_sparse.plan import Constraint

N = 4096
PATTERNS = [SlidingWindow(window=256), Longformer(window=256), StreamingLLM(window=256), Strided(stride=64)]


class Largest(TorchDispatchMode):
    """Remember the most elements any tensor had, and whether one had two dimensions as long as the sequence."""

    def __init__(self):
        super().__init__()
        self.elements, self.square = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
                self.square = self.square or sum(size >= N for size in x.shape) >= 2
        return result


def qkv(layout, dtype=torch.float32, heads=8, kv_heads=8):
    if layout == "host":  # as transformers hands them over: [B, N, H, D] transposed
        return [torch.randn(1, N, h, 32, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(1, h, N, 32, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [*PATTERNS, SlidingWindow(window=64) | Strided(stride=64)], ids=str)
def test_no_tensor_has_two_dimensions_of_the_sequence(pattern, causal):
    q, k, v = (x.requires_grad_() for x in qkv("host"))
    with Largest() as seen:
        out = attend(q, k, v, Call(pattern, Constraint(causal)), backend="torch")
        out.sum().backward()
    assert not seen.square
    assert seen.elements <= 8 * N * 32  # one input's size


def test_the_watcher_sees_a_square_tensor():
    q, k, v = qkv("host", heads=1, kv_heads=1)
    with Largest() as seen:
        attend(q, k, v, Call(SlidingWindow(window=256)), backend="reference")
    assert seen.square and seen.elements >= N * N


def peak(work) -> tuple[int, object]:
    """Return the most bytes that `work` held at once beyond what was there before, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, result


def nbytes(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("layout", ["host", "heads-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_workspace_of_one_call(pattern, dtype, layout):
    """Forward at most 0.5x of q + k + v + o beyond inputs and output; backward at most 1.5x beyond gradients too."""
    q, k, v = (x.requires_grad_() for x in qkv(layout, dtype))
    call = Call(pattern)
    attend(q, k, v, call, backend="torch").sum().backward()  # plans and masks are kept from here on
    for x in (q, k, v):
        x.grad = None
    most, out = peak(lambda: attend(q, k, v, call, backend="torch"))
    unit = nbytes(q, k, v, out)
    assert most - nbytes(out) <= 0.5 * unit
    grad = torch.randn_like(out)
    most, gradients = peak(lambda: torch.autograd.grad(out, (q, k, v), grad))
    assert most - nbytes(*gradients) <= 1.5 * unit
