"""Selected blocks through the flex backend: one block mask of what the plan and the lists hold, made on the device."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import (
    BigBird,
    GlobalTokens,
    Quest,
    Random,
    Sinks,
    SlidingWindow,
    Strided,
    TopKBlocks,
    recording,
)
from hf_sparse.backends import Call, Inputs, attend, preview
from hf_sparse.backends.flex import selected, unsupported
from hf_sparse.patterns import PerHead
from hf_sparse.plan import Constraint, Segments, make_plan
from hf_sparse.selectors import BlockIndex, Selection, divided

from .cases import Shape, tensors
from .doubles import allowed_pairs, listed

TOPK = TopKBlocks(keep=0.5, block=8, local=1)
PATTERNS = {
    "blocks": TOPK,
    "every-query": TopKBlocks(keep=9, block=4, query_block=1),
    "5-queries": TopKBlocks(keep=6, block=8, query_block=5) | Sinks(4) | SlidingWindow(21),
    "larger-than-the-kernel's": TopKBlocks(keep=3, block=192, query_block=64, local=0),
    "256-queries": TopKBlocks(keep=9, block=16, query_block=256, local=0),
    "the-kernel's": TopKBlocks(keep=3, block=128, local=0),
    "gathered-keys": TopKBlocks(keep=9, block=16, local=0) | GlobalTokens((5, 40, 41, 100)),
    "tiles": Quest(keep=0.4, block=4, dense_layers=0) | Strided(3) | Strided(5, anchor="absolute"),
    "sorted": TopKBlocks(keep=9, block=1, local=0, sinks=0) | Strided(3),
    "chosen-queries": TopKBlocks(keep=9, block=16, local=0) | GlobalTokens((5, 300), global_queries=True),
    "drawn": TopKBlocks(keep=9, block=16, local=0) | BigBird(block=16, random_blocks=2),
    "heads": TopKBlocks(keep=0.4, block=8, local=0)
    | PerHead((SlidingWindow(5), Strided(5), Strided(5), SlidingWindow(5))),
}
CLOSE = {"atol": 1e-11, "rtol": 1e-11}


def compare(call, given, segments=None, **options):
    """Assert that output and gradients are the reference's."""
    results = []
    for backend in ("reference", "flex"):
        extra = [options["sinks"]] if "sinks" in options else []
        with recording() as seen:
            out = attend(*given[:3], call, segments, backend, **options)
        results.append((out, *torch.autograd.grad(out, (*given[:3], *extra), given[3])))
        assert seen.calls[0].backend == backend
    for want, got in zip(*results, strict=True):
        assert_close(got, want, **CLOSE)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_of_the_reference(name):
    for shape in (Shape(4, 2, 403, 403, v_width=5), Shape(4, 4, 131, 131, batch=1), Shape(4, 1, 520, 520)):
        compare(Call(PATTERNS[name]), tensors(shape))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("others", [GlobalTokens((150, 200)), Random(blocks=2, block=128)], ids=str)
def test_whole_blocks_beside_keys_that_are_gathered_or_differ_by_head(others):
    keep = 1.0 if isinstance(others, GlobalTokens) else 4
    compare(
        Call(TopKBlocks(keep=keep, block=64, local=0) | others), tensors(Shape(4, 2, 1030, 1030, batch=1))
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["5-queries", "the-kernel's", "sorted", "drawn"])
def test_what_the_host_asks_besides(name):
    given = tensors(Shape(4, 2, 403, 403, batch=1))
    for constraint in (Constraint(window=150), Constraint(chunk=96)):
        compare(Call(PATTERNS[name], constraint), given)
    sinks = torch.linspace(-1, 2, 4, dtype=torch.float64).requires_grad_()
    compare(Call(PATTERNS[name], softcap=1.5, scale=0.4), given, sinks=sinks)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["blocks", "5-queries", "sorted"])
