"""The cuda_flash backend: plans become bands that hold exactly their pairs, and merged bands are exact both ways.

The operators need a CUDA device (test_cuda.py); here dense stand-ins with their window rule take their place.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.backends import Call, attend
from hf_sparse.backends.call import Inputs
from hf_sparse.backends.cuda_flash import attention, kernel, unsupported
from hf_sparse.backends.cuda_flash.bands import bands_of
from hf_sparse.patterns import get_pattern
from hf_sparse.plan import Constraint, make_plan

from . import doubles
from .cases import SHAPES, Shape, run, segments, tensors, truth

BANDED = {
    "full": Full(),
    "window": SlidingWindow(window=37),
    "window-1": SlidingWindow(window=1),
    "streaming": StreamingLLM(sinks=3, window=30),
    "strided": Strided(stride=5),
    "window-or-strided": SlidingWindow(window=9) | Strided(stride=5),
    "dilated": get_pattern("dilated_window", window=6, dilation=(1, 2, 1, 4)),
    "longformer": Longformer(window=24, global_tokens=(0, 40)),
    "multi-scale": get_pattern("multi_scale", window=5, scales=3),
}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(attention, "flash_forward", doubles.flash_forward)
    monkeypatch.setattr(attention, "flash_backward", doubles.flash_backward)
    monkeypatch.setattr("hf_sparse.backends.cuda_flash.unsupported", lambda *_: [])


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", BANDED)
def test_output_and_gradients_are_those_of_the_written_mask(name, causal):
    for shape_name, shape in SHAPES.items():
        if name == "dilated" and shape.heads != 4:
            continue
        for kind in ("plain", "left", "packed-padded", "empty-row"):
            batch, labels = segments(kind, shape)
            given = tensors(shape)
            got, record = run("cuda_flash", given, Call(BANDED[name], Constraint(causal)), batch)
            want = truth(given, BANDED[name], causal, labels, shape)
            for what, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                assert_close(
                    g, w, atol=1e-11, rtol=1e-11, msg=lambda m, w=what, s=shape_name: f"{s} {w}: {m}"
                )
            assert (record.backend, record.operator) == ("cuda_flash", "flash_attention")


@pytest.mark.parametrize("name", BANDED)
def test_the_operators_get_what_they_demand(name, monkeypatch):
    """Head sizes, strides and the marks of empty rows, on the operators' own interface."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", doubles.aten_flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", doubles.aten_flash_backward)
    monkeypatch.setattr("hf_sparse.backends.cuda_flash.unsupported", lambda *_: [])
    shapes = [Shape(4, 2, 97, 97, width=12, v_width=9), Shape(4, 2, 60, 131), Shape(4, 1, 1, 90, width=16)]
    for shape in shapes:
        for causal, kind in ((True, "plain"), (False, "left"), (True, "empty-row")):
            batch, labels = segments(kind, shape)
            given = tensors(shape)
            got, _ = run("cuda_flash", given, Call(BANDED[name], Constraint(causal)), batch)
            for g, w in zip(got, truth(given, BANDED[name], causal, labels, shape), strict=True):
                assert_close(g, w, atol=1e-11, rtol=1e-11)
    given = tensors(shapes[0], torch.bfloat16)  # log-sum-exp and sums stay in float32 between the calls
    got, _ = run("cuda_flash", given, Call(BANDED[name]))
    want = truth(given, BANDED[name], True, torch.zeros(2, 97), shapes[0])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert_close(g.double(), w, atol=0.06, rtol=0.02)  # 8 bits of gradients up to 8


def test_rows_without_keys_give_nothing_and_take_no_gradient(monkeypatch):
    """More queries than keys: the first rows of a causal band are empty, +inf for the operators and -inf here."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", doubles.aten_flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", doubles.aten_flash_backward)
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (9, 6, 6))
    out, lse = kernel.flash_forward(q, k, v, left=-1, right=0, scale=0.3)
    assert (lse[:, :, :3] == float("-inf")).all() and lse[:, :, 3:].isfinite().all()
    grads = kernel.flash_backward(torch.ones_like(q), q, k, v, out, lse, left=-1, right=0, scale=0.3)
    assert (
        all(grad.isfinite().all() for grad in grads) and not grads[0][:, :3].any() and grads[0][:, 4:].all()
    )


def test_inputs_that_the_kernels_cannot_read_are_copied(monkeypatch):
    """Channels that do not lie side by side, and rows that do not begin at a multiple of 16 bytes."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", doubles.aten_flash_forward)
    monkeypatch.setattr("hf_sparse.backends.cuda_flash.unsupported", lambda *_: [])
    q, k, v, _ = (x.detach() for x in tensors(Shape(2, 2, 50, 50, width=16, v_width=16)))
    apart = q.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.cat([k.new_zeros(2, 2, 50, 3), k], 3)[..., 3:]
    call = Call(SlidingWindow(9))
    got = attend(apart, shifted, v, call, backend="cuda_flash")
    assert_close(got, attend(q, k, v, call, backend="reference"), atol=1e-12, rtol=1e-12)


