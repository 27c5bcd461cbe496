"""Each pattern equals its picture and its one-line definition; mistakes get one sentence."""

import dataclasses
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import Full, Longformer, Pattern, SlidingWindow, StreamingLLM, Strided
from hf_sparse.patterns import Union, available_patterns, get_pattern, pattern_class, register_pattern

# The definitions once more, as plain Python on numbers (SlidingWindow: 0 <= |q - k| < w, and so on).
DEFINITIONS = {
    "full": lambda p, q, k: True,
    "sliding_window": lambda p, q, k: abs(q - k) < p.window,
    "strided": lambda p, q, k: (q - k) % p.stride == 0 if p.anchor == "relative" else k % p.stride == 0,
    "longformer": lambda p, q, k: abs(q - k) < p.window or k in p.global_tokens,
    "streaming_llm": lambda p, q, k: k < p.sinks or abs(q - k) < p.window,
}
SMALL = [
    Full(),
    SlidingWindow(window=1),
    SlidingWindow(window=4),
    Strided(stride=1),
    Strided(stride=3),
    Strided(stride=4, anchor="absolute"),
    Longformer(window=2, global_tokens=(0, 5)),
    Longformer(window=3, global_tokens=()),
    StreamingLLM(sinks=0, window=2),
    StreamingLLM(sinks=3, window=2),
]


def pictures(cls):
    """Yield (pattern, causal, mask) of every picture in the docstring of a pattern's module."""
    doc = sys.modules[cls.__module__].__doc__
    call = re.search(rf"^({cls.__name__}\(.*\)):$", doc, re.M).group(1)
    pattern = eval(call, {cls.__name__: cls})  # noqa: S307 - our own docstring
    blocks = re.findall(r"^ *key .*\n((?: *\d+ .*\n?)+)", doc, re.M)
    assert blocks, f"{cls.__name__} has no picture"
    for number, block in enumerate(blocks):
        rows = [re.findall(r"[x.]", line) for line in block.splitlines() if line.strip()]
        yield pattern, number == 0, torch.tensor([[cell == "x" for cell in row] for row in rows])


@pytest.mark.parametrize("name", available_patterns())
def test_the_picture_in_the_docstring_is_the_mask(name):
    for pattern, causal, picture in pictures(pattern_class(name)):
        assert torch.equal(pattern.mask(len(picture), causal=causal)[0], picture)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_the_mask_is_the_definition(pattern, causal):
    n = 13
    mask = pattern.mask(n, causal=causal)[0]
    for q in range(n):
        for k in range(n):
            want = DEFINITIONS[pattern.name](pattern, q, k) or q == k
            if not causal and isinstance(pattern, Longformer):
                want = want or q in pattern.global_tokens  # global queries see everything
            assert mask[q, k] == (want and (k <= q or not causal)), (q, k)


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_decoding_rows_are_the_last_rows_of_the_whole_mask(pattern):
    assert torch.equal(pattern.mask(3, 11)[0], pattern.mask(11)[0, -3:])


def test_window_one_is_self_only():
    assert torch.equal(SlidingWindow(window=1).mask(5)[0], torch.eye(5, dtype=torch.bool))
    assert torch.equal(StreamingLLM(sinks=0, window=1).mask(5)[0], torch.eye(5, dtype=torch.bool))


def test_every_pattern_is_frozen_has_defaults_and_survives_json():
    for name in available_patterns():
        pattern = get_pattern(name)
        assert pattern.name == name and get_pattern(name, **pattern.options()) == pattern
        for field in dataclasses.fields(pattern):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(pattern, field.name, 1)


def test_union_is_flat_and_allows_what_any_member_allows():
    a, b = SlidingWindow(window=2), Strided(stride=3)
    union = a | b | a
    assert union == Union((a, b)) and str(union) == f"{a} | {b}"
    assert torch.equal(union.mask(9), a.mask(9) | b.mask(9))
    with pytest.raises(ValueError, match="a union joins patterns, got str"):
        _ = a | "strided"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("longfromer", {}, "unknown pattern 'longfromer'. Did you mean 'longformer'? Available: full, "),
        ("sliding_window", {"windw": 3}, "no option 'windw'. Did you mean 'window'?"),
        ("full", {"window": 3}, "no option 'window'. (it takes no options)"),
        ("sliding_window", {"window": 0}, "window must be >= 1 (1 is the token itself only), got 0"),
        ("sliding_window", {"window": -3}, "window must be >= 1"),
        ("sliding_window", {"window": 2.5}, "window must be a whole number, got 2.5"),
        ("sliding_window", {"window": True}, "window must be a whole number, got True"),
        ("sliding_window", {"window": "7"}, "window must be a whole number, got '7'"),
        ("strided", {"stride": 0}, "stride must be >= 1, got 0"),
        ("strided", {"anchor": "left"}, "anchor must be 'relative' or 'absolute', got 'left'"),
        ("streaming_llm", {"sinks": -1}, "sinks must be >= 0, got -1"),
        (
            "longformer",
            {"global_tokens": (0, -1)},
            "global_tokens must hold whole numbers from 0 to 1099511627776, got -1",
        ),
        ("longformer", {"global_tokens": "0"}, "global_tokens must be a list of token positions"),
        ("sliding_window", {"window": 2**41}, "window must be at most 1099511627776"),
        ("longformer", {"global_tokens": (2**70,)}, "global_tokens must hold whole numbers from 0 to"),
        (7, {}, "pattern must be a name or a Pattern object, got int"),
        (SlidingWindow(), {"window": 3}, "options window go with a pattern name"),
    ],
)
def test_mistakes_get_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_pattern(name, **options)


VALUES = st.one_of(
    st.integers(-3, 2**40),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.none(),
    st.lists(st.integers(-2, 9)),
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(available_patterns()), data=st.data())
def test_any_options_give_a_pattern_or_a_value_error(name, data):
    fields = [field.name for field in dataclasses.fields(pattern_class(name))]
    options = {field: data.draw(VALUES) for field in fields} if fields else {}
    try:
        pattern = get_pattern(name, **options)
    except ValueError as error:
        assert any(field in str(error) for field in fields)
    else:
        assert pattern.mask(5).diagonal(dim1=1, dim2=2).all()


def test_registering_refuses_taken_names_reserved_words_and_other_classes():
    @dataclasses.dataclass(frozen=True)
    class Mine(Pattern):
        pass

    for name, message in [
        ("full", "pattern 'full' is already Full"),
        ("my flash", "lower_case letters"),
        ("my_flash", "contains 'flash'"),
        ("custom", "lower_case letters"),
    ]:
        with pytest.raises(ValueError, match=message):
            register_pattern(name)(Mine)
    with pytest.raises(TypeError, match="must be a @dataclass"):
        register_pattern("mine")(int)

    class NoFields(Pattern):
        window: int = 4

    with pytest.raises(TypeError, match="must be a @dataclass"):
        register_pattern("mine")(NoFields)
    assert "mine" not in available_patterns() and Mine.name == ""
