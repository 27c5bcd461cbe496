"""The backends on a CUDA device, against a float64 reference on the CPU; `make gpu-tests` runs them.

The most important tests stand first, and those that compile kernels share few of them: one length, one number of
heads, one head size. GPU_TEST_MINUTES, where it is set, is the time after which no further test begins; what is left is
skipped and says so. At the end stands how many kernels were compiled, and the seconds that took.
"""

import os
import time

import pytest
import torch
from torch.testing import assert_close

from benchmarks.timing import compiled
from hf_sparse import Pattern, SlidingWindow, TopKBlocks, get_pattern
from hf_sparse.backends import Call, attend
from hf_sparse.backends.selected import select_all
from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint, Segments
from hf_sparse.selectors import divided

from .cases import PATTERNS, SHAPES, Shape, call_of, oracle, run, segments, tensors, truth, written_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Compilers of the many torch versions that GPU machines have warn about themselves.
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("while_time_is_left", "compiled_kernels"),
]

STARTED = time.monotonic()
READY = ("cuda_flash", "torch")  # backends that compile nothing
DENSE = ("full", "layered", "rerope", "self_extend")  # by default, in some layer at least
OUTPUTS = ("out", "dq", "dk", "dv")
# Options that leave something out in a few hundred tokens, the most wanted patterns first.
SMALL = {
    "sliding_window": {"window": 137},
    "streaming_llm": {"sinks": 4, "window": 130},
    "longformer": {"window": 124, "global_tokens": (0, 7, 40)},
    "sparse_transformer_strided": {"stride": 64},
    "sparse_transformer_fixed": {"block": 64, "summary": 8},
    "bigbird": {"block": 64},
    "dilated_window": {"window": 30, "dilation": 4},
    "block_local": {"block": 64},
    "global_tokens": {"positions": (0, 7, 40)},
    "strided": {"stride": 16},
    "atrous": {"stride": 16},
    "atrous_local": {"stride": 16},
    "multi_scale": {"window": 32, "scales": 3},
    "shifted": {"group": 128},
    "grouped_heads": {"window": 64, "adaptive_window": False},
    "random": {"keys_per_query": 16},
}
NAMES = (*SMALL, *(name for name in static_patterns() if name not in SMALL))
SHAPE = Shape(4, 2, 700, 700, width=64, v_width=64, batch=1)  # six blocks of FlexAttention's masks


@pytest.fixture
def while_time_is_left():
    minutes = os.environ.get("GPU_TEST_MINUTES")
    if minutes and time.monotonic() - STARTED > 60 * float(minutes):
        pytest.skip(f"GPU_TEST_MINUTES={minutes} are over")


@pytest.fixture(scope="module")
def compiled_kernels(request):
    yield
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line(f"\n{compiled()}")


def pattern_of(name: str, length: int) -> Pattern:
    return get_pattern(name, **SMALL.get(name, {})).resolve(length)


def attention(backend: str, given, call: Call, batch=None):
    """Return (output, dq, dk, dv); skip where a backend refuses the call with its reasons. `torch` refuses nothing."""
    try:
        return run(backend, given, call, batch)[0]
    except ValueError as error:
        if backend == "torch" or "cannot run this call" not in str(error):
            raise
        pytest.skip(f"{backend}: {error}")


def check_half(backend: str, name: str, causal: bool = True, kind: str = "plain", shape: Shape = SHAPE):
    """Errors are at most 2x those of plain attention in bfloat16, 3x for gradients."""
    pattern = pattern_of(name, shape.k_len)
    batch, labels = segments(kind, shape)
    given = [x.detach().cuda().requires_grad_() for x in tensors(shape, torch.bfloat16)]
    got = attention(backend, given, Call(pattern, Constraint(causal)), batch)
    want = truth([x.cpu() for x in given], pattern, causal, labels, shape)
    q, k, v, grad = given
    plain = oracle(q, k, v, written_mask(pattern, causal, labels, shape).cuda())
    naive = (plain.detach(), *torch.autograd.grad(plain, (q, k, v), grad))
    for what, g, n, w, factor in zip(OUTPUTS, got, naive, want, (2, 3, 3, 3), strict=True):
        assert g.dtype == torch.bfloat16
        error, allowed = (g.double().cpu() - w).abs().max(), factor * (n.double().cpu() - w).abs().max()
        assert error <= allowed, f"{what}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", NAMES)
