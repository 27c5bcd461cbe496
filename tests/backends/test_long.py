"""Sequences long enough for every way of computing: strips, tiles, the fused operator and gathered blocks."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import (
    Longformer,
    PerHead,
    Random,
    SlidingWindow,
    StreamingLLM,
    Strided,
    get_pattern,
)
from hf_sparse.backends import Call, attend
from hf_sparse.backends.pieces import walk
from hf_sparse.patterns import static_patterns
from hf_sparse.plan import Constraint, Segments

from .cases import Shape, run, tensors

NAMES = ("out", "dq", "dk", "dv")
N = 710
SCATTERED = tuple(range(3, N, 11))  # 65 positions


def of(name, **options):
    return get_pattern(name, **options)


# Large options that do not divide the length, and what the heads of one key head may differ in.
PATTERNS = {
    "full": of("full"),
    "window": SlidingWindow(257),
    "window-narrow": SlidingWindow(40),
    "dilated": of("dilated_window", window=40, dilation=3),
    "dilated-heads": of("dilated_window", window=30, dilation=(1, 3, 2, 1)),
    "strided": of("strided", stride=7),
    "strided-absolute": of("strided", stride=16, anchor="absolute"),
    "atrous": of("atrous", stride=50),
    "atrous-local": of("atrous_local", stride=48),
    "blocks-48": of("block_local", block=48, neighbours=2),
    "blocks-96": of("block_local", block=96, neighbours=1),
    "blocks-128": of("block_local", block=128, neighbours=0),
    "shifted": of("shifted", group=128),
    "sparse-strided": of("sparse_transformer_strided", stride=32),
    "sparse-strided-split": of("sparse_transformer_strided", stride=32, heads="split"),
    "sparse-fixed": of("sparse_transformer_fixed", block=64, summary=8),
    "sparse-fixed-split": of("sparse_transformer_fixed", block=48, summary=5, heads="split"),
    "longformer": Longformer(100, (0, 5, 300, 301)),
    "longformer-scattered": Longformer(257, SCATTERED),
    "longformer-heads": Longformer(50, (0, 7), dilation=(1, 2, 1, 3)),
    "global": of("global_tokens", positions=SCATTERED, ratio=0.05),
    "sinks": of("sinks", sinks=70),
    "streaming": StreamingLLM(4, 60),
    "streaming-many": StreamingLLM(90, 200),
    "grouped-heads": of("grouped_heads", window=64),
    "multi-scale": of("multi_scale", window=24, scales=3),
    "layered": of("layered", pattern=SlidingWindow(90), dense_every=2),
    "rerope": of("rerope", pattern="strided"),
    "self-extend": of("self_extend", pattern=SlidingWindow(70)),
    "bigbird-16": of("bigbird", block=16),
    "bigbird-64": of("bigbird", block=64, random_blocks=2),
    "random": of("random", keys_per_query=12),
    "random-blocks": of("random", blocks=2, block=48),
    "union": StreamingLLM(3, 40) | Strided(9) | Strided(7),
    "per-head": PerHead(
        (SlidingWindow(100), of("block_local", block=96), Strided(9), Longformer(60, SCATTERED))
    ),
    "drawn-heads": PerHead(
        (Random(keys_per_query=5), of("bigbird", block=48), SlidingWindow(9), Random(blocks=3))
    ),
}


def test_every_registered_pattern_is_here():
    assert {p.name for p in PATTERNS.values()} >= set(static_patterns())


def compare(pattern, causal, shape, segments=None, dtype=torch.float64, tolerance=1e-10, **options):
    """Assert that output and gradients are the reference's in float64; return them."""
    given = tensors(shape, dtype)
    call = Call(pattern, Constraint(causal), **options)
    got, _ = run("torch", given, call, segments)
    exact = [x.detach().double().requires_grad_() for x in given]
    want, _ = run("reference", exact, call, segments)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(g.double(), w, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    return got


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients(name, causal):
    compare(PATTERNS[name], causal, Shape(4, 2, N, N, batch=1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "name", ["dilated-heads", "sparse-fixed-split", "longformer-scattered", "per-head", "bigbird-16"]
)
def test_float32_and_heads_with_keys_of_their_own(name, causal):
    compare(PATTERNS[name], causal, Shape(4, 4, 641, 641, batch=1), dtype=torch.float32, tolerance=1e-5)


SIX = PerHead(
    (
        SlidingWindow(100),
        SlidingWindow(200),
        Strided(7),
        Longformer(50, SCATTERED),
        of("bigbird", block=48),
        Strided(7),
    )
)


@pytest.mark.parametrize("causal", [True, False])
def test_three_query_heads_of_a_key_head_that_all_differ(causal):
    compare(SIX, causal, Shape(6, 2, 500, 500, batch=1))
    compare(SIX, causal, Shape(6, 1, 300, 500, batch=2, v_width=5))
    compare(of("shifted", group=96), causal, Shape(6, 2, 500, 500, batch=1))
    compare(
        of("sparse_transformer_strided", stride=32, heads="split"), causal, Shape(6, 2, 500, 500, batch=1)
    )


def batches():
    labels = torch.zeros(2, 460, dtype=torch.long)
    labels[0, :57] = -1
    yield "left", labels.clone()
    labels[:] = 0
    labels[1, 401:] = -1
    yield "right", labels.clone()
    labels[:] = torch.tensor([0] * 35 + [1] * 290 + [2] * 135)
    labels[1, :20] = -1
    yield "packed", labels


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_padding_and_packing(name, causal):
    for number, (_, labels) in enumerate(batches()):
        if number == len(name) % 3 or name in (
            "window",
            "longformer-scattered",
            "sparse-strided",
            "bigbird-16",
        ):
            compare(
                PATTERNS[name],
                causal,
                Shape(4, 2, 460, 460, width=4, v_width=4),
                Segments.from_labels(labels),
            )


@pytest.mark.parametrize(("name", "paths"), [
    ("window", {"strips", "fused"}),
    ("blocks-96", {"tiles", "fused"}),
    ("blocks-48", {"strips"}),
    ("longformer-scattered", {"strips", "tiles"}),
    ("strided", {"fused"}),
    ("sparse-fixed", {"strips"}),
    ("bigbird-16", {"strips", "gathered"}),
    ("random", {"gathered"}),
    ("union", {"gathered"}),
])  # fmt: skip
def test_each_way_of_computing_ran(monkeypatch, name, paths):
    ran = set()

    def spy(way, original):
        def spied(*args):
            ran.add(way)
            return original(*args)

        return spied

    monkeypatch.setattr(walk, "run_strips", spy("strips", walk.run_strips))
    monkeypatch.setattr(walk, "run_tiles", spy("tiles", walk.run_tiles))
    monkeypatch.setattr(walk.fused, "forward", spy("fused", walk.fused.forward))

    def gathered(*args):
        for tile in run_gathered(*args):
            ran.add("gathered")
            yield tile

    run_gathered = walk.run_gathered
    monkeypatch.setattr(walk, "run_gathered", gathered)
    q, k, v, _ = tensors(Shape(4, 2, N, N, batch=1))
    attend(q, k, v, Call(PATTERNS[name]), backend="torch")
    assert ran >= paths, ran


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "name",
    ["window", "longformer-scattered", "sparse-fixed", "bigbird-16", "sparse-strided", "dilated-heads"],
)
def test_softcap(name, causal):
    compare(PATTERNS[name], causal, Shape(4, 2, 500, 500, batch=1), softcap=1.5)


@pytest.mark.parametrize("name", ["window", "longformer-scattered", "sparse-fixed", "bigbird-16", "union"])
def test_dropout_is_differentiated_with_its_own_masks(name):
    """The seed fixes the masks: finite differences along a random direction must agree with the gradients."""
    q, k, v, grad = tensors(Shape(4, 2, 450, 450, batch=1, width=4, v_width=4))
    call = Call(PATTERNS[name], dropout=0.3)

    def attention(*given):
        torch.manual_seed(5)
        return attend(*given, call, backend="torch")

    gradients = torch.autograd.grad(attention(q, k, v), (q, k, v), grad)
    generator = torch.Generator().manual_seed(0)
    for number, (x, gradient) in enumerate(zip((q, k, v), gradients, strict=True)):
        direction, values = torch.randn(x.shape, generator=generator, dtype=x.dtype), []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                moved = [y + step * direction if i == number else y for i, y in enumerate((q, k, v))]
                values.append((attention(*moved) * grad).sum())
        assert_close((values[0] - values[1]) / 2e-6, (gradient * direction).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["window", "longformer-scattered", "sparse-fixed", "bigbird-16", "strided", "per-head"]
)
def test_half_precision_errs_no_more_than_plain_attention_does(name, dtype):
    """As in flash-attention's tests: at most 2x the error of plain half-precision attention, 3x for gradients."""
    given = tensors(Shape(4, 2, 500, 500, batch=1, width=16, v_width=16), dtype)
    call = Call(PATTERNS[name])
    got, _ = run("torch", given, call)
    want, _ = run("reference", [x.detach().double().requires_grad_() for x in given], call)
    q, k, v, grad = given
    mask = PATTERNS[name].mask(500, heads=4)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.25
    plain = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    naive = (plain.detach(), *torch.autograd.grad(plain, (q, k, v), grad))
    for what, g, n, w, factor in zip(NAMES, got, naive, want, (2, 3, 3, 3), strict=True):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= factor * (n.double() - w).abs().max(), what


@pytest.mark.parametrize("scale", [100.0, 1e-3, 0.0])
@pytest.mark.parametrize(
    "name", ["window", "longformer-scattered", "sparse-fixed", "bigbird-16", "sparse-strided", "per-head"]
)
def test_extreme_inputs_stay_finite(name, scale):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v, _ = tensors(Shape(4, 2, 450, 450, batch=1), dtype, scale=scale)
        grad = torch.ones_like(q)  # products of three numbers of 100 each would exceed float16
        for causal in (True, False):
            got, _ = run("torch", (q, k, v, grad), Call(PATTERNS[name], Constraint(causal)))
            assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_leaks_from_padding_that_is_not_a_number(name):
    """Slots of padding may hold anything: of the real rows, neither output nor gradients may see it."""
    labels = torch.zeros(2, 300, dtype=torch.long)
    labels[0, :70], labels[1, 250:], labels[1, 40:45] = -1, -1, -1
    segments, shape = Segments.from_labels(labels), Shape(4, 2, 300, 300, width=4, v_width=4)
    attention = partial(
        run, "torch", call=Call(PATTERNS[name], Constraint(len(name) % 2 == 0)), segments=segments
    )
    clean, _ = attention(tensors(shape))
    for poison in (float("nan"), float("inf")):
        given = tensors(shape)
        for x in given:
            x.data[0, :, :70], x.data[1, :, 250:], x.data[1, :, 40:45] = poison, poison, poison
        got, _ = attention(given)
        assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
