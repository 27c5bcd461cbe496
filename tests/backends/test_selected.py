"""Selected blocks through the torch backend: what the reference gives, outputs and gradients, on odd shapes."""

import pytest
import torch

from hf_sparse.backends import Call, attend, recording
from hf_sparse.backends.pieces import fetch
from hf_sparse.patterns import PerHead, get_pattern
from hf_sparse.patterns.grouped_heads import GroupedHeads
from hf_sparse.patterns.sliding_window import SlidingWindow
from hf_sparse.patterns.strided import Strided
from hf_sparse.plan import Constraint, Segments
from hf_sparse.selectors import BlockIndex
from hf_sparse.selectors.quest import Quest
from hf_sparse.selectors.topk_blocks import TopKBlocks

PATTERNS = [
    TopKBlocks(keep=0.5, block=8, local=1),
    TopKBlocks(keep=9, block=4, query_block=1),
    TopKBlocks(keep=6, block=4, query_block=16, sinks=0),
    TopKBlocks(keep=6, block=8, query_block=5) | SlidingWindow(21),
    Quest(keep=0.3, block=4, dense_layers=0) | Strided(3),
]
SHAPES = [(4, 4, 100, 8, 8), (4, 2, 131, 8, 6), (6, 1, 64, 5, 5), (2, 2, 97, 16, 16)]


def tensors(heads, kv_heads, length, size, v_size, rows=2, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size), (rows, kv_heads, length, v_size)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def both(call, given, segments=None, sinks=None):
    results = []
    for backend in ("reference", "torch"):
        extra = () if sinks is None else (sinks,)
        out = attend(*given, call, segments, backend, None, sinks)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, (*given, *extra), grad)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_of_the_reference(pattern, shape):
    for want, got in both(Call(pattern), tensors(*shape)):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "extra",
    [
        {"constraint": Constraint(window=40)},
        {"constraint": Constraint(chunk=32)},
        {"softcap": 3.0},
        {"scale": 0.7},
    ],
    ids=str,
)
def test_what_the_host_asks_besides(pattern, extra):
    for want, got in both(Call(pattern, **extra), tensors(*SHAPES[1])):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_padding_packing_holes_and_sinks(pattern):
    given = tensors(4, 2, 90, 8, 8, rows=3)
    labels = torch.zeros(3, 90, dtype=torch.long)
    labels[0, :17], labels[1, 40:], labels[2, 30:44] = -1, 1, -1
    for sinks in (None, torch.linspace(-1, 2, 4).requires_grad_()):
        for want, got in both(Call(pattern), given, Segments.from_labels(labels), sinks):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    exact, given = tensors(*SHAPES[1], dtype=torch.float64), tensors(*SHAPES[1], dtype=dtype)
    pattern = TopKBlocks(keep=1.0, block=8)  # everything, so that rounding cannot change what is selected
    want = attend(*exact, Call(pattern), None, "reference")
    plain = attend(*given, Call(pattern), None, "reference").double()
    got = attend(*given, Call(pattern), None, "torch").double()
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-12


def test_dropout_keeps_the_mean_and_repeats_in_the_backward_pass():
    query, key, value = tensors(2, 1, 80, 8, 8, dtype=torch.float64)
    call = Call(TopKBlocks(keep=0.6, block=8, local=0), dropout=0.3)

    def run(v):
        torch.manual_seed(5)
        return attend(query, key, v, call, None, "torch")

    assert torch.autograd.gradcheck(run, (value,), fast_mode=True)
    torch.manual_seed(0)
    mean = sum(attend(query, key, value, call, None, "torch").detach() for _ in range(300)) / 300
    want = attend(query, key, value, Call(call.pattern), None, "reference")
    assert (mean - want).abs().mean() < 0.05


def test_the_record_counts_the_pairs_that_are_read():
    query, key, value = tensors(*SHAPES[1])
    for pattern in PATTERNS:
        eye = torch.eye(131).expand(2, 2, -1, -1)
        read = attend(query, key, eye, Call(pattern), None, "reference") > 0
        with recording() as seen:
            attend(query, key, value, Call(pattern), None, "torch")
        assert seen.calls[0].pairs == int(read.sum()), pattern


