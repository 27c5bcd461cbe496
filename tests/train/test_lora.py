import copy

import pytest
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from hf_sparse.train import AdaptationArguments, add_lora
from hf_sparse.train.lora import attention_targets, norm_names

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
QKVO = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
EXPECTED = {
    "llama": (LlamaConfig(**SMALL), QKVO, {"input_layernorm", "post_attention_layernorm", "norm"}),
    "qwen3": (
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
        QKVO,
        {"input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"},
    ),
    "gemma3": (
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8),
        QKVO,
        {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
            "q_norm",
            "k_norm",
        },
    ),
    "phi3": (
        Phi3Config(**SMALL),
        {"self_attn.qkv_proj", "self_attn.o_proj"},
        {"input_layernorm", "post_attention_layernorm", "norm"},
    ),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        {"attn.c_attn", "attn.c_proj"},
        {"ln_1", "ln_2", "ln_f"},
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SMALL),
        {"attention.query_key_value", "attention.dense"},
        {"input_layernorm", "post_attention_layernorm", "final_layer_norm"},
    ),
    "opt": (
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
        {"self_attn_layer_norm", "final_layer_norm"},
    ),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_lora_goes_to_the_attention_and_the_norms_train_in_full(family):
    config, targets, norms = EXPECTED[family]
    model = Auto.from_config(config)
    assert set(attention_targets(model)) == targets
    assert set(norm_names(model)) == norms
    adapted = add_lora(model, AdaptationArguments(lora_r=2))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    lora = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert len(lora) == len(targets) * config.num_hidden_layers
    others = {
        name.split(".modules_to_save.")[0].rpartition(".")[2] for name in trained if ".lora_" not in name
    }
    assert others == norms
    assert all(".modules_to_save." in name for name in trained if ".lora_" not in name)


def test_norms_may_stay_frozen_and_targets_be_named():
    model = Auto.from_config(EXPECTED["llama"][0])
    adapted = add_lora(model, AdaptationArguments(lora_r=2, train_norms=False, lora_targets=["down_proj"]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("mlp.down_proj.lora_" in name for name in trained)


def test_all_linear_reaches_the_feed_forward_layers():
    adapted = add_lora(
        Auto.from_config(EXPECTED["llama"][0]), AdaptationArguments(lora_targets=["all-linear"])
    )
    assert any("mlp.gate_proj.lora_A" in name for name, _ in adapted.named_parameters())


def test_a_target_that_is_no_linear_layer_is_refused():
    model = Auto.from_config(EXPECTED["llama"][0])
    with pytest.raises(
        ValueError, match=r"lora_targets names 'qproj', which is no linear layer .* self_attn\.q_proj"
    ):
        add_lora(model, AdaptationArguments(lora_targets=["qproj"]))


def test_a_head_that_is_tied_to_the_embeddings_is_no_target():
    config = copy.deepcopy(EXPECTED["llama"][0])
    named = AdaptationArguments(lora_targets=["q_proj", "lm_head"], train_norms=False)
    assert "lm_head" in add_lora(Auto.from_config(config), named).peft_config["default"].target_modules
    config.tie_word_embeddings = True
    with pytest.raises(
        ValueError, match=r"names lm_head, the head of LlamaForCausalLM whose weight .* share"
    ):
        add_lora(Auto.from_config(config), named)
