"""The definitions of the selectors, written down pair by pair: for one sequence, with loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_sparse.backends import Call, attend


def represented(name: str, keys: Tensor, last_queries: Tensor) -> Tensor:
    """Return what stands for a block of keys [block, D]; last_queries: [G, D] of its last token."""
    if name == "mean":
        return keys.mean(0)
    if name == "first":
        return keys[0]
    if name == "weighted":
        weights = [torch.softmax(keys @ query / math.sqrt(len(query)), 0) for query in last_queries]
        return sum(weight @ keys for weight in weights) / len(weights)
    if name == "minmax":
        return torch.stack((keys.min(0).values, keys.max(0).values))
    assert name == "hash"
    return torch.tensor([-1.0 if x < 0 else 1.0 for x in keys.mean(0)], dtype=keys.dtype)


def scored(name: str, query: Tensor, block: Tensor) -> float:
    """Return how much one query [D] wants a block."""
    if name == "minmax":
        return sum(max(q * low, q * high) for q, low, high in zip(query, *block, strict=True))
    if name == "hash":
        return float(sum(1 if (q < 0) == (b < 0) else -1 for q, b in zip(query, block, strict=True)))
    return float(query @ block)


def selected(selector, query: Tensor, key: Tensor) -> list[list[set[int]]]:
    """Return for each key head and each query the blocks that it reads, kept ones included, in causal attention.

    query: [H, N, D]; key: [H_kv, N, D].
    """
    heads, length, _ = query.shape
    groups, block = heads // len(key), selector.block
    found = []
    for kv in range(len(key)):
        own_heads = query[kv * groups : (kv + 1) * groups]
        lists: list[set[int]] = []
        for t in range(length):
            ask = t // selector.queries * selector.queries
            own = ask // block
            local = selector.local + (1 if block % selector.queries and selector.queries % block else 0)
            kept = {b for b in range(own + 1) if b < selector.sinks or b >= own - local}
            total = selector.keep if isinstance(selector.keep, int) else selector.keep * (own + 1)
            total = math.ceil(round(total, 6))
            if hasattr(selector, "least"):
                total = max(total, selector.least)
            scores = []
            for b in sorted(set(range(own + 1)) - kept):
                rows = slice(b * block, (b + 1) * block)
                stands = represented(selector.represent, key[kv, rows], own_heads[:, (b + 1) * block - 1])
                mean = sum(scored(selector.represent, q[ask], stands) for q in own_heads) / groups
                scores.append((-mean, b))
            best = [b for _, b in sorted(scores)][: max(0, total - len(kept))]
            grid = max(block, selector.queries)
            near = range(max(0, t // grid * grid // block - local), t // block + 1)
            sinks = range(min(selector.sinks, t // block + 1))
            lists.append({*sinks, *best, *near})
        found.append(lists)
    return found


def check_causal(selector, query: Tensor, key: Tensor, value: Tensor, tokens) -> None:
    """Change one token after the other: what comes before it stays as it was, bit for bit."""
    out = attend(query, key, value, Call(selector), None, "torch")
    for t in tokens:
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            made = torch.Generator().manual_seed(t)
            x[:, :, t] = 100 * torch.randn(x.shape[3], generator=made, dtype=x.dtype)
        after = attend(*changed, Call(selector), None, "torch")
        assert torch.equal(after[:, :, :t], out[:, :, :t])
        assert not torch.equal(after[:, :, t], out[:, :, t])


def check_taken_back(selector, text, other, read) -> None:
    """Go on with another text for 34 tokens and take them back: every token then reads what it reads in one pass.

    text, other: query and key [R, H or H_kv, 120, D]; read: gives the pairs of a selection for queries and keys.
    """
    (query, key), (wrong_query, wrong_key) = text, other
    index = selector.index()
    index.select(query[:, :, :66], key[:, :, :66])
    wrong = torch.cat((key[:, :, :66], wrong_key[:, :, 66:]), 2)
    for end in range(67, 101):
        index.select(wrong_query[:, :, end - 1 : end], wrong[:, :, :end])
    for end in range(67, 121):  # goes on at 66
        part = index.select(query[:, :, end - 1 : end], key[:, :, :end])
        whole = selector.index().select(query[:, :, :end], key[:, :, :end])
        asked = torch.tensor([end - 1]), torch.arange(end)
        assert torch.equal(read(part, *asked), read(whole, *asked)), end
