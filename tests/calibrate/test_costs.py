"""Costs of choices are what the plan, the recorder and the cache say of the patched model."""

import numpy as np
import pytest
import torch
from tiny_models import random_model, tiny, tokens

from hf_sparse import (
    BigBird,
    Full,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    make_cache,
    patch_model,
    recording,
)
from hf_sparse.calibrate import timing
from hf_sparse.calibrate.costs import Costs, density_costs, kv_byte_costs
from hf_sparse.calibrate.units import units_of

CANDIDATES = (
    Full(),
    SlidingWindow(3),
    StreamingLLM(sinks=1, window=5),
    SparseTransformerFixed(block=6, summary=2),
)
N = 31


def choice_of(units, candidates=CANDIDATES, seed=0):
    return np.random.default_rng(seed).integers(0, len(candidates), units.shape)


@pytest.mark.parametrize("kind", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bert", "modernbert"])
def test_density_is_what_a_forward_pass_computes(name, kind):
    model = tiny(name)
    units = units_of(model, kind)
    costs = density_costs(model, units, CANDIDATES, N)
    assert costs.of(np.zeros(units.shape, int)) == pytest.approx(1)
    for seed in range(2):
        choice = choice_of(units, seed=seed)
        patch_model(model, units.pattern(choice, CANDIDATES))
        with recording() as recorder, torch.no_grad():
            model(input_ids=tokens(1, N))
        assert costs.of(choice) == pytest.approx(recorder.density, rel=1e-6)


def test_density_of_blocks_that_are_drawn_is_exact_where_a_layer_is_whole():
    model = tiny("llama")
    candidates = (Full(), BigBird(block=2, window_blocks=3, global_blocks=1, random_blocks=1))
    units = units_of(model, "layer")
    costs = density_costs(model, units, candidates, N)
    patch_model(model, units.pattern(np.array([[1], [0]]), candidates))
    with recording() as recorder, torch.no_grad():
        model(input_ids=tokens(1, N))
    assert costs.of(np.array([[1], [0]])) == pytest.approx(recorder.density, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "kv_head"), ("llama", "layer"), ("gpt2", "head"), ("qwen3", "kv_head"), ("mistral", "layer")],
)
def test_kv_bytes_are_those_of_the_cache(name, kind):
    model = tiny(name)
    units = units_of(model, kind)
    costs = kv_byte_costs(model, units, CANDIDATES, N)
    for seed in range(3):
        choice = choice_of(units, seed=seed)
        patch_model(model, units.pattern(choice, CANDIDATES))
        cache = make_cache(model)
        with torch.no_grad():
            model(input_ids=tokens(1, N), past_key_values=cache, use_cache=True)
        assert round(costs.of(choice) * costs.dense) == cache.nbytes


def test_kv_bytes_refuse_units_without_keys_of_their_own():
    llama, bert = tiny("llama"), tiny("bert")
    message = "4 query heads share 2 key-value heads here; use unit='kv_head'"
    with pytest.raises(ValueError, match=message):
        kv_byte_costs(llama, units_of(llama, "head"), CANDIDATES, N)
    with pytest.raises(ValueError, match="BertForMaskedLM is an encoder; use of='density'"):
        kv_byte_costs(bert, units_of(bert, "head"), CANDIDATES, N)


def test_kv_bytes_refuse_layers_whose_keys_are_no_ones_own():
    options = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 4, "q_lora_rank": 4}
    options |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1}
    options |= {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "n_group": 1,
        "topk_group": 1,
    }
    model = random_model("DeepseekV3ForCausalLM", options)
    with pytest.raises(ValueError, match="do not each hold keys of their own"):
        kv_byte_costs(model, units_of(model, "kv_head"), CANDIDATES, N)


def test_shares_say_what_is_cheapest_and_how_open_each_candidate_is():
    shares = np.array([[[0.4, 0.1, 0.2]], [[0.6, 0.6, 0.6]]])
    costs = Costs("density", 9, shares, 5.0)
    assert costs.cheapest.tolist() == [[1], [0]]
    assert costs.openness.round(6).tolist() == [[[1.0, 0.0, 0.333333]], [[1.0, 1.0, 1.0]]]
    assert costs.of(np.array([[2], [1]])) == pytest.approx(0.8)
    same = Costs.from_json(costs.as_json())
    assert (same.shares == costs.shares).all() and (same.measure, same.tokens, same.dense, same.mixed) == (
        "density",
        9,
        5.0,
        0.0,
    )


