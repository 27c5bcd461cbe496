"""Context extension: the extended model is the one transformers loads from the folder it is saved to."""

import copy
import json

import pytest
import torch
from tiny_models import logits as run
from tiny_models import random_model, tiny, tokens
from transformers import AutoConfig

import hf_sparse
from hf_sparse import extend_positions, patch_model, unpatch_model
from hf_sparse.hf import position_tables
from hf_sparse.hf.extension import extension_of, readable_tokens

LENGTH = 300
ROTARY = ("linear", "dynamic", "ntk", "yarn")
_NEOX = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_BERT = {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 130, "pad_token_id": 1}


def model_of(name):
    # 16 channels per head, a quarter of them rotated: the tiny model's 2 rotated channels have one frequency only
    return random_model("GPTNeoXForCausalLM", _NEOX) if name == "gpt_neox" else tiny(name)


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ROTARY)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "modernbert"])
def test_a_rotary_model_equals_the_one_loaded_from_its_folder(name, method, tmp_path):
    model, short, long = model_of(name), tokens(1, 100), tokens(1, LENGTH)
    before, trained = run(model, short), model.config.max_position_embeddings
    assert extend_positions(model, LENGTH, method) is model
    loaded = saved_and_loaded(model, tmp_path)
    for ids in (short, long):
        assert torch.equal(run(model, ids), run(loaded, ids))
    # "dynamic" is the model itself within its trained length; the others are another one everywhere
    assert torch.equal(run(extend_positions(model_of(name), LENGTH, method), short), before) == (
        method == "dynamic"
    )
    assert model.config.max_position_embeddings == (trained if method == "dynamic" else LENGTH)
    assert readable_tokens(model) == readable_tokens(loaded) == LENGTH
    assert extension_of(loaded) == extension_of(model)
    assert (extension_of(model).method, extension_of(model).length) == (method, LENGTH)


@pytest.mark.parametrize("method", ROTARY)
def test_the_settings_are_those_of_transformers(method, tmp_path):
    """A folder whose config was written by hand gives the same logits: the factors are the published ones."""
    trained, factor, size = 128, LENGTH / 128, 8
    by_hand = {
        "linear": {"rope_type": "linear", "factor": factor},
        "dynamic": {"rope_type": "dynamic", "factor": factor},
        "yarn": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained},
        "ntk": {"rope_type": "default", "rope_theta": 10000.0 * factor ** (size / (size - 2))},
    }[method]
    tiny("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = {"rope_theta": 10000.0, **by_hand}
    config.max_position_embeddings = trained if method == "dynamic" else LENGTH
    expected = type(tiny("llama")).from_pretrained(tmp_path, config=config).eval()
    model, ids = extend_positions(tiny("llama"), LENGTH, method), tokens(2, LENGTH)
    assert torch.equal(run(model, ids), run(expected, ids))
    assert not torch.equal(run(model, ids), run(tiny("llama"), ids))


def test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest():
    before = tiny("llama").model.rotary_emb.inv_freq
    after = extend_positions(tiny("llama"), 512, "ntk").model.rotary_emb.inv_freq
    torch.testing.assert_close(after[[0, -1]], before[[0, -1]] / torch.tensor([1.0, 4.0]))


def test_gemma_extends_only_the_layers_that_see_far():
    model = extend_positions(tiny("gemma3"), LENGTH, "linear")
    parameters = model.config.rope_parameters
    assert parameters["sliding_attention"]["rope_type"] == "default"
    assert parameters["full_attention"]["rope_type"] == "linear"
    rotary, plain = model.model.rotary_emb, tiny("gemma3").model.rotary_emb
    assert torch.equal(rotary.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
    torch.testing.assert_close(
        rotary.full_attention_inv_freq, plain.full_attention_inv_freq * 128 / LENGTH, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("name", "offset", "positions"),
    [("bert", 0, 130), ("roberta", 2, 128), ("gpt2", 0, 128), ("opt", 2, 130)],
)
def test_a_copied_table_equals_the_one_loaded_from_its_folder(name, offset, positions, tmp_path):
    model = tiny(name)
    short, long = tokens(2, positions), tokens(1, LENGTH)
    before, (table,) = run(model, short), position_tables(model)
    old = model.get_submodule(table).weight.detach().clone()
    assert len(old) == positions + offset
    extend_positions(model, LENGTH, "copy")
    assert torch.equal(run(model, short), before)
    new = model.get_submodule(table).weight
    assert model.get_submodule(table).num_embeddings == len(new)
    assert new.shape == (LENGTH + offset, old.shape[1]) and torch.equal(new[: len(old)], old)
    for i in range(LENGTH):
        assert torch.equal(new[offset + i], old[offset + i % positions])
    loaded = saved_and_loaded(model, tmp_path)
    assert torch.equal(run(model, long), run(loaded, long))
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    assert readable_tokens(model) == readable_tokens(loaded) == LENGTH
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored[{"gpt2": "n_positions"}.get(name, "max_position_embeddings")] == LENGTH + (
        offset if name == "roberta" else 0
    )
    assert position_tables(loaded) == [table] and position_tables(tiny("llama")) == []


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("CamembertForMaskedLM", _BERT),
        ("XLMRobertaForMaskedLM", _BERT),
        ("ElectraForMaskedLM", {**_BERT, "embedding_size": 32}),
        ("AlbertForMaskedLM", {**_BERT, "embedding_size": 16}),
        (
            "DistilBertForMaskedLM",
            {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 1},
        ),
    ],
)
def test_relatives_of_bert_are_extended_too(class_name, options, tmp_path):
    model, ids = random_model(class_name, options), tokens(1, 700)
    loaded = saved_and_loaded(extend_positions(model, 700, "copy"), tmp_path)
    assert torch.equal(run(model, ids), run(loaded, ids))