def test_a_band_of_all_queries_is_not_copied(monkeypatch):
    made = []

    def forward(query, key, value, **options):
        out, lse = doubles.flash_forward(query, key, value, **options)
        made.append(out.contiguous())
        return made[-1], lse

    monkeypatch.setattr(attention, "flash_forward", forward)
    monkeypatch.setattr("hf_sparse.backends.cuda_flash.unsupported", lambda *_: [])
    q, k, v, _ = (x.detach() for x in tensors(Shape(2, 2, 50, 50)))
    out = attend(q, k, v, Call(SlidingWindow(9)), backend="cuda_flash")
    assert out.data_ptr() == made[0].data_ptr()


@pytest.mark.parametrize("name", BANDED)
def test_bands_hold_the_pairs_of_the_plan(name):
    for causal, q_len, k_len in [(True, 150, 150), (False, 151, 151), (True, 31, 150), (True, 1, 90)]:
        plan = make_plan(BANDED[name], Constraint(causal), q_len, k_len, heads=4)
        for group in plan.groups:
            bands = bands_of(plan, group)
            assert not bands.reasons
            held = np.zeros((q_len, k_len), dtype=int)
            for band in bands.merged:
                for member in range(band.repeat):
                    held[_pairs(band, member)] += 1
            assert held.max(initial=0) <= 1
            for band in bands.placed:
                rows = band.queries.at(np.arange(band.queries.count))
                held[rows] = 0
            for band in bands.placed:
                held[_pairs(band, 0)] += 1
            assert held.sum() * len(group.heads) == group.pairs


def _pairs(band, member):
    queries = band.queries.at(np.arange(band.queries.count)) + member
    keys = band.keys.at(np.arange(band.keys.count)) + member
    level = np.arange(len(queries))[:, None] + len(keys) - len(queries)
    place = np.arange(len(keys))
    allowed = np.ones((len(queries), len(keys)), dtype=bool)
    if band.left >= 0:
        allowed &= place >= level - band.left
    if band.right >= 0:
        allowed &= place <= level + band.right
    row, column = np.nonzero(allowed)
    return queries[row], keys[column]


def test_a_window_is_one_call_and_a_streaming_plan_two():
    for pattern, calls in [(SlidingWindow(512), 1), (StreamingLLM(4, 1020), 2), (Strided(128), 1)]:
        plan = make_plan(pattern, Constraint(), 8192, 8192, heads=2)
        bands = bands_of(plan, plan.groups[0])
        assert (len(bands.merged), len(bands.placed)) == (calls, 0)
    plan = make_plan(SlidingWindow(512), Constraint(), 8192, 8192, heads=2)
    (band,) = bands_of(plan, plan.groups[0]).merged
    assert (band.left, band.right) == (
        511,
        0,
    )  # FlashAttention's window counts the keys besides the query's own


def test_what_the_operators_cannot_do_is_said(monkeypatch):
    call = Call(get_pattern("bigbird", block=16, random_blocks=1), softcap=3.0, dropout=0.1)
    plan = make_plan(call.pattern, Constraint(), 4096, 4096, heads=2)
    reasons = unsupported(call, Inputs(torch.device("cpu"), torch.float32, 512), [plan, None])
    for words in (
        "not on cpu",
        "not float32",
        "512 is above 256",
        "soft-cap",
        "dropout",
        "irregular",
        "rectangles",
    ):
        assert any(words in reason for reason in reasons), words
    assert len(reasons) == 7
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    inputs = Inputs(torch.device("cuda"), torch.bfloat16, 64)
    plan = make_plan(SlidingWindow(16), Constraint(), 100, 100, heads=2)
    assert unsupported(Call(SlidingWindow(16)), inputs, [plan]) == [
        "the operators need a device of compute capability 8.0 or newer"
    ]


def test_the_installed_operators_take_these_arguments():
    """Shapes without values: the schemas of this version of PyTorch fit, GQA and an undefined length list included."""
    from hf_sparse.backends.cuda_flash.kernel import flash_backward, flash_forward

    q, k, v = (
        torch.empty(2, n, h, d, device="meta", dtype=torch.bfloat16)
        for n, h, d in [(40, 4, 20), (64, 2, 20), (64, 2, 12)]
    )
    out, lse = flash_forward(q, k, v, left=5, right=0, scale=0.2)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 40, 4, 12), (2, 4, 40), torch.float32)
    grads = flash_backward(out, q, k, v, out, lse, left=5, right=0, scale=0.2)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_an_explicit_name_obeys_or_raises():
    q, k, v, _ = tensors(Shape(2, 2, 30, 30), torch.float32)
    with pytest.raises(
        ValueError, match=r"'cuda_flash' cannot run this call: .*not on cpu; .*not float32; use"
    ):
        attend(q, k, v, Call(SlidingWindow(8)), backend="cuda_flash")
