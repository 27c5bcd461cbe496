"""Every pattern comes back from JSON as it was, however nested; what was never written is refused."""

import json
import re

import pytest
from hypothesis import given, settings

from hf_sparse import GlobalTokens, Layered, Longformer, Pattern, PerHead, PerLayer, SlidingWindow, Strided
from hf_sparse.patterns import pattern_from_json, pattern_to_json

from .definitions import PATTERNS

A, B = SlidingWindow(window=2), Strided(stride=3)


@settings(max_examples=200, deadline=None)
@given(pattern=PATTERNS)
def test_any_pattern_survives_json(pattern):
    text = json.dumps(pattern_to_json(pattern))
    back = pattern_from_json(json.loads(text))
    assert back == pattern and hash(back) == hash(pattern)
    assert json.dumps(pattern_to_json(back)) == text


def test_the_forms_that_are_written():
    a, b = ({"name": p.name, "options": p.options()} for p in (A, B))
    assert pattern_to_json(A) == {"name": "sliding_window", "options": {"window": 2}}
    assert pattern_to_json(A | B) == {"union": [a, b]}
    assert pattern_to_json(PerHead((A, B))) == {"per_head": [a, b]}
    assert pattern_to_json(PerHead((A, B, A))) == {"per_head": {"patterns": [a, b], "heads": [0, 1, 0]}}
    assert pattern_to_json(PerLayer((A, A))) == {"per_layer": {"patterns": [a], "layers": [0, 0]}}
    assert pattern_to_json(PerLayer((PerHead((A, B)), A))) == {"per_layer": [{"per_head": [a, b]}, a]}
    assert pattern_to_json(Layered(layers={(0, 2): A | B}))["options"]["layers"] == [
        [0, 2, {"union": [a, b]}]
    ]
    assert pattern_from_json({"name": "full"}).name == "full"


def test_options_that_are_lists_come_back_as_tuples():
    for pattern in (Longformer((3, 4), (0, 9), (1, 2)), GlobalTokens((1, 2), (5,), ratio=0.25)):
        assert pattern_from_json(json.loads(json.dumps(pattern_to_json(pattern)))) == pattern


@pytest.mark.parametrize(
    "saved",
    [
        [],
        "full",
        None,
        {},
        {"options": {}},
        {"name": "full", "more": 1},
        {"union": []},
        {"union": "full"},
        {"per_head": []},
        {"per_head": "full"},
        {"per_head": {"patterns": [{"name": "full"}], "layers": [0]}},
        {"per_head": {"patterns": [{"name": "full"}], "heads": []}},
        {"per_head": {"patterns": [{"name": "full"}], "heads": [1]}},
        {"per_head": {"patterns": [{"name": "full"}], "heads": [-1]}},
        {"per_layer": {"patterns": [{"name": "full"}], "layers": [True]}},
        {"per_layer": {"patterns": {"name": "full"}, "layers": [0]}},
        {"per_layer": [{"name": "full"}], "union": []},
    ],
)
def test_what_was_never_written_is_refused(saved):
    with pytest.raises(ValueError, match=r"a saved pattern.* must be .*patch the model again"):
        pattern_from_json(saved)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"name": "ful"}, "unknown pattern 'ful'. Did you mean 'full'?"),
        ({"name": "full", "options": [1]}, "the options of the saved pattern 'full' must be a dict, got [1]"),
        ({"name": "full", "options": []}, "the options of the saved pattern 'full' must be a dict, got []"),
        ({"name": "mine"}, "known after hf_sparse.load_plugin('FILE.py')"),
        ({"union": [{"name": "strided", "options": {"stride": 0}}]}, "stride must be >= 1, got 0"),
        ({"name": "layered", "options": {"pattern": {"name": "ful"}}}, "unknown pattern 'ful'"),
    ],
)
def test_what_this_installation_does_not_know_is_refused(saved, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pattern_from_json(saved)


def test_patterns_that_would_come_back_as_another_are_refused():
    class Mine(SlidingWindow):
        pass

    class Unnamed(Pattern):
        pass

    for pattern in (
        Mine(),
        A | Mine(),
        PerHead((A, Unnamed())),
        PerLayer((Mine(), A)),
        Layered(pattern=Mine()),
    ):
        with pytest.raises(ValueError, match="has no name of its own to be saved under; decorate it with"):
            json.dumps(pattern_to_json(pattern))