def test_rows_that_need_no_gradient_still_need_none_and_the_random_state_stays():
    model = tiny("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    state = torch.get_rng_state()
    extend_positions(model, LENGTH, "copy")
    assert not model.transformer.wpe.weight.requires_grad and model.transformer.wte.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_another_model_of_the_same_config_object_is_left_alone():
    config = tiny("llama").config
    one, other = (type(tiny("llama"))(config).eval() for _ in range(2))
    ids = tokens(1, LENGTH)
    before = run(other, ids)
    extend_positions(one, LENGTH, "dynamic")
    extend_positions(type(one)(config), LENGTH, "linear")
    assert torch.equal(run(other, ids), before)
    assert other.config.max_position_embeddings == 128 and extension_of(other) is None


def test_half_precision_keeps_the_frequencies_exact(tmp_path):
    model = extend_positions(tiny("llama").to(torch.bfloat16), LENGTH, "yarn")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(run(model, tokens(1, LENGTH)), run(loaded, tokens(1, LENGTH)))


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "linear"), ("llama", "yarn"), ("gpt2", "copy"), ("roberta", "copy")]
)
def test_extending_before_or_after_patching_is_the_same(name, method, tmp_path):
    ids = tokens(1, LENGTH)
    first = patch_model(extend_positions(tiny(name), LENGTH, method), "sliding_window", window=5)
    then = extend_positions(patch_model(tiny(name), "sliding_window", window=5), LENGTH, method)
    assert torch.equal(run(first, ids), run(then, ids))
    then.save_pretrained(tmp_path)
    loaded = hf_sparse.load(tmp_path)
    assert torch.equal(run(loaded, ids), run(first, ids)) and extension_of(loaded) == extension_of(first)
    assert torch.equal(run(unpatch_model(then), ids), run(extend_positions(tiny(name), LENGTH, method), ids))


@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    [
        ("llama", "linear", hf_sparse.ReRoPE(window=16)),
        ("llama", "yarn", hf_sparse.StreamingLLM(sinks=2, window=6, positions="cache")),
        ("gpt2", "copy", hf_sparse.StreamingLLM(sinks=2, window=6, positions="cache")),
    ],
)
def test_patterns_that_place_tokens_elsewhere_see_the_new_positions(name, method, pattern):
    ids = tokens(1, LENGTH)
    first = patch_model(extend_positions(tiny(name), LENGTH, method), pattern)
    then = extend_positions(patch_model(tiny(name), pattern), LENGTH, method)
    assert torch.equal(run(first, ids), run(then, ids))


def test_dynamic_and_a_pattern_that_turns_keys_refuse_each_other():
    model = patch_model(tiny("llama"), hf_sparse.ReRoPE(window=16))
    with pytest.raises(
        ValueError, match=r"'dynamic' changes the rotary frequencies .*; use linear, ntk or yarn"
    ):
        extend_positions(model, LENGTH, "dynamic")
    assert extension_of(model) is None and model.config.rope_parameters["rope_type"] == "default"
    with pytest.raises(ValueError, match=r"frequencies change with the length of the text \(dynamic\)"):
        patch_model(extend_positions(tiny("llama"), LENGTH, "dynamic"), hf_sparse.ReRoPE(window=16))


def test_an_extended_model_evaluates_up_to_its_new_length():
    from hf_sparse.evaluate.preparation import check_length, trained_length

    model = tiny("roberta")
    with pytest.raises(ValueError, match="length=300 is beyond the 128 positions"):
        check_length(model, LENGTH, "length")
    extend_positions(model, LENGTH, "copy")
    check_length(model, LENGTH, "length")
    assert trained_length(model) == LENGTH
    with pytest.raises(ValueError, match="length=301 is beyond the 300 positions"):
        check_length(model, LENGTH + 1, "length")


