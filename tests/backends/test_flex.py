"""The flex backend: block masks hold exactly the plan's pairs, and what surrounds the kernel is exact.

The kernel itself is compiled for CUDA; here a dense stand-in reads the same tables, and one test compiles for the CPU.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Longformer, SlidingWindow, Strided
from hf_sparse.backends import Call, attend
from hf_sparse.backends.flex import kernel
from hf_sparse.backends.flex.blocks import block_tables
from hf_sparse.backends.flex.bounds import row_bounds, sorting
from hf_sparse.backends.flex.kernel import padded_length
from hf_sparse.backends.flex.masks import mask_of
from hf_sparse.backends.flex.orders import orders_of
from hf_sparse.backends.sequences import by_sequence
from hf_sparse.patterns import get_pattern
from hf_sparse.patterns.base import Pattern
from hf_sparse.plan import Constraint, Segments, make_plan

from .cases import PATTERNS, SHAPES, Shape, run, segments, tensors, truth, written_mask


class Predicate(Pattern):
    """A predicate alone, different per head, with keys far apart."""

    def allows(self, context, head, query, key):
        return ((query - key) == 3 * (head + 1)) | ((key % 64 == 5) & (query > 100))


FLEX = {
    **{
        name: PATTERNS[name][0]
        for name in ("full", "window", "window-1", "strided", "strided-absolute", "longformer", "streaming")
    },
    "window-or-strided": SlidingWindow(window=9) | Strided(stride=5),
    "predicate": Predicate(),
    "far-globals": Longformer(window=20, global_tokens=(0, 3, 90, 200)),
    "block-local": get_pattern("block_local", block=24, neighbours=1),
    "fixed": get_pattern("sparse_transformer_fixed", block=16, summary=3),
    "fixed-split": get_pattern("sparse_transformer_fixed", block=16, summary=3, heads="split"),
    "strided-split": get_pattern("sparse_transformer_strided", stride=16, heads="split"),
    "atrous-local": get_pattern("atrous_local", stride=11),
    "multi-scale": get_pattern("multi_scale", window=5, scales=3),
    "shifted": get_pattern("shifted", group=32),
    "ratio": get_pattern("global_tokens", positions=(5,), ratio=0.1) | SlidingWindow(window=7),
    "bigbird": get_pattern("bigbird", block=16, random_blocks=2),
    "bigbird-32": get_pattern("bigbird", block=32, global_blocks=3, random_blocks=1),
    "grouped": get_pattern("grouped_heads", window=16, adaptive_window=False, min_window=8),
}
LONG = Shape(4, 2, 403, 403, batch=1)
SOME = {
    **{k: SHAPES[k] for k in ("one-token", "gqa", "dv-wider", "decode-step", "chunked-prefill")},
    "long": LONG,
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", FLEX)
def test_output_and_gradients_are_those_of_the_written_mask(name, causal):
    for shape_name, shape in SOME.items():
        if name in ("grouped", "fixed-split", "strided-split", "shifted") and shape.heads < 2:
            continue
        for kind in ("plain", "left", "packed-padded") if shape.k_len < 200 else ("plain",):
            batch, labels = segments(kind, shape)
            given = tensors(shape)
            got, record = run("flex", given, Call(FLEX[name], Constraint(causal)), batch)
            want = truth(given, FLEX[name], causal, labels, shape)
            for what, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                assert_close(
                    g, w, atol=1e-11, rtol=1e-11, msg=lambda m, w=what, s=shape_name: f"{s} {w}: {m}"
                )
            assert (record.backend, record.operator) == ("flex", "flex_attention")
            assert record.pairs == written_mask(FLEX[name], causal, labels, shape).sum()


@pytest.mark.parametrize("name", FLEX)
def test_row_bounds_on_the_device_are_those_of_the_pieces(name):
    """Every pair of a plan's pieces, found through the orders, exactly once."""
    for causal, q_len, k_len, first in [(True, 300, 300, 0), (False, 261, 261, 0), (True, 70, 300, 45)]:
        plan = make_plan(FLEX[name], Constraint(causal), q_len, k_len, heads=4, first=first)
        for group in plan.groups:
            orders = orders_of(plan, group)
            pairs = 0
            replaced = {int(row) for order in orders.placed for row in order.queries}
            for order in (*orders.merged, *orders.placed):
                if order.reads:
                    lo, hi = row_bounds(order, torch.arange(order.rows))
                    assert (hi <= order.keys).all() and (lo >= 0).all()
                    if order in orders.merged and replaced:
                        kept = torch.tensor([r not in replaced for r in _queries(order)])
                        lo, hi = lo[:, kept], hi[:, kept]
                    pairs += int((hi - lo).sum())
            assert pairs == sum(piece.pairs for piece in group.pieces)