class Clock:
    """Seconds of a machine on which a pair takes 1 us, the rest of the model 1 ms, and a mixed layer 0.1 ms more."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.asked = model, tokens, []

    def __call__(self, model, patterns, tokens, measure, backend, progress=False):
        self.asked += [(pattern, tokens, measure, backend) for pattern in patterns]
        return [self.seconds(pattern) for pattern in patterns]

    def seconds(self, pattern):
        patch_model(self.model, pattern)
        with recording() as recorder, torch.no_grad():
            self.model(input_ids=tokens(1, self.tokens))
        mixed = sum(len(getattr(layer, "patterns", ())) > 1 for layer in pattern.patterns)
        return 1e-3 + 1e-6 * sum(call.pairs for call in recorder.calls) + 1e-4 * mixed


def test_times_between_those_measured_follow_the_pairs(monkeypatch):
    model = tiny("llama")
    units = units_of(model, "head")
    clock = Clock(tiny("llama"), N)
    monkeypatch.setattr(timing, "measure_seconds", clock)
    costs = timing.time_costs(model, units, CANDIDATES, N, measure="prefill", backend="torch")
    assert len(clock.asked) == 2 * len(CANDIDATES) - 1
    assert {asked[1:] for asked in clock.asked} == {(N, "prefill", "torch")}
    for number in range(len(CANDIDATES)):
        assert costs.of(np.full(units.shape, number)) * costs.dense == pytest.approx(
            clock.seconds(units.pattern(np.full(units.shape, number), CANDIDATES)), rel=1e-6
        )
    for seed in range(3):
        choice = choice_of(units, seed=seed)
        assert costs.of(choice) * costs.dense == pytest.approx(
            clock.seconds(units.pattern(choice, CANDIDATES)), rel=1e-6
        )
    assert costs.mixed * costs.dense == pytest.approx(1e-4)


def test_layers_as_units_are_never_mixed(monkeypatch):
    model = tiny("llama")
    clock = Clock(tiny("llama"), N)
    monkeypatch.setattr(timing, "measure_seconds", clock)
    costs = timing.time_costs(
        model, units_of(model, "layer"), CANDIDATES, N, measure="decode", backend="auto"
    )
    assert costs.mixed == 0 and len(clock.asked) == len(CANDIDATES)


def test_a_candidate_that_is_slower_than_dense_costs_more(monkeypatch):
    model = tiny("llama")
    units = units_of(model, "layer")
    monkeypatch.setattr(timing, "measure_seconds", lambda *_: [1.0, 1.5, 0.5, 0.75])
    costs = timing.time_costs(model, units, CANDIDATES, N, measure="prefill", backend="auto")
    assert [costs.of(np.full((2, 1), number)) for number in range(4)] == pytest.approx([1, 1.5, 0.5, 0.75])
    assert costs.cheapest.tolist() == [[2], [2]]


@pytest.mark.parametrize(
    ("name", "measure"), [("llama", "prefill"), ("llama", "decode"), ("gpt2", "decode"), ("bert", "prefill")]
)
def test_seconds_are_measured_on_the_model_itself(name, measure, monkeypatch):
    ticks = iter(range(1, 10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    model = tiny(name)
    units = units_of(model, "head")
    lengths = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    patterns = [units.pattern(np.full(units.shape, number), CANDIDATES) for number in (0, 1)]
    assert timing.measure_seconds(model, patterns, N, measure, "auto") == [1.0, 1.0]
    turns = timing.REPEATS + 1
    if measure == "decode":
        assert lengths.count(N) == 2 and lengths.count(1) == 2 * turns * timing.STEPS
    else:
        assert lengths.count(N) == 2 * turns and lengths.count(1) == 0
    assert not hasattr(model.config, "sparse_attention")


def test_what_cannot_be_timed_is_refused_beforehand():
    with pytest.raises(ValueError, match="BertForMaskedLM is an encoder; use of='prefill'"):
        timing.check_timed(tiny("bert"), "decode", 9)
    with pytest.raises(ValueError, match="tokens=129 is beyond the 128 positions of GPT2LMHeadModel"):
        timing.check_timed(tiny("gpt2"), "prefill", 129)
    with pytest.raises(ValueError, match=r"tokens \+ 96 decoded=129 is beyond the 128 positions"):
        timing.check_timed(tiny("gpt2"), "decode", 33)
    timing.check_timed(tiny("llama"), "decode", 5000)
    timing.check_timed(tiny("gpt2"), "decode", 32)
