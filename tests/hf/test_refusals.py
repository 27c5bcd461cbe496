"""What cannot be patched says so in one sentence and stays as it was."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from tiny_models import logits, tiny, tokens

import hf_sparse
from hf_sparse.hf import settings
from hf_sparse.patterns.registry import forget_patterns

# class, options: architectures whose attention does not go through transformers' interface, or not honestly
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_SMALL |= {"max_position_embeddings": 64}
UNROUTED = {
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "GPTJForCausalLM": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 64,
    },
    "GPTNeoForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "MptForCausalLM": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "LongformerForMaskedLM": {**_SMALL, "attention_window": [4, 4]},
    "DebertaV2ForMaskedLM": _SMALL,
    "MPNetForMaskedLM": _SMALL,
    "LayoutLMForMaskedLM": _SMALL,
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "T5ForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    },
    "DogeForCausalLM": {**_SMALL, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", UNROUTED)
def test_an_unrouted_architecture_is_refused_by_name_and_left_alone(name):
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**UNROUTED[name])).train()
    config, held = model.config.to_dict(), model.config
    implementation = model.config._attn_implementation
    random, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"{name} cannot be patched: (it|a trial forward of 4 tokens failed)"
    ):
        hf_sparse.patch_model(model, "sliding_window", window=4)
    assert model.config is held and model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_of_a_model_whose_layers_do_not_know_their_place_are_refused():
    options = {
        "vocab_size": 64,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
    }
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**options))
    with pytest.raises(ValueError, match=r"does not know which layer it is, so layers=\[0\]"):
        hf_sparse.patch_model(model, "sliding_window", window=4, layers=[0])
    assert settings(hf_sparse.patch_model(model, "sliding_window", window=4)).layers is None


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "gpt2", None], ids=["module", "name", "none"])
def test_something_that_is_no_transformers_model_is_refused(model):
    with pytest.raises(ValueError, match="needs a transformers model, got"):
        hf_sparse.patch_model(model, "sliding_window")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "slidingwindow"}, "unknown pattern 'slidingwindow'. Did you mean 'sliding_window'"),
        ({"pattern": "sliding_window", "window": 0}, "window must be >= 1"),
        ({"pattern": "sliding_window", "windows": 4}, "windows"),
        ({"pattern": "streaming_llm", "sinks": -1}, "sinks"),
        ({"pattern": "strided", "stride": 0}, "stride must be >= 1"),
        ({"pattern": hf_sparse.SlidingWindow(4), "window": 4}, "options window go with a pattern name"),
        ({"pattern": 7}, "pattern must be a name or a Pattern object"),
        ({"pattern": "full", "backend": "cuda"}, "unknown backend 'cuda'"),
        (
            {"pattern": "full", "layers": [2]},
            "layers must hold indices from 0 to 1 of LlamaForCausalLM, got 2",
        ),
        ({"pattern": "full", "layers": [-1]}, "got -1"),
        ({"pattern": "full", "layers": [True]}, "got True"),
        ({"pattern": "full", "layers": "01"}, "layers must be a list"),
        ({"pattern": "full", "layers": 1}, "layers must be a list"),
        ({"pattern": "full", "layers": []}, "layers is empty"),
        ({"pattern": "full", "seq_len": 0}, "seq_len must be a whole number of tokens >= 1, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_argument_is_refused_before_anything_changes(arguments, message):
    model = tiny("llama")
    config = model.config
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        hf_sparse.patch_model(model, **arguments)
    assert model.config is config and config._attn_implementation == "sdpa"
    assert not hasattr(config, "sparse_attention")


def test_a_failed_second_patch_keeps_the_first():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    ids = tokens(1, 12)
    before, saved = logits(model, ids), dict(model.config.sparse_attention)
    with pytest.raises(ValueError, match="unknown pattern"):
        hf_sparse.patch_model(model, "nothing")
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: (
        args[0] if args else kwargs["hidden_states"],
        None,
    )
    with pytest.raises(ValueError, match="only 1 of its 2 attention layers"):
        hf_sparse.patch_model(model, "strided", stride=3)
    del model.model.layers[1].self_attn.forward
    assert model.config.sparse_attention == saved
    assert torch.equal(logits(model, ids), before)


def test_an_unregistered_pattern_is_refused():
    class Mine(hf_sparse.SlidingWindow):
        name = ""

    with pytest.raises(ValueError, match=r"Mine has no name of its own .* @hf_sparse\.register_pattern"):
        hf_sparse.patch_model(tiny("llama"), Mine(4))


@pytest.fixture
def listing():
    """A registered pattern whose option may be anything."""

    @hf_sparse.register_pattern("listing")
    @dataclass(frozen=True)
    class Listing(hf_sparse.Pattern):
        places: Any = None

        def allows(self, context, head, query, key):
            return query - key < 3

    yield Listing
    forget_patterns(["listing"])


def test_options_that_cannot_be_kept_or_found_are_refused_when_patching(listing):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"listing\(places=\[3\]\) cannot be hashed .*into tuples"):
        hf_sparse.patch_model(model, listing([3]))
    with pytest.raises(ValueError, match="cannot be hashed"):
        hf_sparse.SlidingWindow(3) | listing([3])
    with pytest.raises(ValueError, match=r"is not plain JSON .*make every option a number, a word"):
        hf_sparse.patch_model(model, listing(torch.ones(2)))
    with pytest.raises(ValueError, match="are not the same after being saved as JSON"):
        hf_sparse.patch_model(model, listing(float("nan")))
    with pytest.raises(ValueError, match="token_ids holds 64, and the vocabulary of the model ends at 63"):
        hf_sparse.patch_model(model, "global_tokens", token_ids=(5, 64))
    with pytest.raises(ValueError, match="which pattern='layered' does, and 'strided' is named besides"):
        hf_sparse.patch_model(model, "strided", layers={0: "full"})
    with pytest.raises(ValueError, match=f"seed must be at most {2**63 - 1}, got {2**63}$"):
        hf_sparse.patch_model(model, "bigbird", seed=2**63)
    assert hf_sparse.describe(model) == "LlamaForCausalLM: dense attention ('sdpa')"
    hf_sparse.patch_model(model, "bigbird", seed=2**63 - 1)
