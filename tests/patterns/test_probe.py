"""A user's predicate is tried before a model runs it: what answers wrongly is refused with the answer it gave."""

import re
from dataclasses import dataclass

import pytest
import torch

from hf_sparse import (
    BigBird,
    Longformer,
    Pattern,
    PerHead,
    PerLayer,
    Random,
    SlidingWindow,
    available_patterns,
)
from hf_sparse import get_pattern as pattern_named
from hf_sparse.patterns import check_predicate
from hf_sparse.patterns.parts import Bound, Every, Listed, Part, window_part


def made(allows, parts=None):
    """A pattern from two functions."""

    @dataclass(frozen=True)
    class Mine(Pattern):
        def allows(self, context, head, query, key):
            return allows(context, head, query, key)

        def parts(self, context):
            return parts

        def __str__(self):
            return "mine"

    return Mine()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", available_patterns())
def test_every_pattern_of_the_catalogue_passes(name, causal):
    check_predicate(pattern_named(name), 4, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        Random(keys_per_query=3) | BigBird(block=4),
        PerHead((Random(blocks=2, block=8), Longformer(window=3, dilation=(1, 2, 1)), SlidingWindow(2))),
        PerLayer((PerHead((SlidingWindow(2), Longformer(window=(4, 9)), BigBird(block=4))), Random())),
    ],
    ids=["union", "per_head", "per_layer"],
)
def test_compositions_pass(pattern, causal):
    check_predicate(pattern, 3, causal)


@pytest.mark.parametrize(
    "allows",
    [
        lambda c, h, q, k: k < 3,  # [1, 1, K]
        lambda c, h, q, k: torch.tensor(True),
        lambda c, h, q, k: (k < h) | (q == k),
        lambda c, h, q, k: k > q,  # the caller removes the future
    ],
)
def test_predicates_may_return_any_shape_that_broadcasts(allows):
    check_predicate(made(allows), 4, True)


@pytest.mark.parametrize(
    ("allows", "message"),
    [
        (
            lambda c, h, q, k: (q - k) * 1.0,
            "mine returns a tensor of torch.float32 from allows; return a bool tensor",
        ),
        (lambda c, h, q, k: (q >= k).long(), "mine returns a tensor of torch.int64 from allows"),
        (lambda c, h, q, k: True, "mine returns bool from allows; return a bool tensor"),
        (lambda c, h, q, k: None, "mine returns NoneType from allows"),
        (
            lambda c, h, q, k: (q >= k)[0, :, :3],
            "mine returns shape [70, 3] from allows for head [4, 1, 1], query [1, 70, 1] and key [1, 1, 70]; return a "
            "shape that broadcasts to [4, 70, 70]",
        ),
        (lambda c, h, q, k: (q >= k)[None], "mine returns shape [1, 1, 70, 70]"),
        (lambda c, h, q, k: (q >= k).expand(5, -1, -1), "mine returns shape [5, 70, 70] from allows"),
        (
            lambda c, h, q, k: k > k.max() - 30,
            "mine answers True for query 0 and key 0 when asked about 16 x 16 positions, and False among 70 x 70; "
            "allows must look at each pair alone, not at shapes, maxima or other positions",
        ),
        (
            lambda c, h, q, k: k > k.shape[-1] - 9,
            "mine answers True for query 0 and key 8 when asked about 16 x 16",
        ),
        (
            lambda c, h, q, k: torch.zeros(4, 70, 70) > q - k,
            "mine raises RuntimeError in allows for head [4, 1, 1], query [1, 16, 1] and key [1, 1, 16]: The size of",
        ),
        (
            lambda c, h, q, k: (q >= k) & (q.numel() > 1),
            "mine answers False for query 67 and key 0 when asked about 1",
        ),
        (lambda c, h, q, k: (q >= k).any(-1, keepdim=True), "mine answers"),
        (
            lambda c, h, q, k: (q >= k) & (h.ndim == 3),
            "mine answers otherwise when asked for head [4, 1, 1, 1]",
        ),
    ],
)
def test_wrong_answers_are_refused(allows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_predicate(made(allows), 4, True)


def test_wrong_members_are_refused_wherever_they_are():
    wrong = made(lambda c, h, q, k: k > k.max() - 30)
    for pattern in (
        SlidingWindow(2) | wrong,
        PerHead((SlidingWindow(2), wrong)),
        PerLayer((SlidingWindow(2), wrong)),
    ):
        with pytest.raises(ValueError, match="allows must look at each pair alone"):
            check_predicate(pattern, 2, True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [window_part(3)],
            "mine has parts that hold query 2 and key 0 of head 0, which allows does not allow",
        ),
        (
            [window_part(1)],
            "mine has parts that miss query 1 and key 0 of head 0, which allows allows; make parts",
        ),
        ([Part(Every(), start=Bound(-1), stop=Bound(0))], "miss query 0 and key 0 of head 0"),
        ([Part(Every(), start=Bound(-1), stop=Bound(1), heads=(0, 2))], "miss query 0 and key 0 of head 1"),
    ],
)
def test_parts_that_are_not_allows_are_refused(parts, message):
    def allows(context, head, query, key):
        return (query - key).abs() < 2

    check_predicate(made(allows, [window_part(2)]), 3, False)
    check_predicate(made(allows, [Part(Every(), start=Bound(-1))]), 3, True)  # the caller removes the future
    with pytest.raises(ValueError, match=re.escape(message)):
        check_predicate(made(allows, parts), 3, True)


