"""Calls out of the ordinary: memory layouts, missing gradients, empty batches, threads, options beyond any input."""

import threading

import pytest
import torch
from torch.testing import assert_close

from hf_sparse import Full, Longformer, PerHead, Random, SlidingWindow, StreamingLLM, Strided, get_pattern
from hf_sparse.backends import Call, attend
from hf_sparse.plan import Constraint, make_plan

from .cases import Shape, run, tensors

PATTERNS = {
    "full": Full(),
    "window": SlidingWindow(40),
    "strided": Strided(7),
    "longformer": Longformer(30, tuple(range(0, 400, 6))),
    "sparse-strided": get_pattern("sparse_transformer_strided", stride=16),
    "sparse-fixed": get_pattern("sparse_transformer_fixed", block=48, summary=3),
    "bigbird": get_pattern("bigbird", block=16),
}


def both(given, call, tolerance=1e-10):
    got, _ = run("torch", given, call)
    want, _ = run("reference", [x.detach().contiguous().requires_grad_() for x in given], call)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_any_memory_layout(name, causal):
    """Expanded, transposed and cut tensors; the gradient of a sum is one number expanded over the output."""
    n, make = 400, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=make, dtype=torch.float64)

    cut, flat = draw(2, 4, 2 * n, 16)[:, :, ::2, ::2], draw(2, 4, n, 1).expand(2, 4, n, 8)
    turned, shared = draw(2, 2, 8, n).mT, draw(1, 1, n, 8).expand(2, 2, n, 8)
    one = torch.ones((), dtype=torch.float64).expand(2, 4, n, 8)
    for q, k, v, grad in (
        (cut, turned, shared, one),
        (flat, shared, turned, draw(2, 4, 8, n).mT),
        (cut, shared[..., :], turned, draw(2, n, 4, 8).transpose(1, 2)),
    ):
        both(
            [x.detach().requires_grad_() for x in (q, k, v)] + [grad],
            Call(PATTERNS[name], Constraint(causal)),
        )


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_of_only_some_inputs(name):
    call = Call(PATTERNS[name])
    *inputs, grad = tensors(Shape(4, 2, 150, 150))
    every = torch.autograd.grad(attend(*inputs, call, backend="torch"), inputs, grad)
    for wanted in range(1, 7):
        some = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(inputs)]
        asked = [i for i, x in enumerate(some) if x.requires_grad]
        got = torch.autograd.grad(attend(*some, call, backend="torch"), [some[i] for i in asked], grad)
        assert all(torch.equal(g, every[i]) for g, i in zip(got, asked, strict=True))


def test_second_derivatives_are_refused():
    q, k, v, _ = tensors(Shape(4, 2, 50, 50))
    out = attend(q, k, v, Call(SlidingWindow(9)), backend="torch").sum()
    with pytest.raises(
        ValueError, match="no second derivatives, got create_graph=True; use backend='reference'"
    ):
        torch.autograd.grad(out, q, create_graph=True)
    out = attend(q, k, v, Call(SlidingWindow(9)), backend="reference").sum()
    (first,) = torch.autograd.grad(out, q, create_graph=True)
    assert torch.autograd.grad(first.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("q_len", [0, 1, 30])
def test_a_batch_of_nothing(q_len):
    for name, pattern in PATTERNS.items():
        q, k, v, _ = tensors(Shape(4, 2, q_len, 30, batch=0 if q_len else 2))
        assert attend(q, k, v, Call(pattern), backend="torch").shape == q.shape, name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(2**40),
        SlidingWindow(1),
        Strided(2**40),
        StreamingLLM(2**40, 1),
        Longformer(5, (3, 10**9)),
        get_pattern("block_local", block=2**30),
        get_pattern("dilated_window", window=2**20, dilation=2**19),
        get_pattern("sparse_transformer_fixed", block=2**30, summary=2**29),
        get_pattern("shifted", group=2**30),
        get_pattern("bigbird", block=1024),
        get_pattern("bigbird", block=1, global_blocks=100),
        get_pattern("random", blocks=4000, block=1),
        get_pattern("multi_scale", window=1, scales=40),
        get_pattern("multi_scale", window=3, scales=25),
    ],
    ids=str,
)
def test_options_larger_than_the_sequence(pattern, causal):
    for n in (1, 2, 50):
        both(tensors(Shape(4, 2, n, n)), Call(pattern, Constraint(causal)))


def test_many_scales_stay_few_pieces():
    plan = make_plan(
        get_pattern("multi_scale", window=3, scales=15), Constraint(False), 60_000, 60_000, heads=1
    )
    assert plan.n_pieces == 2 * 15 - 1


EIGHT = PerHead(
    (
        SlidingWindow(9),
        get_pattern("bigbird", block=16),
        Strided(5),
        Random(),
        Longformer(9, (0, 5)),
        get_pattern("block_local", block=50),
        StreamingLLM(3, 9),
        Full(),
    )
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_eight_heads_that_all_differ(kv_heads, causal):
    both(tensors(Shape(8, kv_heads, 150, 150)), Call(EIGHT, Constraint(causal)))
    both(tensors(Shape(8, kv_heads, 20, 150)), Call(EIGHT, Constraint(causal)))


def test_threads_do_not_disturb_each_other():
    q, k, v, _ = (x.detach() for x in tensors(Shape(4, 2, 300, 300)))
    calls = [Call(pattern) for pattern in PATTERNS.values()]
    want = [attend(q, k, v, call, backend="torch") for call in calls]
    wrong = []

    def work(first):
        for i in range(2 * len(calls)):
            number = (first + i) % len(calls)
            if not torch.equal(attend(q, k, v, calls[number], backend="torch"), want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore")  # of torch's own, about how it traces
@pytest.mark.parametrize("q_len", [1, 60])
def test_inside_torch_compile(q_len):
    q, k, v, grad = tensors(Shape(4, 2, q_len, 60))
    call = Call(PATTERNS["longformer"])
    plain = attend(q, k, v, call, backend="torch") * 2
    compiled = torch.compile(lambda *given: attend(*given, call, backend="torch") * 2, backend="eager")(
        q, k, v
    )
    assert torch.equal(plain, compiled)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (plain, compiled)), strict=True):
        assert torch.equal(a, b)
