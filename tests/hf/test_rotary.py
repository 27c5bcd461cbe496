"""Queries and keys turned to other positions are those that the model computes there."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from places_oracle import dense_with_places
from rotary_models import REFUSED, ROTATED, build
from tiny_models import DECODERS, logits, tiny, tokens

import hf_sparse
from hf_sparse import Full, Pattern, ReRoPE, SelfExtend, StreamingLLM
from hf_sparse.hf.attention import observed_inputs
from hf_sparse.hf.hooks import mask_owner
from hf_sparse.hf.positions import find_rotations, learned_positions, position_kind
from hf_sparse.patterns.places import Place, Places

LEARNED = ["gpt2", "opt"]
TURNED = [name for name in DECODERS if name not in LEARNED]
# The radians per token of the slowest channels of the two layers, None where a layer rotates nothing; the layout.
SLOWEST = {
    "llama": (1e-3, 1e-3, False),
    "gemma3": (1e-3, 1e6**-0.75, False),
    "linear": (1e-3 / 4, 1e-3 / 4, False),
    "stablelm": (1e-2, 1e-2, False),
    "phi": (1e-2, 1e-2, False),
    "cohere": (500_000**-0.75, 500_000**-0.75, True),
    "glm": (1e-2, 1e-2, True),
    "smollm3": (2_000_000**-0.75, None, False),
    "llama4": (500_000**-0.75, None, True),
}


def model_of(name):
    if name in ROTATED:
        return build(*ROTATED[name])
    return hf_sparse.patch_model(tiny(name), "full", backend="reference")


def inputs_at(model, positions):
    """Return query and key of each layer for tokens 7, 8, ... at these positions; no layer sees another's positions."""
    ids = torch.arange(7, 7 + len(positions))[None]
    with torch.no_grad(), observed_inputs() as seen:
        mask_owner(model)(input_ids=ids, position_ids=torch.tensor([positions]), use_cache=False)
    return [(query, key) for _, query, key in seen]


def assert_turned(model, before, after, tolerance, exactly=True):
    rotations = find_rotations(model)
    position = torch.tensor([before])
    shift = torch.tensor([after]) - position
    for layer, (old, new) in enumerate(zip(inputs_at(model, before), inputs_at(model, after), strict=True)):
        rotation = rotations[layer]
        for x, expected in zip(old, new, strict=True):
            if rotation is not None:
                x = rotation.turn(x, rotation.angles(shift, x, position if exactly else None))
            assert x.dtype == expected.dtype
            torch.testing.assert_close(x, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", [*TURNED, *ROTATED])
def test_what_is_turned_is_what_the_model_computes_there(name):
    model = model_of(name)
    assert position_kind(model) == "rotary"
    assert_turned(model, [0, 5, 40, 41], [3, 5, 1, 99], 2e-6)
    assert_turned(model, [0, 5, 40, 41], [3, 5, 1, 99], 2e-5, exactly=False)


@pytest.mark.parametrize("name", SLOWEST)
def test_each_layer_has_its_own_frequencies_and_layout(name):
    rotations = find_rotations(model_of(name))
    *slowest, interleaved = SLOWEST[name]
    for rotation, expected in zip(rotations.values(), slowest, strict=True):
        assert (rotation is None) == (expected is None)
        if rotation is not None:
            assert rotation.interleaved == interleaved
            assert rotation.frequencies[-1].item() == pytest.approx(expected, rel=1e-6)
    assert (rotations[0] is rotations[1]) == (slowest[0] == slowest[1])


def test_far_positions_are_as_exact_as_near_ones_where_it_is_said_where_they_are():
    model = model_of("llama")
    assert_turned(model, [200_000, 131_077], [1023, 12], 2e-6)
    with pytest.raises(AssertionError, match="not close"):
        assert_turned(model, [200_000, 131_077], [1023, 12], 1e-4, exactly=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "yarn", "cohere"])