def test_causal(name, backend):
    """Query heads share keys."""
    check_half(backend, name)


@pytest.mark.parametrize("name", NAMES)
def test_causal_flex(name):
    check_half("flex", name)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", NAMES)
def test_both_sides(name, backend):
    check_half(backend, name, causal=False)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", NAMES)
def test_left_padding(name, backend):
    check_half(backend, name, kind="left", shape=Shape(4, 2, 300, 300, width=32, v_width=32))


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", NAMES)
def test_decode_step(name, backend):
    check_half(backend, name, kind="left", shape=Shape(4, 2, 1, 300, width=32, v_width=32))


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "strided", "bigbird"])
def test_odd_head_sizes_and_chunked_prefill(name, backend):
    check_half(backend, name, shape=Shape(4, 2, 300, 300, width=20, v_width=12))
    check_half(backend, name, shape=Shape(4, 1, 90, 300, width=64, v_width=64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_auto_in_half_precision(dtype):
    shape = SHAPES["gqa"]
    q, k, v, _ = (x.detach().cuda().to(dtype) for x in tensors(shape))
    for name in PATTERNS:
        want = attend(q.double(), k.double(), v.double(), call_of(name), backend="reference")
        assert (attend(q, k, v, call_of(name)).double() - want).abs().max() < 0.05  # 8 bits of values up to 4


@pytest.mark.parametrize("backend", ["torch", "flex"])
@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "strided"])
def test_learned_sinks_in_float32(name, backend):
    """FlexAttention's log-sum-exp is differentiated where sinks join what it returns."""
    q, k, v, grad = (x.detach().float().cuda() for x in tensors(SHAPE))
    inputs = [x.requires_grad_() for x in (q, k, v, torch.linspace(-2.0, 3.0, 4, device="cuda"))]
    call = Call(pattern_of(name, SHAPE.k_len))
    out = attend(*inputs[:3], call, backend=backend, sinks=inputs[3])
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    want = attend(*exact[:3], call, backend="reference", sinks=exact[3])
    assert_close(out.double().cpu(), want, atol=2e-3, rtol=2e-3)  # products may be rounded to TF32
    got = torch.autograd.grad(out, inputs, grad)
    for g, w in zip(got, torch.autograd.grad(want, exact, grad.double().cpu()), strict=True):
        assert_close(g.double().cpu(), w, atol=1e-2 * float(w.abs().max()), rtol=0.0)


@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "sparse_transformer_strided"])
def test_lengths_share_kernels(name):
    """20 lengths that are padded alike compile what one of them does; seen again, nothing."""
    from hf_sparse.backends.flex.kernel import padded_length

    def made(lengths) -> int:
        before = compiled().kernels
        for n in lengths:
            q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            attend(q, k, v, Call(pattern_of(name, n)), backend="flex")
        return compiled().kernels - before

    lengths = range(1100, 1500, 20)
    assert len(lengths) == 20 and len({padded_length(n) for n in lengths}) == 1
    assert made(lengths) <= 1
    assert made([*lengths, *(n + 7 for n in lengths)]) == 0


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for backend in READY for name in NAMES if name not in DENSE]
    + [("sliding_window", "flex"), ("bigbird", "flex")],
)
def test_memory_grows_with_the_length_only(name, backend):
    n, width = 16384, 64
    shape = Shape(2, 1, n, n, width=width, v_width=width, batch=1)
    given = [x.detach().cuda().requires_grad_() for x in tensors(shape, torch.bfloat16)]
    call = Call(get_pattern(name).resolve(n))
    attention(backend, given, call)  # plans are built and kernels compiled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(backend, given, call)
    assert torch.cuda.max_memory_allocated() - before < n * n // 2  # half a byte per pair; inputs are 12 MiB


