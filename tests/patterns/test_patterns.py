"""The catalogue: patterns by name, their options, and what is refused with one sentence."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse import (
    Longformer,
    Pattern,
    Shifted,
    SlidingWindow,
    SparseTransformerFixed,
    get_pattern,
    register_pattern,
)
from hf_sparse.patterns import pattern_class, static_patterns


def test_every_pattern_is_frozen_has_defaults_and_survives_json():
    for name in static_patterns():
        pattern = get_pattern(name)
        assert pattern.name == name and get_pattern(name, **pattern.options()) == pattern
        for field in dataclasses.fields(pattern):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(pattern, field.name, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("longfromer", {}, "unknown pattern 'longfromer'. Did you mean 'longformer'? Available: atrous, "),
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
            "streaming_llm",
            {"positions": "cahce"},
            "positions must be 'absolute' or 'cache', got 'cahce'; did you mean 'cache'?",
        ),
        ("streaming_llm", {"positions": True}, "positions must be 'absolute' or 'cache', got True"),
        ("rerope", {"window": 0}, "window must be >= 1"),
        ("rerope", {"pattern": "fll"}, "unknown pattern 'fll'. Did you mean 'full'?"),
        ("rerope", {"pattern": 5}, "pattern must hold patterns or their names, got 5"),
        (
            "rerope",
            {"pattern": "self_extend"},
            "pattern must leave the distances of far keys to rerope, got self_extend(",
        ),
        ("self_extend", {"group": 0}, "group must be >= 1, got 0"),
        (
            "self_extend",
            {"pattern": {"name": "streaming_llm", "options": {"positions": "cache"}}},
            "pattern must leave the distances of far keys to self_extend, got streaming_llm(",
        ),
        (
            "longformer",
            {"global_tokens": (0, -1)},
            "global_tokens must hold whole numbers from 0 to 1099511627776, got -1",
        ),
        ("longformer", {"global_tokens": "0"}, "global_tokens must be a list of token positions"),
        ("sinks", {"sinks": 0}, "sinks must be >= 1, got 0"),
        ("sliding_window", {"window": 2**41}, "window must be at most 1099511627776"),
        ("longformer", {"global_tokens": (2**70,)}, "global_tokens must hold whole numbers from 0 to"),
        (
            "longformer",
            {"window": ()},
            "window must be a whole number or a list with one per layer, got an empty list",
        ),
        ("longformer", {"window": (4, 0)}, "window must be >= 1"),
        ("longformer", {"dilation": (1, 2.0)}, "dilation must be a whole number, got 2.0"),
        (
            "longformer",
            {"dilation": 2**31, "window": 2**10},
            "window * dilation must be at most 1099511627776",
        ),
        ("longformer", {"global_projections": 1}, "global_projections must be True or False, got 1"),
        ("dilated_window", {"dilation": 0}, "dilation must be >= 1, got 0"),
        ("dilated_window", {"dilation": []}, "a list with one per query head, got an empty list"),
        ("dilated_window", {"window": 2**39, "dilation": (1, 4)}, "got 549755813888 * 4; make one smaller"),
        ("block_local", {"neighbours": -1}, "neighbours must be >= 0, got -1"),
        ("block_local", {"block": 2**39, "neighbours": 3}, "block * (neighbours + 1) must be at most"),
        (
            "global_tokens",
            {"positions": 3},
            "positions must be a list of token positions such as (0, 64), got 3",
        ),
        (
            "global_tokens",
            {"token_ids": "ab"},
            "token_ids must be a list of vocabulary ids such as (1, 29871)",
        ),
        (
            "global_tokens",
            {"token_ids": (-1,)},
            "token_ids must hold whole numbers from 0 to 1099511627776, got -1",
        ),
        ("global_tokens", {"ratio": 0}, "ratio must lie above 0 and be at most 1, got 0"),
        ("global_tokens", {"ratio": 1.5}, "ratio must lie above 0 and be at most 1, got 1.5"),
        ("global_tokens", {"ratio": float("nan")}, "ratio must lie above 0 and be at most 1, got nan"),
        ("global_tokens", {"ratio": 1e-300}, "ratio must be at least 1/1099511627776"),
        ("global_tokens", {"ratio": True}, "ratio must lie above 0 and be at most 1, got True"),
        ("global_tokens", {"global_queries": "yes"}, "global_queries must be True or False, got 'yes'"),
        ("random", {"keys_per_query": 0}, "keys_per_query must be >= 1, got 0"),
        ("random", {"keys_per_query": 5000}, "keys_per_query must be at most 4096, got 5000"),
        ("random", {"keys_per_query": 8, "blocks": 2}, "got keys_per_query=8 and blocks=2; leave one out"),
        ("random", {"block": 32}, "block is the size of drawn blocks, got block=32; give blocks as well"),
        ("random", {"seed": -1}, "seed must be >= 0, got -1"),
        ("sparse_transformer_strided", {"heads": "some"}, "heads must be 'merged' or 'split', got 'some'"),
        (
            "sparse_transformer_fixed",
            {"summary": 9, "block": 8},
            "summary must be at most block, the tokens of a",
        ),
        ("sparse_transformer_fixed", {"summary": 0}, "summary must be >= 1, got 0"),
        ("bigbird", {"window_blocks": 0}, "window_blocks must be >= 1, got 0"),
        ("bigbird", {"random_blocks": 2**20}, "random_blocks must be at most 4096, got 1048576"),
        ("bigbird", {"global_blocks": 2**40}, "block * global_blocks must be at most 1099511627776"),
        ("grouped_heads", {"local_heads": 1.5}, "local_heads must be a whole number, got 1.5"),
        (
            "grouped_heads",
            {"global_token_ratio": -0.1},
            "global_token_ratio must lie above 0 and be at most 1",
        ),
        ("grouped_heads", {"min_window": 600}, "min_window must be at most max_window, got min_window=600"),
        ("multi_scale", {"scales": 41}, "scales must be at most 40, got 41"),
        ("multi_scale", {"scales": 40}, "window * 2**(scales - 1) must be at most 1099511627776"),
        ("shifted", {"group": 5}, "group must be even, to be shifted by half of it, got 5"),
        ("layered", {"dense_every": 1}, "dense_every must be >= 2, got 1"),
        ("layered", {"pattern": 5}, "pattern must hold patterns or their names, got 5"),
        ("layered", {"pattern": "fll"}, "unknown pattern 'fll'. Did you mean 'full'?"),
        ("layered", {"layers": 5}, "layers must be like {(0, 6): pattern, 11: 'full'}, got 5"),
        ("layered", {"layers": {}}, "layers names no layer, got []; name at least one"),
        ("layered", {"layers": {(3, 3): "full"}}, "(first, stop) with 0 <= first < stop <= 4096, got (3, 3)"),
        ("layered", {"layers": {-1: "full"}}, "0 <= first < stop <= 4096, got -1"),
        ("layered", {"layers": {"a": "full"}}, "0 <= first < stop <= 4096, got 'a'"),
        (
            "layered",
            {"layers": {range(0, 9999, 2): "full"}},
            "0 <= first < stop <= 4096, got range(0, 9999, 2)",
        ),
        (
            "layered",
            {"layers": {(0, 4): "full", 3: "strided"}},
            "layers gives layer 3 two patterns, full() and strided",
        ),
        ("layered", {"layers": {0: "full"}, "pattern": "full"}, "layers already says what every layer runs"),
        ("layered", {"layers": {0: "full"}, "dense_every": 2}, "dense_every=2 besides; leave them out"),
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
@given(name=st.sampled_from(static_patterns()), data=st.data())
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
    assert "mine" not in static_patterns() and Mine.name == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "dilated_window",
            {"dilation": (1, 2)},
            "dilation has 2 entries and the model has 4 query heads; give one",
        ),
        ("longformer", {"dilation": (1,) * 5}, "dilation has 5 entries and the model has 4 query heads"),
        (
            "longformer",
            {"window": (8, 8, 8)},
            "window has 3 entries and the model has 6 layers; give one entry per",
        ),
        (
            "grouped_heads",
            {"local_heads": 5},
            "local_heads=5 and global_heads=None do not add up to the 4 query heads",
        ),
        (
            "grouped_heads",
            {"local_heads": 2, "global_heads": 1},
            "local_heads=2 and global_heads=1 do not add up to",
        ),
        (
            "layered",
            {"layers": {(4, 8): "full"}},
            "layers 4 to 7 of the schedule do not fit a model whose last layer",
        ),
        (
            "layered",
            {"pattern": Longformer(window=(8, 8))},
            "window has 2 entries and the model has 6 layers",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_pattern(name, **options).check_fit(heads=4, layers=6)


@pytest.mark.parametrize("pattern", [Shifted(), SparseTransformerFixed(heads="split")], ids=str)
def test_one_head_cannot_be_split(pattern):
    pattern.check_fit(2, 1)
    with pytest.raises(ValueError, match="in two halves and needs at least 2, the model has 1"):
        pattern.check_fit(1, 1)


@pytest.mark.parametrize("name", static_patterns())
def test_default_options_fit_every_model_with_two_heads(name):
    for heads in (2, 3, 8):
        get_pattern(name).check_fit(heads, 1)
        assert isinstance(get_pattern(name).resolve(1000), Pattern)


def test_what_depends_on_the_direction_or_length_is_refused_as_soon_as_it_is_known():
    with pytest.raises(ValueError, match=r"window_blocks must be odd in a bidirectional.*got 4; use 5"):
        get_pattern("bigbird", window_blocks=4).mask(5, causal=False)
    assert get_pattern("bigbird", window_blocks=4, block=1).mask(5).all(0).tril().sum() == 15
    with pytest.raises(
        ValueError, match="global_blocks=3 is more than the 2 blocks of block=64 in seq_len=128"
    ):
        get_pattern("bigbird", global_blocks=3).resolve(128)
    assert get_pattern("bigbird").resolve(128) == get_pattern("bigbird")
