"""Every pair of a plan counted one by one, to be compared with the dense mask."""

import numpy as np
import torch

from hf_sparse import Full
from hf_sparse.plan import make_plan


def times_held(plan) -> np.ndarray:
    """Return how often each pair [H, Q, K] is held by the pieces and tiles, counted one by one."""
    held = np.zeros((plan.heads, plan.q_len, plan.k_len), dtype=int)
    assert sorted(head for group in plan.groups for head in group.heads) == list(range(plan.heads))
    for group in plan.groups:
        for piece in group.pieces:
            _count_piece(piece, list(group.heads), held)
        for tiles in group.tiles:
            assert tiles.heads == group.heads
            _count_tiles(tiles, held)
    return held


def _count_piece(piece, heads, held):
    lo, hi = piece.bounds()
    assert (lo >= 0).all() and (hi <= piece.keys.count).all()
    assert (np.diff(lo[hi > lo]) >= 0).all() and (np.diff(hi[hi > lo]) >= 0).all()
    queries = piece.queries.at(np.arange(piece.queries.count))
    keys = piece.keys.at(np.arange(piece.keys.count))
    pairs = 0
    for member in range(piece.repeat):
        skipped = piece._skipped(piece.query_position + queries + member)
        for t, query in enumerate(queries):
            if not skipped[t]:
                seen = keys[lo[t] : hi[t]] + member
                held[np.ix_(heads, [query + member], seen)] += 1
                pairs += len(seen)
    assert piece.pairs == pairs > 0 and piece.holds_pairs


def _count_tiles(tiles, held):
    pairs = 0
    for block in range(tiles.q_blocks):
        start, stop = tiles.rows(block, block + 1)
        keys, allowed = tiles.check(block, block + 1)
        first = (tiles.first_block + block) * tiles.query_block
        rows = torch.arange(start, stop) + tiles.first + tiles.k_len - tiles.q_len - first
        for number, head in enumerate(tiles.heads):
            listed = tiles.lists[min(number, len(tiles.lists) - 1), block]
            assert len(set(listed[listed >= 0])) == (listed >= 0).sum()
            seen = allowed[number, 0, rows]
            pairs += int(seen.sum())
            for column, key in enumerate(keys[min(number, len(keys) - 1), 0].tolist()):
                held[head, start:stop, key] += seen[:, column].numpy()
            if not tiles.masked[block]:
                wanted = np.repeat(listed >= 0, tiles.key_block)
                assert (seen.numpy() == wanted).all() and (
                    stop - start == tiles.query_block or not wanted.any()
                )
    assert tiles.pairs == pairs > 0


def allowed_pairs(
    pattern, constraint, heads, q_len, k_len, first=0, layer=0, chosen=(), columns=None
) -> np.ndarray:
    """Return the mask [H, Q, K] of the pattern and the constraint, asked for all pairs at once."""
    position = torch.arange(k_len) + first
    if columns is not None:
        early = torch.from_numpy(columns.positions)
        position = torch.cat((early, position[: k_len - len(early)]))
    query, key = position[k_len - q_len :][None, :, None], position[None, None, :]
    context = constraint.context(pattern, layer=layer, heads=heads, length=first + k_len, chosen=chosen)
    mask = constraint.allowed(pattern, context, torch.arange(heads)[:, None, None], query, key)
    return mask.expand(heads, q_len, k_len).numpy()


def check(pattern, constraint, q_len, k_len, first=0, heads=2, layer=0, chosen=(), columns=None):
    """Assert that the plan holds each allowed pair once, and nothing else; return it."""
    plan = make_plan(
        pattern,
        constraint,
        q_len,
        k_len,
        heads=heads,
        first=first,
        layer=layer,
        chosen=chosen,
        columns=columns,
    )
    want = allowed_pairs(pattern, constraint, heads, q_len, k_len, first, layer, chosen, columns)
    np.testing.assert_array_equal(times_held(plan), want.astype(int))
    assert round(plan.pairs * heads) == want.sum()
    assert sum(group.pairs for group in plan.groups) == want.sum()
    end = (
        first + k_len - (0 if columns is None else len(columns))
    )  # dense attention sees what was dropped, too
    assert plan.dense_pairs == allowed_pairs(Full(), constraint, 1, q_len, end).sum()
    if plan.reads is not None:
        np.testing.assert_array_equal(times_read(plan), want[:, 0].astype(int))
        assert sum(reads.pairs for reads in plan.reads) == want.sum()
    return plan


def times_read(plan) -> np.ndarray:
    """Return how often the single query of a plan reads each key, [H, K]."""
    read = np.zeros((plan.heads, plan.k_len), dtype=int)
    for reads in plan.reads:
        for number, head in enumerate(reads.heads):
            for keys in reads.ranges:
                assert len(keys)
                read[head, list(keys)] += 1
            if reads.listed is not None:
                listed = reads.listed[min(number, len(reads.listed) - 1)]
                np.add.at(read[head], listed[listed >= 0], 1)
    return read
