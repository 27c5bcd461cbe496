"""What is fed and scored: literal tables for the shape, properties for the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.evaluate.method import Method
from hf_sparse.evaluate.windows import full, last, masked, rolling, strided, windows


def spans(found):
    return [(w.begin, w.stop, w.first) for w in found]


def test_tables():
    assert spans(full(9)) == [(0, 9, 1)]
    assert spans(strided(10, length=6, stride=3, prefixed=False)) == [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    assert spans(rolling(10, length=4, prefixed=False)) == [(0, 5, 1), (4, 9, 5), (5, 10, 9)]
    assert spans(masked(10, length=4)) == [(0, 4, 0), (4, 8, 4), (6, 10, 8)]
    assert last(20, 8, 3, prefixed=True) == last(20, 8, 3, prefixed=True)
    assert spans([last(20, 8, 3, prefixed=True)]) == [(12, 20, 17)]


def test_only_later_windows_are_prefixed():
    for found in (strided(30, 8, 4, prefixed=True), rolling(30, 8, prefixed=True)):
        flags = [window.prefixed for window in found]
        assert flags == [False] + [True] * (len(flags) - 1)
    assert not last(8, 8, 3, prefixed=True).prefixed  # the whole document has its own prefix
    assert not any(window.prefixed for window in strided(30, 8, 4, prefixed=False))


@given(
    n=st.integers(2, 200),
    length=st.integers(2, 60),
    share=st.floats(0, 1),
    mode=st.sampled_from(["full", "strided", "rolling"]),
)
def test_every_token_but_the_first_is_scored_once_and_fits(n, length, share, mode):
    stride = 1 + int(share * (length - 2))
    found = windows(mode, n, length, stride, True)
    assert [i for w in found for i in range(w.first, w.stop)] == list(range(1, n))
    for w in found:
        assert 0 <= w.begin < w.first
        assert w.fed <= (n if mode == "full" else length)
        if mode == "strided" and w.begin:
            assert w.first - w.begin == length - stride  # no token sees less
        if mode == "rolling" and n > length:
            assert w.fed == length


@given(n=st.integers(1, 200), length=st.integers(1, 60))
def test_masked_windows_score_every_token_once(n, length):
    found = masked(n, length)
    assert [i for w in found for i in range(w.first, w.stop)] == list(range(n))
    assert all(w.stop - w.begin == min(n, length) for w in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, r"unknown mode 'fast'. Available: full, strided, rolling"),
        ({"max_length": 2}, r"max_length must be a whole number >= 3 .* got 2"),
        ({"max_length": True}, r"max_length must be a whole number"),
        ({"stride": 4}, r"stride=4 goes with mode='strided'"),
        ({"mode": "strided", "stride": 64}, r"stride must be below max_length=64, got 64"),
        ({"mode": "strided", "stride": 0}, r"stride must be a whole number >= 1"),
        ({"bos": False, "bos_each_window": True}, r"no window gets a BOS token"),
        ({"contexts": (32, 100), "context_targets": 8}, r"a context of 100 tokens is beyond max_length=64"),
        ({"contexts": (32,), "context_targets": 32}, r"must hold more than the 32 that are scored"),
        ({"contexts": (32, 32), "context_targets": 8}, r"one length twice"),
        ({"key_tokens": 64}, r"goes with mode='full' and a larger max_length"),
        ({"key_tokens": 16, "mode": "rolling"}, r"goes with mode='full'"),
        ({"batch_size": 0}, r"batch_size must be a whole number >= 1"),
        ({"prefill_chunk": 0}, r"prefill_chunk must be a whole number >= 1"),
        ({"prefill_chunk": 8, "batch_size": 2}, r"reads one window at a time, got batch_size=2"),
        ({"mask_share": 0.0}, r"mask_share must be in \(0, 1\], got 0.0"),
        ({"head_chunk": 0}, r"head_chunk must be a whole number >= 1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Method(**{"max_length": 64, **settings})


@pytest.mark.parametrize("settings", [{"mode": "strided"}, {"key_tokens": 16}, {"prefill_chunk": 8}])
def test_an_encoder_refuses_what_is_causal(settings):
    with pytest.raises(ValueError, match=r"causal models"):
        Method(max_length=64, **settings).for_encoder()
