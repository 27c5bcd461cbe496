"""A pattern as some of its heads see it is the pattern's own mask in those heads."""

import pytest
import torch

from hf_sparse import (
    BigBird,
    Full,
    GroupedHeads,
    Layered,
    Longformer,
    PerHead,
    PerLayer,
    Random,
    SlidingWindow,
    SparseTransformerStrided,
    Strided,
)
from hf_sparse.patterns.base import Context
from hf_sparse.patterns.probe import parts_mask
from hf_sparse.patterns.selected_heads import SelectedHeads, of_heads, of_layer

HEADS, LENGTH = 8, 40
RING = SlidingWindow(3)
SOME = [(0,), (1, 2, 5), (4, 5, 6, 7), tuple(range(HEADS))]
PATTERNS = [
    PerHead((Full(), RING, RING, Strided(4), Full(), RING, RING, RING)),
    GroupedHeads(local_heads=5, window=4, global_token_ratio=0.25, adaptive_window=False),
    GroupedHeads(window=4, global_token_ratio=0.25, adaptive_window=False),
    SparseTransformerStrided(stride=4, heads="split"),
    Longformer(window=3, global_tokens=(0,), dilation=(1, 1, 2, 2, 1, 3, 3, 3)),
    Random(keys_per_query=4),
    BigBird(block=4),
    PerHead((Random(keys_per_query=4),) * 4 + (RING,) * 4),
]


@pytest.mark.parametrize("heads", SOME, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_selected_heads_see_what_they_see_among_all(pattern, heads):
    expected = pattern.mask(LENGTH, heads=HEADS)[list(heads)]
    for made in (SelectedHeads(pattern, heads, HEADS), of_heads(pattern, heads, HEADS)):
        assert torch.equal(made.mask(LENGTH, heads=len(heads)), expected)
        context = Context(layer=0, heads=len(heads))
        own = parts_mask(made.parts(context), len(heads), LENGTH) & torch.ones(LENGTH, LENGTH).tril().bool()
        assert torch.equal(own, expected)


def test_what_heads_have_in_common_is_told_as_simply_as_it_can_be():
    pattern = PATTERNS[0]
    assert of_heads(pattern, (1, 2, 5), HEADS) == RING
    assert (
        of_heads(PerHead((pattern,) * HEADS), (0, 4), HEADS) != pattern
    )  # which speaks of heads 0 and 1 there
    assert of_heads(pattern, tuple(range(HEADS)), HEADS) is pattern


def test_a_layer_of_patterns_per_layer_is_its_own():
    nested = PerLayer((RING, Layered(pattern=RING, dense_every=2)))
    assert [of_layer(nested, layer) for layer in (0, 1)] == [RING, Full()]
    assert of_layer(PATTERNS[0], 3) is PATTERNS[0]
