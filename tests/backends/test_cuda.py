"""Every registered pattern on a CUDA device, against a float64 reference on the CPU; `make gpu` runs them."""

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Pattern, available_patterns, get_pattern
from hf_sparse.backends import BACKENDS, Call, attend
from hf_sparse.plan import Constraint

from .cases import PATTERNS, SHAPES, Shape, call_of, oracle, run, segments, tensors, truth, written_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Compilers of the many torch versions that GPU machines have warn about themselves.
    pytest.mark.filterwarnings("default"),
]

EXPLICIT = tuple(backend for backend in BACKENDS if backend not in ("auto", "reference"))
NAMES = ("out", "dq", "dk", "dv")
# Options that leave something out in a few hundred tokens; a pattern without an entry is tested with its defaults.
SMALL = {
    "sliding_window": {"window": 37},
    "dilated_window": {"window": 9, "dilation": 4},
    "strided": {"stride": 5},
    "block_local": {"block": 32},
    "global_tokens": {"positions": (0, 7, 40)},
    "random": {"keys_per_query": 8},
    "atrous": {"stride": 8},
    "atrous_local": {"stride": 8},
    "sparse_transformer_strided": {"stride": 16},
    "sparse_transformer_fixed": {"block": 16, "summary": 2},
    "longformer": {"window": 24, "global_tokens": (0, 7, 40)},
    "bigbird": {"block": 16},
    "streaming_llm": {"sinks": 2, "window": 30},
    "grouped_heads": {"window": 32, "adaptive_window": False},
    "multi_scale": {"window": 8, "scales": 3},
    "shifted": {"group": 32},
}


def pattern_of(name: str, options: dict, length: int) -> Pattern:
    return get_pattern(name, **options).resolve(length)


def attention(backend: str, given, call: Call, batch=None):
    """Return (output, dq, dk, dv); skip where a backend refuses the call with its reasons. `torch` refuses nothing."""
    try:
        return run(backend, given, call, batch)[0]
    except ValueError as error:
        if backend == "torch" or "cannot run this call" not in str(error):
            raise
        pytest.skip(f"{backend}: {error}")


def check_half(backend: str, pattern: Pattern, causal: bool, kind: str, shape: Shape) -> None:
    """Errors are at most 2x those of plain attention in bfloat16, 3x for gradients."""
    batch, labels = segments(kind, shape)
    given = [x.detach().cuda().requires_grad_() for x in tensors(shape, torch.bfloat16)]
    got = attention(backend, given, Call(pattern, Constraint(causal)), batch)
    want = truth([x.cpu() for x in given], pattern, causal, labels, shape)
    q, k, v, grad = given
    plain = oracle(q, k, v, written_mask(pattern, causal, labels, shape).cuda())
    naive = (plain.detach(), *torch.autograd.grad(plain, (q, k, v), grad))
    for what, g, n, w, factor in zip(NAMES, got, naive, want, (2, 3, 3, 3), strict=True):
        assert g.dtype == torch.bfloat16
        error, allowed = (g.double().cpu() - w).abs().max(), factor * (n.double().cpu() - w).abs().max()
        assert error <= allowed, f"{what}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("name", available_patterns())
def test_small_options_in_half_precision(name, causal, backend):
    """Heads share keys; the batch has a left-padded row."""
    shape = Shape(4, 2, 300, 300, width=32, v_width=32)
    check_half(backend, pattern_of(name, SMALL.get(name, {}), 300), causal, "left", shape)


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("name", available_patterns())
def test_default_options_in_half_precision(name, backend):
    shape = Shape(4, 4, 1100, 1100, width=64, v_width=64, batch=1)
    check_half(backend, pattern_of(name, {}, 1100), True, "plain", shape)


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("name", available_patterns())
def test_decode_step(name, backend):
    shape = Shape(4, 2, 1, 300, width=32, v_width=32)
    check_half(backend, pattern_of(name, SMALL.get(name, {}), 300), True, "left", shape)


@pytest.mark.parametrize("kind", ["plain", "left", "packed-padded", "empty-row"])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_in_double_precision(name, kind):
    for shape in SHAPES.values():
        batch, labels = segments(kind, shape)
        given = [x.detach().cuda().requires_grad_() for x in tensors(shape)]
        for causal in (True, False):
            got, _ = run("torch", given, call_of(name, causal), batch)
            want = truth([x.cpu() for x in given], PATTERNS[name][0], causal, labels, shape)
            for g, w in zip(got, want, strict=True):
                assert_close(g.cpu(), w, atol=1e-11, rtol=1e-11)  # other order of summation than on the CPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_auto_in_half_precision(dtype):
    shape = SHAPES["gqa"]
    q, k, v, _ = (x.detach().cuda().to(dtype) for x in tensors(shape))
    for name in PATTERNS:
        want = attend(q.double(), k.double(), v.double(), call_of(name), backend="reference")
        assert (attend(q, k, v, call_of(name)).double() - want).abs().max() < 0.05  # 8 bits of values up to 4


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("name", [name for name in available_patterns() if name != "full"])
def test_memory_grows_with_the_length_only(name, backend):
    n, width = 16384, 64
    shape = Shape(2, 1, n, n, width=width, v_width=width, batch=1)
    given = [x.detach().cuda().requires_grad_() for x in tensors(shape, torch.bfloat16)]
    call = Call(pattern_of(name, {}, n))
    attention(backend, given, call)  # plans are built and kernels compiled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(backend, given, call)
    assert torch.cuda.max_memory_allocated() - before < n * n // 2  # half a byte per pair; inputs are 12 MiB


@pytest.mark.skipif("flex" not in EXPLICIT, reason="there is no flex backend")
@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "sparse_transformer_strided"])
def test_lengths_share_kernels(name):
    """20 lengths compile one kernel for each length they are padded to; seen again, none."""
    from torch._dynamo.utils import counters

    from hf_sparse.backends.flex.kernel import padded_length

    def compiled(lengths) -> int:
        before = counters["stats"]["unique_graphs"]
        for n in lengths:
            q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            attend(q, k, v, Call(get_pattern(name)), backend="flex")
        return counters["stats"]["unique_graphs"] - before

    lengths = range(1000, 8000, 350)
    assert len(lengths) == 20
    first = compiled(lengths)
    assert (
        0 < first <= 2 * len({padded_length(n) for n in lengths})
    )  # rows and keys of a stride pad differently
    assert compiled(lengths) == 0
    assert compiled([n + 13 for n in lengths if padded_length(n + 13) == padded_length(n)]) == 0
