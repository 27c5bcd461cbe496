"""What is selected: the definitions, causality, and the same in one pass, in chunks and token by token."""

import pytest
import torch
from brute_force import check_causal, selected
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.backends import Call, attend
from hf_sparse.patterns import Union, get_pattern
from hf_sparse.patterns.full import Full
from hf_sparse.patterns.sliding_window import SlidingWindow
from hf_sparse.plan import Constraint, Segments
from hf_sparse.selectors import BlockIndex, divided
from hf_sparse.selectors.quest import Quest
from hf_sparse.selectors.representations import REPRESENTATIONS
from hf_sparse.selectors.topk_blocks import TopKBlocks

SELECTORS = [
    *(TopKBlocks(keep=5, block=4, local=1, represent=name) for name in REPRESENTATIONS),
    TopKBlocks(keep=0.5, block=4, query_block=2),
    TopKBlocks(keep=0.6, block=3, query_block=6, sinks=0, local=0),
    TopKBlocks(
        keep=7, block=4, query_block=3, sinks=2, local=0
    ),  # not a divisor: reads are held across blocks
    Quest(keep=0.25, block=2, local=1, dense_layers=0, query_block=1, least=6),
]
each = pytest.mark.parametrize("selector", SELECTORS, ids=str)


def random(heads, kv_heads, length, rows=1, seed=0, size=5):
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size), (rows, kv_heads, length, size)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def read(selector, query, key, others=None):
    """Return the pairs [R, H, Q, K] that are read, kept and selected ones, through weights of the reference."""
    pattern = selector if others is None else selector | others
    eye = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return attend(query, key, eye, Call(pattern), None, "reference") > 0


@each
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(2, 2, 37), (4, 2, 41), (3, 1, 24)])
def test_each_selector_is_its_definition(selector, heads, kv_heads, length):
    query, key, _ = random(heads, kv_heads, length)
    pairs = read(selector, query, key)[0]
    wanted = selected(selector, query[0], key[0])
    some = False
    for kv, lists in enumerate(wanted):
        for t, blocks in enumerate(lists):
            tokens = {
                k for b in blocks for k in range(b * selector.block, (b + 1) * selector.block) if k <= t
            }
            some |= len(tokens) < t + 1
            for head in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
                assert set(torch.nonzero(pairs[head, t])[:, 0].tolist()) == tokens, (head, t)
    assert some, "something must have been left out"


def test_of_equal_scores_the_lower_blocks_are_taken():
    query, key, _ = random(1, 1, 40)
    index = BlockIndex(TopKBlocks(keep=4, block=4, local=0))
    lists = index.select(query, torch.ones_like(key)).lists
    assert lists[0, 0, -1].tolist() == [1, 2]


@each
def test_in_chunks_and_token_by_token_the_same_is_selected(selector):
    query, key, _ = random(4, 2, 53, rows=2)
    whole = BlockIndex(selector).select(query, key)
    for lengths in ((53,), (1,) * 53, (7, 1, 19, 2, 24), (30, *(1,) * 23)):
        index, end = BlockIndex(selector), 0
        for length in lengths:
            end += length
            part = index.select(query[:, :, end - length : end], key[:, :, :end])
            for number in range(part.lists.shape[2]):
                held = [x for x in part.lists[0, 0, number].tolist() if x >= 0]
                wanted = whole.lists[0, 0, part.first_block + number].tolist()
                assert held == [x for x in wanted if x >= 0], (lengths, end, number)


@each
def test_tokens_taken_back_leave_no_trace(selector):
    query, key, _ = random(4, 2, 90)
    other, key2, _ = random(4, 2, 90, seed=1)
    index = BlockIndex(selector)
    for end in range(1, 71):
        index.select(query[:, :, end - 1 : end], key[:, :, :end])
    wrong = torch.cat((key[:, :, :70], key2[:, :, 70:]), 2)
    for end in range(71, 86):
        index.select(other[:, :, end - 1 : end], wrong[:, :, :end])
    for end in range(67, 91):  # goes on at 66
        part = index.select(query[:, :, end - 1 : end], key[:, :, :end])
        whole = BlockIndex(selector).select(query[:, :, :end], key[:, :, :end])
        held, wanted = (
            [x for x in lists[0, 1, -1].tolist() if x >= 0] for lists in (part.lists, whole.lists)
        )
        assert held == wanted, end


def test_more_than_is_remembered_cannot_be_taken_back():
    query, key, _ = random(2, 1, 200)
    index = BlockIndex(TopKBlocks(keep=4, block=4))
    index.select(query, key)
    with pytest.raises(ValueError, match="100 tokens are to be taken back"):
        index.select(query[:, :, 100:101], key[:, :, :101])


