"""What is chosen for: heads, key-value heads, layers, and the pattern that a choice stands for."""

import numpy as np
import pytest
from tiny_models import random_model, tiny

from hf_sparse import Full, PerHead, PerLayer, SlidingWindow
from hf_sparse.calibrate.units import Units, units_of

from .trials import hybrid

A, B = Full(), SlidingWindow(3)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "size"),
    [
        ("llama", "head", (2, 4), 1),
        ("llama", "kv_head", (2, 2), 2),
        ("llama", "layer", (2, 1), 4),
        ("gpt2", "kv_head", (2, 4), 1),
        ("bert", "layer", (2, 1), 4),
    ],
)
def test_units_divide_the_heads_of_every_layer(name, kind, shape, size):
    units = units_of(tiny(name), kind)
    assert (units.shape, units.size, units.count) == (shape, size, shape[1])


def test_a_choice_is_the_pattern_of_its_units():
    units = Units("kv_head", (0, 1), 2, heads=4, kv_heads=2)
    chosen = units.pattern(np.array([[0, 1], [1, 1]]), (A, B))
    assert chosen == PerLayer((PerHead((A, A, B, B)), B))
    assert Units("head", (0,), 1, 3, 3).pattern(np.array([[0, 1, 0]]), (A, B)) == PerLayer(
        (PerHead((A, B, A)),)
    )
    assert Units("layer", (0, 1), 2, 4, 2).pattern(np.array([[1], [0]]), (A, B)) == PerLayer((B, A))


def test_only_layers_with_attention_have_units():
    units = units_of(hybrid(4), "head")
    assert (units.layers, units.of_layers, units.shape) == ((1, 3), 4, (2, 2))
    assert units.pattern(np.array([[0, 1], [1, 1]]), (A, B)) == PerLayer((A, PerHead((A, B)), A, B))
    assert units.name(1, 0) == "layer 3 head 0"


def test_names_say_what_is_meant():
    assert Units("kv_head", (0, 2), 3, 4, 2).name(1, 1) == "layer 2 kv-head 1"
    assert Units("layer", (0, 2), 3, 4, 2).name(1, 0) == "layer 2"


def test_unknown_units_and_models_without_heads_are_refused():
    with pytest.raises(ValueError, match=r"unit must be one of head, kv_head, layer, got 'neuron'"):
        units_of(tiny("llama"), "neuron")
    options = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention heads to choose for"):
        units_of(random_model("MambaForCausalLM", options), "head")


def test_layers_that_differ_in_key_heads_have_no_kv_head_units():
    model = tiny("llama")
    model.config.per_layer_config = {1: {"num_key_value_heads": 1}}
    with pytest.raises(
        ValueError, match=r"differ in their key-value heads \(\[1, 2\]\); use unit='head' or 'layer'"
    ):
        units_of(model, "kv_head")
    assert units_of(model, "layer").shape == (2, 1)
