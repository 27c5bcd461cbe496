"""The same comparisons on a CUDA device; `make gpu` runs them."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse.backends import attend

from .cases import PATTERNS, SHAPES, call_of, run, segments, tensors, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", ["plain", "left", "packed-padded", "empty-row"])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_on_cuda(name, kind):
    for shape in SHAPES.values():
        batch, labels = segments(kind, shape)
        given = [x.detach().cuda().requires_grad_() for x in tensors(shape)]
        for causal in (True, False):
            got, record = run("torch", given, call_of(name, causal), batch)
            want = truth([x.cpu() for x in given], PATTERNS[name][0], causal, labels, shape)
            for g, w in zip(got, want, strict=True):
                assert_close(g.cpu(), w, atol=1e-11, rtol=1e-11)  # other order of summation than on the CPU
            assert record.operator == "tiled"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_on_cuda_in_half_precision(dtype):
    shape = SHAPES["gqa"]
    q, k, v, _ = (x.detach().cuda().to(dtype) for x in tensors(shape))
    for name in PATTERNS:
        want = attend(q.double(), k.double(), v.double(), call_of(name), backend="reference")
        assert (attend(q, k, v, call_of(name)).double() - want).abs().max() < 0.05  # 8 bits of values up to 4