def test_padding_and_packing(name):
    labels = torch.zeros(3, 250, dtype=torch.long)
    labels[0, :17], labels[1, 110:], labels[2, 130:144] = -1, 1, -1
    compare(Call(PATTERNS[name]), tensors(Shape(4, 2, 250, 250, batch=3)), Segments.from_labels(labels))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("first", [0, 37], ids=["every-key", "first-keys-dropped"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_chunk_begins_inside_blocks(name, first):
    """Queries that begin at position 203 among keys that begin at `first`; what they read was selected before."""
    pattern, shape = PATTERNS[name], Shape(4, 2, 403, 403)
    q, k, v, grad = tensors(shape)
    index = BlockIndex(divided(pattern, 0).selector)
    index.select(q[:, :, :203], k[:, :, :203])
    selection = index.select(q[:, :, 203:], k)
    given = [x.detach().requires_grad_() for x in (q[:, :, 203:], k[:, :, first:], v[:, :, first:])]
    segments = Segments.whole(2, 403 - first, first)
    compare(Call(pattern), [*given, grad[:, :, 203:]], segments, selections=[selection])


def made(pattern, shape, device="cpu", window=None):
    """Return a selection, and the mask of a batch that reads it."""
    constraint = Constraint(window=window)
    q, k, *_ = (x.detach() for x in tensors(shape, torch.float32))
    division = divided(pattern, 0)
    selection = BlockIndex(division.selector).select(q, k, 0, constraint.bounds()[0])
    plan = make_plan(division.static, constraint, shape.q_len, shape.k_len, heads=shape.heads)
    selection = replace(selection, lists=selection.lists.to(device))
    return selection, union(selection, plan)


def union(selection, plan):
    device = selection.lists.device
    return selected.union_mask(selection, plan, plan.groups[0], device, gradients=True, wide=False)


def read_by(mask, blocks):
    """Return the blocks [B, H, n, n] that a mask lists."""
    return listed(mask.kv_num_blocks, mask.kv_indices, blocks) | listed(
        mask.full_kv_num_blocks, mask.full_kv_indices, blocks
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_a_mask_needs_no_values_from_the_device(name):
    """On a device without values (meta), whatever asked for one would fail: nothing waits for a real device either."""
    _, mask = made(PATTERNS[name], Shape(4, 2, 1000, 1000), "meta")
    assert mask.kv_indices.device.type == mask.full_q_indices.device.type == "meta"
    row, key = (torch.zeros(n, 1, dtype=torch.int32, device="meta") for n in (2, 3))
    assert mask.mask_mod(row[:1], row[:1], row, key.mT).shape == (2, 3)


def test_blocks_that_are_selected_as_a_whole_are_full():
    """All is kept or selected, 64 keys at a time: the first 128 and the 128 before a query's own in part kept."""
    selection, mask = made(TopKBlocks(keep=1.0, block=64, local=1), Shape(4, 2, 2048, 2048))
    assert selection.lists.shape[1] == 2 and mask.full_kv_num_blocks.shape == (2, 4, 16)
    full = (torch.arange(16, dtype=torch.int32) - 2).clamp(min=0)
    assert torch.equal(mask.full_kv_num_blocks, full.expand(2, 4, -1))
    assert torch.equal(mask.kv_num_blocks, (torch.arange(1, 17).int() - full).expand(2, 4, -1))
    assert torch.equal(allowed_pairs(mask, 2, 4), torch.ones(2, 4, 2048, 2048, dtype=torch.bool).tril())


def test_blocks_that_hold_nothing_are_not_listed():
    """Every listed block holds a pair, and the lists have room for what the counts of the selection allow."""
    pattern = TopKBlocks(keep=6, block=64, local=0)
    _, mask = made(pattern, Shape(4, 2, 4096, 4096, batch=1))
    assert mask.kv_indices.shape[3] == 16  # 4 blocks of each of 2 blocks of queries, their own, the first: 10
    pairs = allowed_pairs(mask, 1, 4).view(1, 4, 32, 128, 32, 128).any(5).any(3)
    read = read_by(mask, 32)
    assert torch.equal(pairs, read) and read.sum() < 0.6 * torch.ones(32, 32).tril().sum() * 4


def test_blocks_that_the_host_hides_are_not_listed():
    """The last of 256 queries no longer see all that the first of them selected within the model's window."""
    _, mask = made(PATTERNS["256-queries"], Shape(2, 2, 2048, 2048, batch=1), window=300)
    block = torch.arange(16)
    seen = (
        block * 128 + 127 > block[:, None] * 128 - 300
    )  # by the first of 128 queries, which sees farthest back
    assert not (read_by(mask, 16) & ~seen).any()


def test_lists_have_room_for_blocks_that_lie_across_the_kernels():
    """Every second block of 130 keys, each on two of the kernel's."""
    lists = torch.arange(0, 40, 2).expand(1, 1, 64, 20)
    counts = (lists >= 0).sum(3)[0, 0].numpy()
    plan = make_plan(SlidingWindow(1), Constraint(), 8192, 8192, heads=1)
    mask = union(Selection(130, 128, 0, lists, counts), plan)
    touched = {key // 128 for block in range(0, 40, 2) for key in (130 * block, 130 * block + 129)}
    assert read_by(mask, 64)[0, 0, -1].nonzero().flatten().tolist() == sorted({*touched, 63})
    assert (
        mask.kv_num_blocks[0, 0, -1] == 40
    )  # more than there was room for, did each block lie on one of the kernel's


def test_where_every_static_pair_is_sorted_the_first_call_is_what_was_selected():
    shape = Shape(4, 2, 403, 403)
    q, k, *_ = (x.detach() for x in tensors(shape))
    selection = BlockIndex(TOPK).select(q, k)
    plan = make_plan(Strided(3), Constraint(), 403, 403, heads=4)
    allowed = allowed_pairs(union(selection, plan), 2, 4)[..., :403, :403]
    place = torch.arange(403)
    assert torch.equal(allowed, selection.mask(4, place, place) & ~Strided(3).mask(403))


def test_lists_that_all_heads_share_are_made_once():
    q, k, *_ = (x.detach() for x in tensors(Shape(4, 2, 512, 512), torch.float32))
    lists = BlockIndex(TOPK).select(q, k).lists[:, :1]
    plan = make_plan(TOPK.kept, Constraint(), 512, 512, heads=4)
    counts = (lists >= 0).sum(3).amax((0, 1)).numpy()
    mask = union(Selection(8, 8, 0, lists, counts), plan)
    assert mask.kv_indices.shape[:3] == (2, 1, 4)
    assert torch.equal(allowed_pairs(mask, 2, 4)[:, 0], allowed_pairs(mask, 2, 4)[:, 3])


def test_what_it_cannot_do_is_refused_and_auto_takes_another(monkeypatch):
    q, k, v = (x.detach().float() for x in tensors(Shape(4, 2, 300, 300))[:3])
    index = BlockIndex(TOPK)
    index.select(q[:, :, :-1], k[:, :, :-1])
    step = [index.select(q[:, :, -1:], k)]
    with pytest.raises(ValueError, match=r"'flex' cannot .* a single one reads selected blocks.*'auto'"):
        attend(q[:, :, -1:], k, v, Call(TOPK), backend="flex", selections=step)
    with pytest.raises(ValueError, match=r"several calls"):
        attend(q, k, v, Call(PATTERNS["sorted"]), backend="flex")
    with pytest.raises(ValueError, match="no backward"):
        attend(q.requires_grad_(), k, v, Call(TOPK), backend="flex")
    monkeypatch.setattr(selected, "LARGEST_TABLE", 2**10)
    with pytest.raises(
        ValueError, match="blocks of 8 queries that select blocks of 8 keys need a table of 0 MiB"
    ):
        attend(q.detach(), k, v, Call(TOPK), backend="flex")
    plan = make_plan(TOPK.kept, Constraint(), 300, 300, heads=4)
    assert selected.selected_reasons(object(), plan) == [selected.NO_LISTS]
    inputs = Inputs(q.device, q.dtype, 8, selected=True)
    assert unsupported(Call(TOPK), inputs, [plan], None) == [selected.NO_LISTS]


def test_auto_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    inputs = Inputs(torch.device("cuda"), torch.bfloat16, 64, gradients=True)

    def picked(pattern, length):
        return preview(Call(pattern), inputs, heads=8, length=length).backend

    wide = TopKBlocks(keep=0.1, block=64)
    assert picked(wide | SlidingWindow(256), 8192) == "flex"
    assert picked(wide, 600) == "torch"  # too short for a compiled kernel, whatever the pattern
    assert picked(TopKBlocks(keep=0.1, block=16, query_block=1), 131_072) == "torch"
    with pytest.raises(ValueError, match=r"blocks of 1 queries .* need a table of [\d,]+ MiB, more than 256"):
        preview(Call(TopKBlocks(block=16, query_block=1)), inputs, heads=8, length=131_072, backend="flex")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
def test_compiled_for_the_cpu_and_compiled_once_for_many_selections():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    call = Call(TopKBlocks(keep=4, block=32, query_block=64, local=0) | SlidingWindow(90) | Sinks(4))
    for length in (650, 700, 760):
        q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, length, length), torch.float32, seed=length))
        out = attend(q, k, v, call, backend="flex")
        assert_close(out, attend(q, k, v, call, backend="reference"), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 1