def test_extreme_inputs_stay_finite():
    for size in (1e4, 1e-4, 0.0):
        given = [(x.detach() * size).requires_grad_() for x in tensors(*SHAPES[0])]
        out = attend(*given, Call(PATTERNS[0]), None, "torch")
        grads = torch.autograd.grad(out.sum(), given)
        assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("name", ["topk_blocks", "lsh", "vertical_slash", "threshold", "gsa_on_device"])
@pytest.mark.parametrize("shape", [(0, 2, 200, 4), (1, 2, 0, 4)], ids=["no-rows", "no-tokens"])
def test_nothing_gives_nothing(name, shape):
    given = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    options = {"dense_layers": 0} if name == "gsa_on_device" else {}
    out = attend(*given, Call(get_pattern(name, **options)))
    assert out.shape == shape
    out.sum().backward()
    assert all(x.grad.shape == shape for x in given)


def test_a_backend_that_reads_no_selected_blocks_says_so():
    with pytest.raises(ValueError, match="it reads no selected blocks"):
        attend(*tensors(*SHAPES[0]), Call(get_pattern("topk_blocks", keep=5, block=4)), None, "cuda_flash")


@pytest.mark.parametrize(
    "others",
    [
        None,
        GroupedHeads(window=9, adaptive_window=False),
        PerHead((SlidingWindow(5),) * 2 + (Strided(5),) * 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("pads", [(0, 0), (0, 20), (76, 3)])
def test_one_query_reads_what_it_reads_among_all(others, pads):
    """Also beside patterns of heads, which divide the heads of a step, and in rows that begin at other slots."""
    selector = TopKBlocks(keep=6, block=4, local=0, query_block=2)
    pattern = selector if others is None else selector | others
    query, key, value = (x.detach() for x in tensors(6, 2, 77, 8, 8))
    segments = Segments.from_mask(torch.arange(77) >= torch.tensor(pads)[:, None])
    want = attend(query, key, value, Call(pattern), segments, "reference")[:, :, -1:]
    selections = []
    for segment in segments.entries:
        index, own = (
            BlockIndex(selector),
            (query[segment.rows, :, segment.slots], key[segment.rows, :, segment.slots]),
        )
        if segment.length > 1:
            index.select(own[0][:, :, :-1], own[1][:, :, :-1])
        selections.append(index.select(own[0][:, :, -1:], own[1]))
    with recording() as seen:
        got = attend(query[:, :, -1:], key, value, Call(pattern), segments, "torch", selections=selections)
    assert seen.calls[0].operator == "step"
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["buffer", "host", "half", "graph"])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4)])
def test_one_query_on_a_cache_copies_no_value(layout, heads, kv_heads, monkeypatch):
    """Keys of a cache lie head by head, with room behind them; what no row reads may be nan."""
    selector = TopKBlocks(keep=6, block=4, local=0, query_block=1)
    query, key, value = (x.detach() for x in tensors(heads, kv_heads, 77, 8, 8, rows=3))
    index = BlockIndex(selector)
    index.select(query[:, :, :-1], key[:, :, :-1])
    selection = index.select(query[:, :, -1:], key)
    read = selection.mask(heads, torch.tensor([76]), torch.arange(77))[:, :: heads // kv_heads, 0]
    read |= (torch.arange(77) < 4) | (torch.arange(77) >= 76)
    value = value.masked_fill(~read[..., None], 0.0 if layout == "graph" else float("nan"))
    room = torch.full((3, kv_heads, 100, 8), float("nan"))
    room[:, :, :77] = value
    want = attend(
        query[:, :, -1:], key, value.nan_to_num(), Call(selector), None, "reference", selections=[selection]
    )
    if layout == "host":
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    else:
        value = room[:, :, :77]
    if layout == "half":
        query, key, value = (x.bfloat16() for x in (query, key, value))
    if layout == "graph":
        query.requires_grad_()
    summed = []
    bag = fetch.embedding_bag
    monkeypatch.setattr(fetch, "embedding_bag", lambda *a, **k: summed.append(1) or bag(*a, **k))
    got = attend(query[:, :, -1:], key, value, Call(selector), None, "torch", selections=[selection])
    assert len(summed) == (layout in ("buffer", "host"))
    tolerance = 2e-2 if layout == "half" else 2e-6  # bfloat16 has 8 bits
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)
    if layout == "graph":
        assert torch.autograd.grad(got.sum(), query)[0].abs().sum() > 0