def _queries(order):
    if order.stride > 1:
        return sorting(order, order.k_len - order.q_len, torch.device("cpu"))[0].tolist()
    return range(order.q_len)


@pytest.mark.usefixtures("stand_in")
def test_the_models_own_window_softcap_and_scale_are_kept():
    shape = Shape(4, 2, 150, 150)
    given = tensors(shape, scale=2.0)
    for name in ("longformer", "strided", "bigbird"):
        pattern = FLEX[name]
        got, _ = run("flex", given, Call(pattern, Constraint(), softcap=1.5))
        want = truth(given, pattern, True, torch.zeros(2, 150), shape, softcap=1.5)
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, atol=1e-11, rtol=1e-11)
        for constraint in (Constraint(window=11), Constraint(chunk=16), Constraint(causal=False, window=9)):
            call = Call(pattern, constraint, scale=0.3)
            out = attend(*given[:3], call, backend="flex")
            assert_close(out, attend(*given[:3], call, backend="reference"), atol=1e-11, rtol=1e-11)


@pytest.mark.usefixtures("stand_in")
def test_a_cache_that_dropped_its_first_keys_keeps_their_positions():
    """Blocks of a pattern lie on positions: a call that begins at position 37 cuts them elsewhere."""
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 50, 200)))
    for name, pattern in FLEX.items():
        call = Call(pattern)
        want = attend(q, k, v, call, Segments.whole(2, 200, 37), "reference")
        got = attend(q, k, v, call, Segments.whole(2, 200, 37), "flex")
        assert_close(got, want, atol=1e-11, rtol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("stand_in")
def test_heads_that_differ_come_back_in_their_order():
    shape = Shape(6, 2, 90, 90)
    pattern = get_pattern("dilated_window", window=5, dilation=(1, 2, 3, 1, 2, 3))
    given = tensors(shape)
    got, _ = run("flex", given, Call(pattern))
    for g, w in zip(got, truth(given, pattern, True, torch.zeros(2, 90), shape), strict=True):
        assert_close(g, w, atol=1e-11, rtol=1e-11)


def test_a_group_of_heads_reads_its_own_key_heads_once():
    seen = []

    def run_group(query, key, value, plan, group, number):
        seen.append((group.heads, query.shape[1], key.shape[1]))
        return query + key[:, :, :1].repeat_interleave(query.shape[1] // key.shape[1], 1)

    q, k, v, _ = (x.detach() for x in tensors(Shape(8, 4, 20, 20)))
    for dilation, expected in [
        ((1, 1, 1, 1, 2, 2, 2, 2), [2, 2]),  # all query heads of two key heads each
        ((1, 2) * 4, [4, 4]),  # one query head of each
        ((1, 1, 1, 2, 2, 2, 2, 2), [3, 5]),  # neither: a key head for every query head
    ]:
        seen.clear()
        pattern = get_pattern("dilated_window", window=5, dilation=dilation)
        plan = make_plan(pattern, Constraint(), 20, 20, heads=8)
        out = by_sequence(run_group, q, k, v, Segments.whole(2, 20), [plan])
        assert torch.equal(out, q + k[:, :, :1].repeat_interleave(2, 1))
        assert [keys for _, _, keys in seen] == expected


def test_tables_are_as_wide_as_the_longest_row_and_made_without_a_loop_over_blocks():
    """At 131,072 tokens a window's tables hold a few entries per block row, not 1,024."""
    plan = make_plan(SlidingWindow(window=512), Constraint(), 131_072, 131_072, heads=8)
    (order,) = orders_of(plan, plan.groups[0]).merged
    tables = block_tables(order, 1024, 1024, torch.device("meta"), gradients=False)
    assert (tables.partial.index.shape, tables.full.index.shape) == ((1, 1, 1024, 8), (1, 1, 1024, 8))
    tables = block_tables(order, 1024, 1024, torch.device("cpu"), gradients=True)
    assert tables.partial.count[0, 0, 4:].unique().tolist() == [2]  # the diagonal, and the window's far end
    assert tables.full.count[0, 0, 4:].unique().tolist() == [3]
    assert (tables.partial_rows.index.shape[3], tables.full_rows.index.shape[3]) == (8, 8)


def test_tables_need_no_values_from_the_device():
    """On a device without values (meta), whatever asked for one would fail: nothing waits for a real device either."""
    for name in ("window", "longformer", "strided", "atrous-local", "fixed"):
        plan = make_plan(FLEX[name], Constraint(), 5000, 5000, heads=2)
        for order in orders_of(plan, plan.groups[0]).merged:
            rows, keys = padded_length(order.rows), padded_length(order.keys)
            tables = block_tables(order, rows // 128, keys // 128, torch.device("meta"), gradients=True)
            mask_of(order, rows, torch.device("meta"))
            assert tables.partial_rows.index.device.type == "meta"


def test_padded_lengths_are_few_and_never_twice_as_long():
    lengths = {padded_length(n) for n in range(1, 70_000, 37)}
    assert len(lengths) < 20 and all(length % 128 == 0 for length in lengths)
    for n in range(1, 3000):
        assert n <= padded_length(n) < max(2 * n, 129) or n <= 128


def test_what_flex_cannot_do_is_refused_with_every_reason():
    q, k, v, _ = tensors(Shape(2, 2, 300, 300))
    with pytest.raises(
        ValueError, match=r"(?s)'flex' cannot.*not float64; .*dropout.*0\.1.*; .*no backward.*'auto'"
    ):
        attend(q, k, v, Call(SlidingWindow(8), dropout=0.1), backend="flex")
    q, k, v = (x.detach().float() for x in (q, k, v))
    with pytest.raises(ValueError, match="several calls"):
        attend(q, k, v, Call(SlidingWindow(8) | Strided(5)), backend="flex")
    with pytest.raises(ValueError, match="reads 64 scattered key blocks"):
        long = [x.repeat(1, 1, 14, 1)[:, :, :4096] for x in (q, k, v)]
        attend(*long, Call(Strided(3) | Strided(4)), backend="flex")
    with pytest.raises(ValueError, match="1 x 1 tokens"):
        attend(q, k, v, Call(get_pattern("bigbird", block=1)), backend="flex")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
def test_compiled_for_the_cpu_and_compiled_once_for_many_lengths(monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    for pattern in (SlidingWindow(window=100), Strided(stride=7)):
        for length in np.linspace(513, 768, 10, dtype=int).tolist():
            q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, length, length), torch.float32))
            out = attend(q, k, v, Call(pattern), backend="flex")
            assert out.transpose(1, 2).is_contiguous()
            assert_close(out, attend(q, k, v, Call(pattern), backend="reference"), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 1
    for length in (650, 700):  # tile lists and tables of bits, different per head
        q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, length, length), torch.float32))
        call = Call(FLEX["bigbird-32"])
        out = attend(q, k, v, call, backend="flex")
        assert_close(out, attend(q, k, v, call, backend="reference"), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 2
    # One kernel more than allowed is an error, not the unfused path.
    monkeypatch.setattr(kernel, "MOST_KERNELS", 1)
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 900, 900), torch.float32))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend(q, k, v, Call(SlidingWindow(window=100)), backend="flex")