def test_other_precisions(name, dtype, tolerance):
    assert_turned(model_of(name).to(dtype), [0, 5, 40], [3, 50, 1], tolerance)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dynamic", "frequencies change with the length of the text (dynamic)"),
        ("longrope", "frequencies change with the length of the text (longrope)"),
        ("mrope", "its tokens have three positions each (mrope)"),
        ("deepseek_v2", "it caches latents (MLA)"),
        ("hunyuan", "queries or keys of its layer 0 are not rotated by their position alone"),
    ],
)
def test_models_that_do_not_turn_are_refused_with_the_reason(name, reason):
    model = build(*REFUSED[name])
    for ask in (find_rotations, position_kind):
        with pytest.raises(ValueError) as refused:
            ask(model)
        assert reason in str(refused.value) and "with positions='absolute'" in str(refused.value)


def test_what_cannot_be_tried_is_refused():
    with pytest.raises(
        ValueError, match="it runs no pattern, so its queries and keys are not seen, patch it"
    ):
        find_rotations(tiny("llama"))
    model = model_of("llama")
    mask_owner(model).forward = lambda input_ids: None
    with pytest.raises(ValueError, match="its forward takes no position_ids"):
        find_rotations(model)
    assert learned_positions(model) is None
    with pytest.raises(ValueError, match="it has no weights yet"):
        find_rotations(tiny("llama").to("meta"))


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 128), ("opt", 130)])
def test_learned_positions_are_counted(name, positions):
    model = model_of(name)
    assert position_kind(model) == "learned" and learned_positions(model) == positions
    dense, last = tiny(name), torch.tensor([[positions - 1]])
    assert torch.isfinite(logits(dense, tokens(1, 1), position_ids=last)).all()
    with pytest.raises(IndexError):
        logits(dense, tokens(1, 1), position_ids=last + 1)
    with pytest.raises(ValueError, match="it adds learned positions to its embeddings"):
        find_rotations(model)
    assert learned_positions(model_of("llama")) is None and learned_positions(model_of("gemma3")) is None


def test_a_model_without_positions():
    class_name, options = ROTATED["smollm3"]
    model = build(class_name, {**options, "no_rope_layers": [0, 0]})
    assert find_rotations(model) == {0: None, 1: None} and position_kind(model) == "none"


def test_finding_rotations_leaves_the_model_as_it_was():
    for pattern in ("longformer", "streaming_llm"):
        model = hf_sparse.patch_model(tiny("gemma3"), pattern, backend="reference").train()
        ids, state = tokens(1, 9), torch.get_rng_state()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = logits(model.eval(), ids)
        rotations = find_rotations(model.train())
        assert model.training and torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert torch.equal(logits(model.eval(), ids), expected)
        for again in (copy.deepcopy(rotations), pickle.loads(pickle.dumps(rotations))):
            assert torch.equal(again[1].frequencies, rotations[1].frequencies)


N = 29
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Thirds(Pattern):
    """Every pair at the distance that position ids of p // 3 give."""

    def allows(self, context, head, query, key):
        return torch.ones_like(query == key)

    def places(self, layer):
        return Places(1, query=Place(div=3), key=Place(div=3))


@pytest.mark.parametrize("name", TURNED)
def test_the_oracle_is_the_dense_model_and_its_places_are_positions(name):
    ids = tokens(2, N)
    dense = logits(tiny(name, "eager"), ids)
    for pattern in (Full(), ReRoPE(window=N), SelfExtend(group=1, window=3), SelfExtend(group=4, window=N)):
        torch.testing.assert_close(dense_with_places(name, pattern, ids), dense, **CLOSE)
    thirds = logits(
        tiny(name, "eager"), ids, position_ids=torch.arange(N)[None] // 3, attention_mask=torch.ones_like(ids)
    )
    torch.testing.assert_close(dense_with_places(name, Thirds(), ids), thirds, **CLOSE)
    for pattern in (ReRoPE(window=3), SelfExtend(group=4, window=3), StreamingLLM(2, 4, positions="cache")):
        absolute = Full() if pattern.members else StreamingLLM(2, 4)
        moved = dense_with_places(name, pattern, ids) - dense_with_places(name, absolute, ids)
        assert moved[:, :3].abs().max() < 1e-5 and moved.abs().max() > 1e-3