@pytest.mark.parametrize(
    ("name", "length", "method", "message"),
    [
        (
            "llama",
            LENGTH,
            "ntk2",
            "unknown method 'ntk2' of extending positions; use linear, dynamic, ntk, yarn for",
        ),
        (
            "llama",
            LENGTH,
            "copy",
            "LlamaForCausalLM has rotary positions, which 'copy' cannot extend; use linear or",
        ),
        ("opt", LENGTH, "yarn", "OPTForCausalLM has learned positions, which 'yarn' cannot extend; use copy"),
        ("llama", 128, "linear", "reads 128 tokens already, got length=128; extend it to more"),
        ("roberta", 128, "copy", "reads 128 tokens already, got length=128"),
        ("bert", "4096", "copy", "length must be a whole number of tokens, got '4096'"),
        ("bert", True, "copy", "length must be a whole number of tokens, got True"),
        ("gpt_neox", LENGTH, "ntk", "rotates 2 channels of each head, all at the highest frequency"),
        (
            "phi3",
            LENGTH,
            "yarn",
            "does not build Phi3Config with 'yarn' rotary positions .*; use another method",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused_and_left_alone(name, length, method, message):
    model = tiny(name)
    config, state = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        extend_positions(model, length, method)
    assert "\n" not in str(caught.value)
    assert model.config.to_dict() == config and extension_of(model) is None
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("class_name", "options", "message"),
    [
        (
            "BloomForCausalLM",
            {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4},
            "has neither rotary",
        ),
        ("FalconForCausalLM", {**_SMALL, "alibi": True}, "has neither rotary"),
        (
            "T5EncoderModel",
            {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_layers": 1},
            "has neither rotary",
        ),
        (
            "XGLMForCausalLM",
            {"vocab_size": 64, "d_model": 32, "num_layers": 1, "ffn_dim": 8},
            "has neither rotary",
        ),
        (
            "GPTNeoForCausalLM",
            {**_SMALL, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
            | {"num_hidden_layers": 1, "max_position_embeddings": 128},
            r"holds transformer\.h\.0\.attn\.attention\.bias for a fixed number of positions",
        ),
        ("PegasusForCausalLM", {"vocab_size": 64, "d_model": 32, "decoder_layers": 1}, "has neither rotary"),
        (
            "BartForConditionalGeneration",
            {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
            "has an encoder and a decoder",
        ),
        (
            "LlamaForCausalLM",
            {
                **_SMALL,
                "intermediate_size": 48,
                "max_position_embeddings": 256,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            r"are scaled already \(llama3, to 256 tokens\); use a length of at most 256",
        ),
    ],
)
def test_models_with_other_positions_are_refused(class_name, options, message):
    method = "linear" if class_name in ("LlamaForCausalLM", "FalconForCausalLM") else "copy"
    with pytest.raises(ValueError, match=message):
        extend_positions(random_model(class_name, options), 4096, method)


@pytest.mark.parametrize(("name", "method"), [("llama", "linear"), ("llama", "dynamic"), ("bert", "copy")])
def test_a_model_is_extended_once_also_after_loading(name, method, tmp_path):
    model = extend_positions(tiny(name), LENGTH, method)
    for one in (model, saved_and_loaded(model, tmp_path)):
        with pytest.raises(
            ValueError, match=rf"is extended to 300 tokens by '{method}' already; load the original"
        ):
            extend_positions(one, 600, method)


def test_a_model_without_weights_or_in_an_adapter_is_refused():
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        hollow = type(tiny("gpt2"))(tiny("gpt2").config)
    with pytest.raises(ValueError, match="has no weights in memory; load it without offloading"):
        extend_positions(hollow, LENGTH, "copy")
    with pytest.raises(ValueError, match="has an adapter on it; extend the base model before"):
        extend_positions(
            get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])), LENGTH, "linear"
        )
    with pytest.raises(ValueError, match="needs a transformers model, got Linear"):
        extend_positions(torch.nn.Linear(2, 2), LENGTH, "linear")


def test_a_config_with_a_record_that_makes_no_sense_is_refused():
    model = tiny("llama")
    for record in (
        {"method": "linear"},
        {"method": "x", "length": 300},
        {"method": "yarn", "length": "300"},
        [1],
    ):
        model.config.position_extension = record
        with pytest.raises(
            ValueError, match="the config of LlamaForCausalLM holds no usable extension of positions"
        ):
            readable_tokens(model)
