"""Vertical-slash: its definition pair by pair, in both forms, and the same in chunks."""

import math

import pytest
import torch
from brute_force import check_causal, check_taken_back

from hf_sparse.backends import Call, attend, recording
from hf_sparse.patterns.full import Full
from hf_sparse.selectors.vertical_slash import VerticalSlash

SELECTORS = [
    VerticalSlash(vertical=0.2, slash=0.3, block=4, renew=16, local=0),
    VerticalSlash(vertical=20_000, slash=30_000, block=2, renew=10, sinks=0, local=1),
    VerticalSlash(vertical=0.0, slash=0.5, block=3, renew=3, local=0),
    VerticalSlash(vertical=0.4, slash=0.0, block=1, renew=50, sinks=2),
]
each = pytest.mark.parametrize("selector", SELECTORS, ids=str)
prompt = VerticalSlash(vertical=0.2, slash=0.2, block=4, renew=16, local=0, selection="prompt")


def random(heads, kv_heads, length, rows=1, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, 5), (rows, kv_heads, length, 5), (rows, kv_heads, length, 5)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def estimates(selector, query, key, at):
    """Return {block: weight} of columns and {distance: weight} of diagonals by the queries up to `at`; one key head."""
    columns, diagonals = {}, {}
    for t in range(max(0, at - 63), at + 1):
        for own in query:
            weights = torch.softmax(own[t] @ key[: t + 1].T / math.sqrt(key.shape[1]), 0)
            for k, weight in enumerate(weights.tolist()):
                b, d = k // selector.block, t // selector.block - k // selector.block
                columns[b] = columns.get(b, 0.0) + weight
                diagonals[d] = diagonals.get(d, 0.0) + weight
    return columns, diagonals


def asked_at(selector, t):
    """Return the position whose estimate serves query t."""
    at = [0, *range(selector.renew, t + 1, selector.renew)]
    size = selector.block
    while size <= min(t, selector.renew - 1):
        at.append(size)
        size *= 2
    return max(at)


def budget(given, seen, block):
    tokens = (
        given * seen * block if isinstance(given, float) else given * seen * block / max(seen * block, 131072)
    )
    return math.ceil(round(tokens / block, 6))


def selected(selector, query, key, last=None):
    """Return for each query the blocks that it reads; query [G, N, D], key [N, D]; last: whose estimate serves all."""
    found = []
    known = {}
    for t in range(query.shape[1]):
        ask = t // selector.block * selector.block
        own = t // selector.block
        kept = {b for b in range(own + 1) if b < selector.sinks or b >= own - selector.local}
        rest = [b for b in range(own + 1) if b not in kept]
        at = asked_at(selector, ask) if last is None else last
        if at not in known:
            known[at] = estimates(selector, query, key, at)
        columns, diagonals = known[at]
        best = sorted((b for b in rest if b in columns), key=lambda b: (-columns[b], b))
        slash = sorted((own - b for b in rest if own - b in diagonals), key=lambda d: (-diagonals[d], d))
        best = best[: budget(selector.vertical, own + 1, selector.block)]
        slash = slash[: budget(selector.slash, own + 1, selector.block)]
        found.append({*kept, *best, *(own - d for d in slash)})
    return found


def check_pairs(selector, query, key, last=None):
    eye = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    pairs = attend(query, key, eye, Call(selector), None, "reference")[0] > 0
    groups, left_out = query.shape[1] // key.shape[1], 0
    for kv in range(key.shape[1]):
        wanted = selected(selector, query[0, kv * groups : (kv + 1) * groups], key[0, kv], last)
        for t, blocks in enumerate(wanted):
            tokens = {k for k in range(t + 1) if k // selector.block in blocks}
            left_out += t + 1 - len(tokens)
            for head in range(kv * groups, (kv + 1) * groups):
                assert set(torch.nonzero(pairs[head, t])[:, 0].tolist()) == tokens, (head, t)
    assert left_out


@each
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 81), (2, 2, 97)])
def test_it_is_its_definition(selector, heads, kv_heads, length):
    check_pairs(selector, *random(heads, kv_heads, length)[:2])


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 81), (2, 2, 97), (1, 1, 40)])
def test_the_last_queries_of_a_prompt_decide_for_all_of_it(heads, kv_heads, length):
    check_pairs(prompt, *random(heads, kv_heads, length)[:2], last=length - 1)


@pytest.mark.parametrize("selector", [*SELECTORS, prompt], ids=str)
def test_in_chunks_and_token_by_token_the_same_is_selected(selector):
    query, key, _ = random(4, 2, 90, rows=2)
    begin = 60 if selector.looks_ahead else 0
    whole = selector.index()
    if begin:
        whole.select(query[:, :, :begin], key[:, :, :begin])
    whole = whole.select(query[:, :, begin:], key)
    for lengths in ((1,) * 30, (7, 1, 19, 2, 1)) if begin else ((1,) * 90, (7, 1, 19, 2, 61)):
        index, end = selector.index(), begin
        if begin:
            index.select(query[:, :, :begin], key[:, :, :begin])
        for length in lengths:
            end += length
            part = index.select(query[:, :, end - length : end], key[:, :, :end])
            asked = torch.arange(end - length, end)
            want, got = (x.mask(4, asked, torch.arange(end)) for x in (whole, part))
            assert torch.equal(want, got), (lengths, end)


@each
def test_tokens_taken_back_leave_no_trace(selector):
    texts = (random(4, 2, 120, seed=seed)[:2] for seed in (0, 1))
    check_taken_back(selector, *texts, lambda selection, *asked: selection.mask(4, *asked))


@each
def test_a_later_token_changes_nothing_before_it(selector):
    check_causal(selector, *random(4, 2, 47), (3, 17, 30, 46))


@pytest.mark.parametrize(
    "options", [{"vertical": 1.0, "slash": 0.0}, {"vertical": 0.0, "slash": 1.0}], ids=str
)
@pytest.mark.parametrize("selection", ["causal", "prompt"])
def test_the_whole_budget_is_dense_attention(options, selection):
    """In the causal form, where the estimate sees every block: at each block of queries."""
    given = random(4, 2, 61)
    selector = VerticalSlash(**options, block=4, renew=4, selection=selection)
    dense = attend(*given, Call(Full()), None, "reference")
    torch.testing.assert_close(attend(*given, Call(selector), None, "torch"), dense, rtol=0, atol=1e-12)


@each
def test_outputs_and_gradients_of_the_reference(selector):
    given = [x.requires_grad_() for x in random(4, 2, 77)]
    results = []
    for backend in ("reference", "torch"):
        with recording() as seen:
            out = attend(*given, Call(selector), None, backend)
        made = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, given, made)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert seen.calls[0].pairs < seen.calls[0].dense_pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical": 1.5}, "vertical must be a whole number of tokens from 0 on, or a share"),
        ({"slash": -1}, "slash must be"),
        ({"slash": True}, "slash must be"),
        ({"renew": 100}, "renew must be a multiple of block=64, got 100; choose 64"),
        ({"selection": "promt"}, "did you mean 'prompt'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        VerticalSlash(**options)
