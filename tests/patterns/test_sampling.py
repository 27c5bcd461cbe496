"""Random draws are the same everywhere, distinct, fair, and independent of what else is drawn along with them."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import BigBird, Random
from hf_sparse.patterns.parts import Drawn
from hf_sparse.patterns.sampling import BlockDraw, is_drawn, mix

from .definitions import Call
from .definitions import drawn as plain_draw

DRAWS = st.builds(
    BlockDraw,
    seed=st.integers(0, 5),
    layer=st.integers(0, 3),
    most=st.integers(1, 7),
    first=st.integers(0, 3),
    stop=st.one_of(st.none(), st.integers(0, 20)),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
HEADS, BLOCKS = torch.arange(3), torch.arange(20)


def test_the_hash_is_splitmix64():
    """The first number of the published generator for the seeds 0 and 1234567."""
    published = [0xE220A8397B1DCDAF, 6457827717110365317]
    assert [x % 2**64 for x in mix(torch.tensor([0, 1234567])).tolist()] == published


def test_draws_are_these_numbers_everywhere():
    """Written down once: another process, device, thread count or release must give the same."""
    draw = BlockDraw(seed=7, layer=2, most=4)
    assert draw(torch.tensor([0, 5]), torch.tensor([0, 2, 100, 10**6])).tolist() == [
        [[0, -1, -1, -1], [0, 1, 2, -1], [81, 49, 21, 82], [41480, 801389, 491688, 940640]],
        [[0, -1, -1, -1], [0, 1, 2, -1], [27, 38, 20, 6], [532855, 738630, 700202, 170950]],
    ]
    draw = BlockDraw(seed=0, layer=0, most=3, first=1, stop=9, before=1, after=2)
    assert draw(torch.tensor([0, 1]), torch.tensor([1, 4, 8])).tolist() == [
        [[6, 3, 8], [1, 7, 6], [2, 5, 6]],
        [[5, 7, 8], [1, 2, 6], [1, 5, 4]],
    ]


@pytest.mark.parametrize(
    ("pattern", "digest"),
    [(Random(keys_per_query=8, seed=3), "8ef5d7fd12f7e943"), (BigBird(block=4, seed=3), "bdf05e5757070b4b")],
    ids=["random", "bigbird"],
)
def test_whole_masks_are_the_same_everywhere(pattern, digest):
    mask = pattern.mask(200, heads=3, layer=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(pattern.mask(200, heads=3, layer=5), mask)
    finally:
        torch.set_num_threads(threads)
    assert hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_draws_the_same():
    draw = BlockDraw(seed=7, layer=2, most=16)
    on_gpu = draw(HEADS.cuda(), torch.arange(5000, device="cuda"))
    assert torch.equal(on_gpu.cpu(), draw(HEADS, torch.arange(5000)))


@settings(max_examples=100, deadline=None)
@given(draw=DRAWS)
def test_draws_are_the_definition_distinct_and_within_their_range(draw):
    picks = draw(HEADS, BLOCKS)
    for h in HEADS.tolist():
        for b in BLOCKS.tolist():
            left_out = range(b - draw.before, b + draw.after)
            stop = b + 1 if draw.stop is None else draw.stop
            candidates = [c for c in range(draw.first, stop) if c not in left_out]
            wanted = plain_draw(draw.seed, draw.layer, h, b, candidates, draw.most)
            assert len(set(wanted)) == min(draw.most, len(candidates))
            assert picks[h, b].tolist() == wanted + [-1] * (draw.most - len(wanted))


@settings(max_examples=60, deadline=None)
@given(draw=DRAWS, data=st.data())
def test_any_slice_draws_the_same(draw, data):
    heads = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    blocks = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=6)))
    assert torch.equal(draw(heads, blocks), draw(HEADS, BLOCKS)[heads][:, blocks])


def test_every_block_is_drawn_equally_often_and_with_every_other():
    """8000 draws of 3 out of 10: a count deviates from its mean by less than 5 standard deviations."""
    picks = BlockDraw(seed=1, layer=0, most=3, stop=10)(torch.arange(4), torch.arange(2000)).flatten(0, 1)
    held = torch.zeros(8000, 10).scatter(1, picks, 1.0)
    both = held.T @ held
    assert ((both.diagonal() - 2400).abs() < 5 * (8000 * 0.3 * 0.7) ** 0.5).all()
    pairs = both[~torch.eye(10, dtype=torch.bool)]
    assert ((pairs - 8000 / 15).abs() < 5 * (8000 / 15 * 14 / 15) ** 0.5).all()


def test_seeds_layers_heads_and_queries_draw_differently():
    mask = Random(keys_per_query=4).mask(64, heads=2)
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(Random(keys_per_query=4, seed=1).mask(64, heads=2), mask)
    assert not torch.equal(Random(keys_per_query=4).mask(64, heads=2, layer=1), mask)
    rows = Random(keys_per_query=4).mask(64, causal=False)[0]
    assert len({tuple(row) for row in rows.tolist()}) == 64


def test_membership_answers_any_shape_of_question():
    """Broadcast rows and columns, one pair at a time, tiles with other keys per head: always the same pairs."""
    drawn = Drawn(4, 2, BlockDraw(seed=0, layer=0, most=3, stop=16))
    n = torch.arange(32)
    whole = is_drawn(drawn, HEADS[:, None, None], n[None, :, None], n[None, None, :])
    h, q, k = torch.meshgrid(HEADS, n, n, indexing="ij")
    assert torch.equal(is_drawn(drawn, h, q, k), whole)
    assert torch.equal(is_drawn(drawn, h.flatten(), q.flatten(), k.flatten()), whole.flatten())
    key = torch.stack([n, n.flip(0), n * 5 % 32])[:, None, None, :]
    tiles = is_drawn(drawn, HEADS[:, None, None, None], n.view(1, 4, 8, 1), key)
    assert torch.equal(tiles, whole[HEADS[:, None, None, None], n.view(1, 4, 8, 1), key])
    assert is_drawn(drawn, HEADS[:, None, None], n[None, :, None], n[None, None, :0]).shape == (3, 32, 0)
    assert 0 < whole.sum() == 3 * 8 * 3 * 4 * 2


def test_bigbird_never_draws_what_it_already_sees_and_fewer_where_fewer_are_left():
    for causal in (True, False):
        pattern = BigBird(block=2, window_blocks=3, global_blocks=2, random_blocks=3)
        call = Call(causal, length=23)
        picks = pattern.draw(call.context)(HEADS, torch.arange(12))
        for b in range(12):
            near = {b - 2, b - 1, b} if causal else {b - 1, b, b + 1}
            ends = {0, 1} if causal else {0, 11}
            left = set(range(b + 1 if causal else 12)) - near - ends
            for own in picks[:, b].tolist():
                listed = [block for block in own if block >= 0]
                assert len(listed) == len(set(listed)) == min(3, len(left))
                assert set(listed) <= left


def test_bigbirds_draw_can_be_replaced():
    class Other(BigBird):
        def draw(self, context):
            return lambda head, block: torch.full((len(head), len(block), 1), 3)

    mask = Other(block=2, window_blocks=1, global_blocks=0, random_blocks=1).mask(16, causal=False)[0]
    own = torch.arange(16) // 2
    assert torch.equal(mask, (own[:, None] == own) | (own == 3))


def test_other_processes_with_other_thread_counts_draw_the_same():
    """What attention uses at a length where threads divide the work: the blocks of 20,000 tokens."""
    code = (
        "import hashlib, torch\n"
        "from hf_sparse.patterns.sampling import BlockDraw\n"
        "picks = BlockDraw(seed=7, layer=2, most=8)(torch.arange(8), torch.arange(20000))\n"
        "print(torch.get_num_threads(), hashlib.sha256(picks.contiguous().numpy().tobytes()).hexdigest())"
    )
    picks = BlockDraw(seed=7, layer=2, most=8)(torch.arange(8), torch.arange(20000))
    here = hashlib.sha256(picks.contiguous().numpy().tobytes()).hexdigest()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    answers = [process.communicate(timeout=60)[0].split() for process in running]
    assert answers[0] == ["1", here] and answers[1][1] == here