def test_what_depends_on_the_direction_is_found_before_a_model_runs():
    check_predicate(BigBird(window_blocks=2), 2, True)
    with pytest.raises(ValueError, match="window_blocks must be odd in a bidirectional model"):
        check_predicate(BigBird(window_blocks=2), 2, False)


@pytest.mark.parametrize(
    ("allows", "message"),
    [
        (lambda c, h, q, k: (q - k < 3) | ((k < 9) & (k.max() > 500)), "among 8 x 8; allows must look"),
        (
            lambda c, h, q, k: (q - k < 3) if int(q.max()) < 100 else (q - k < 5),
            "among 8 x 8; allows must look",
        ),
        (
            lambda c, h, q, k: q - k < 3 + (c.layer or 0),
            "context.layer without saying so; set per_layer = True",
        ),
        (
            lambda c, h, q, k: torch.isin(k, torch.tensor(c.chosen, dtype=torch.long)),
            "context.chosen without saying so; set takes_globals = True",
        ),
        (lambda c, h, q, k: q - k < c.length, "context.length is None in causal models"),
        (lambda c, h, q, k: q - k < (1, 2, 3)[len(h)], "check the length of its lists, 4 heads"),
    ],
)
def test_what_is_seen_only_far_away_or_without_being_declared_is_refused(allows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_predicate(made(allows), 4, True)


def test_an_answer_that_changes_with_the_number_of_calls_is_refused():
    calls = []

    def allows(context, head, query, key):
        calls.append(1)
        return query - key < 2 + len(calls) // 5

    with pytest.raises(ValueError, match="give the same answer every time"):
        check_predicate(made(allows), 2, True)


def test_every_layer_of_a_users_pattern_is_tried():
    @dataclass(frozen=True)
    class ByLayer(Pattern):
        windows: tuple[int, ...] = (2, 3, 4)
        per_layer = True

        def allows(self, context, head, query, key):
            return query - key < self.windows[context.layer]

    check_predicate(ByLayer(), 2, True, layers=3)
    with pytest.raises(ValueError, match="check the length of its lists, 2 heads and layer 3 are asked for"):
        check_predicate(ByLayer(), 2, True, layers=4)


def test_a_table_of_some_positions_is_no_mistake():
    table = torch.arange(128) % 7 == 0
    check_predicate(made(lambda c, h, q, k: table[k] & (q >= 0)), 2, True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("every key", "returns 'every key' from parts; return a list of Part, or None"),
        ((part for part in [window_part(3)]), "from parts; return a list of Part, or None"),
        ([Part("every key")], "whose keys are none of those in hf_sparse.patterns.parts"),
        ([window_part(3), Part(Listed((5, 2)))], "whose positions do not increase"),
        ([window_part(3), Part(Every(), stop=Bound(mul=-1))], "whose bounds decrease"),
        (
            [window_part(3), Part(Every(), stop=Bound(3), queries=Listed((1,)))],
            "whose queries do not see every key",
        ),
        ([Part(Every(), heads=(9,))], "whose heads are not ascending numbers below 3"),
    ],
)
def test_parts_that_no_plan_can_read_are_refused(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_predicate(made(lambda c, h, q, k: q - k < 3, parts), 3, True)