@each
def test_a_later_token_changes_nothing_before_it(selector):
    check_causal(selector, *random(4, 2, 47), (3, 17, 30, 46))


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_the_whole_budget_is_dense_attention(name):
    query, key, value = random(4, 2, 61)
    selector = TopKBlocks(keep=1.0, block=4, query_block=2, represent=name)
    dense = attend(query, key, value, Call(Full()), None, "reference")
    torch.testing.assert_close(
        attend(query, key, value, Call(selector), None, "torch"), dense, rtol=0, atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_no_key_of_a_page_scores_more_than_its_bound(seed, size):
    query, key, _ = random(3, 3, 16, seed=seed)
    query, pages = query * size, key.unflatten(2, (4, 4))
    blocks = REPRESENTATIONS["minmax"].summarise(pages, query[:, :, 3::4])
    bounds = REPRESENTATIONS["minmax"].score(query, blocks)
    true = (query @ key.mT).unflatten(3, (4, 4)).amax(-1)
    assert bool((bounds >= true - 1e-12 * size).all())


def test_the_budget_is_what_is_read():
    """A share counts the blocks up to the query, kept ones included, a number all of them."""
    query, key, _ = random(1, 1, 400)
    for keep, at in ((0.25, lambda blocks: -(-blocks // 4)), (9, lambda blocks: min(9, blocks))):
        selector = TopKBlocks(keep=keep, block=4, local=1)
        pairs = read(selector, query, key)[0, 0]
        for block in range(100):
            wanted = max(at(block + 1), min(block + 1, 3))
            assert pairs[4 * block + 3].sum() == 4 * wanted, (keep, block)


def test_kept_blocks_are_never_selected_and_a_window_beside_is_no_loss():
    query, key, _ = random(2, 1, 64)
    selector = TopKBlocks(keep=6, block=4)
    alone, beside = read(selector, query, key), read(selector, query, key, SlidingWindow(19))
    window = SlidingWindow(19).mask(64)[0]
    assert torch.equal(beside, alone | window)


def test_what_the_models_own_window_hides_is_not_selected():
    query, key, _ = random(2, 2, 80)
    selector = TopKBlocks(keep=5, block=4, sinks=0, local=0, query_block=4)
    index = BlockIndex(selector)
    starts = Constraint(window=30).bounds()[0]
    lists = index.select(query, key, 0, starts).lists
    for number in range(20):
        for block in lists[0, 0, number].tolist():
            assert block < 0 or (number * 4 - block * 4 < 30 and block < number)
    assert (lists[:, :, 10:] >= 0).sum(-1).min() == 4


def test_keep_is_a_list_of_layers_and_the_lowest_may_be_dense():
    selector = TopKBlocks(keep=[3, 0.5, 9], block=4, dense_layers=1)
    assert divided(selector, 0).static == Full()
    assert [divided(selector, layer).selector.keep for layer in (1, 2)] == [0.5, 9]
    with pytest.raises(ValueError, match="keep has 3 entries and the model has 4 layers"):
        selector.check_fit(4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be a share of the blocks above 0 and up to 1.0, or a whole number.* got 0"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": -0.1}, "got -0.1"),
        ({"keep": True}, "got True"),
        ({"keep": []}, "one per layer, got"),
        ({"block": 0}, "block must be >= 1"),
        ({"block": 16, "query_block": 24}, "query_block must be at most block, or a multiple of it"),
        ({"represent": "max"}, "represent must be"),
        ({"reuse": 0}, "reuse must be >= 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_pattern("topk_blocks", **options)


def test_two_selectors_in_a_layer_and_one_in_heads_are_refused():
    with pytest.raises(ValueError, match="can have one content-based pattern"):
        divided(Union.of(TopKBlocks(), Quest(dense_layers=0)), 0)
    per_head = get_pattern("grouped_heads")  # any pattern of heads
    assert not per_head.content_based


def test_the_arguments_of_a_call_that_cannot_select_are_refused():
    query, key, value = random(2, 1, 20)
    with pytest.raises(ValueError, match="selects for causal attention"):
        attend(query, key, value, Call(TopKBlocks(), Constraint(causal=False)))
    with pytest.raises(ValueError, match="knows the first 0 tokens"):
        attend(query[:, :, 4:], key, value, Call(TopKBlocks()))
    with pytest.raises(ValueError, match="at least"):
        attend(query, key, value, Call(TopKBlocks(), near=0), far=(query, key))


def test_rows_of_a_padded_batch_count_blocks_from_their_first_token():
    query, key, value = random(4, 2, 50, rows=2)
    mask = torch.arange(50) >= torch.tensor([[0], [13]])
    for selector in SELECTORS:
        out = attend(query, key, value, Call(selector), Segments.from_mask(mask), "torch")
        alone = attend(query[1:, :, 13:], key[1:, :, 13:], value[1:, :, 13:], Call(selector), None, "torch")
        torch.testing.assert_close(out[1:, :, 13:], alone, rtol=0, atol=1e-12)
        assert not out[1, :, :13].any()