@pytest.mark.parametrize("name", ["streaming_llm", "longformer", "bigbird"])
def test_a_step_of_rows_that_are_padded_differently_waits_for_nothing(name):
    labels = torch.zeros(3, 700, dtype=torch.long)
    labels[0, :100], labels[1, -1] = -1, -1  # of the second row no token is a query
    padded = Segments.from_labels(labels)
    q, k, v, _ = (x.detach().cuda() for x in tensors(Shape(4, 2, 1, 700, batch=3), torch.float32))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(q, k, v, Call(pattern_of(name, 700)), padded, "torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = attend(q, k, v, Call(pattern_of(name, 700)), padded, "reference")
    assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_in_double_precision(name):
    for shape, kind in (("gqa", "left"), ("dv-wider", "empty-row"), ("chunked-prefill", "packed-padded")):
        batch, labels = segments(kind, SHAPES[shape])
        given = [x.detach().cuda().requires_grad_() for x in tensors(SHAPES[shape])]
        for causal in (True, False):
            got, _ = run("torch", given, call_of(name, causal), batch)
            want = truth([x.cpu() for x in given], PATTERNS[name][0], causal, labels, SHAPES[shape])
            for g, w in zip(got, want, strict=True):
                assert_close(g.cpu(), w, atol=1e-11, rtol=1e-11)  # other order of summation than on the CPU


@pytest.mark.parametrize("name", ["longformer", "sparse_transformer_fixed", "bigbird"])
def test_both_sides_flex(name):
    check_half("flex", name, causal=False)


@pytest.mark.parametrize("name", ["sliding_window", "strided", "bigbird"])
def test_left_padding_and_decode_step_flex(name):
    check_half("flex", name, kind="left", shape=Shape(4, 2, 300, 300, width=64, v_width=64))
    check_half("flex", name, shape=Shape(4, 2, 1, 300, width=64, v_width=64, batch=1))


SELECTED = {
    "blocks": TopKBlocks(keep=0.4, block=64) | SlidingWindow(90),
    "every-query": TopKBlocks(keep=0.3, block=16, query_block=1),
}


@pytest.mark.parametrize("name", SELECTED)
def test_selected_blocks_flex(name):
    """Output and gradients in float32; what is read is selected once, so that rounding cannot change it."""
    q, k, v, grad = (x.detach().float().cuda() for x in tensors(SHAPE))
    call, batch = Call(SELECTED[name]), Segments.whole(1, SHAPE.k_len)
    chosen = select_all(divided(call.pattern, 0).selector, q, k, batch, call.constraint)
    results = []
    for backend in ("reference", "flex"):
        given = [x.double() if backend == "reference" else x for x in (q, k, v)]
        given = [x.detach().requires_grad_() for x in given]
        out = attend(*given, call, batch, backend, selections=chosen)
        results.append((out, *torch.autograd.grad(out, given, grad.to(out.dtype))))
    for want, got in zip(*results, strict=True):
        assert_close(got.double(), want, atol=1e-2 * float(want.abs().max()), rtol=0.0)  # TF32 products


@pytest.mark.parametrize("name", SELECTED)
def test_selected_blocks_flex_waits_for_nothing(name):
    q, k, v, _ = (x.detach().float().cuda() for x in tensors(SHAPE))
    call, batch = Call(SELECTED[name]), Segments.whole(1, SHAPE.k_len)
    chosen = select_all(divided(call.pattern, 0).selector, q, k, batch, call.constraint)
    attend(q, k, v, call, batch, "flex", selections=chosen)  # plans are built and kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, call, batch, "flex", selections=chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
