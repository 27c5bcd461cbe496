"""Models with an encoder: the decoder's attention to itself runs the pattern, everything else stays as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from encoder_decoder_models import (
    CLASSES,
    CLOSE,
    PATTERNS,
    SIZES,
    N,
    both_inputs,
    logits,
    randomized,
    tiny_pair,
    written_mask,
)
from tiny_models import VOCAB, tokens
from transformers.modeling_outputs import BaseModelOutput

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM
from hf_sparse.hf.attention import sparse_attention
from hf_sparse.hf.dense import DenseMask, stays_dense


@pytest.mark.parametrize("name", CLASSES)
def test_a_window_as_long_as_the_text_gives_the_unpatched_model(name):
    model, inputs = tiny_pair(name), both_inputs()
    config, implementation = model.config.to_dict(), model.config._attn_implementation
    with torch.no_grad():
        dense = model(**inputs)
        wide = hf_sparse.patch_model(model, "sliding_window", window=N)(**inputs)
        torch.testing.assert_close(wide.logits, dense.logits, **CLOSE)
        narrow = hf_sparse.patch_model(model, "sliding_window", window=3)(**inputs)
        assert torch.equal(narrow.encoder_last_hidden_state, dense.encoder_last_hidden_state)
        assert (narrow.logits - dense.logits).abs().max() > 1e-2
        hf_sparse.unpatch_model(model)
        assert torch.equal(model(**inputs).logits, dense.logits)
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_decoder_attends_under_the_written_mask(name, pattern, side):
    inputs = both_inputs()
    real = torch.ones(2, N, dtype=torch.long)
    if side != "none":
        real[1, slice(0, 6) if side == "left" else slice(N - 6, N)] = 0
    expected = logits(tiny_pair(name, "eager"), **inputs, decoder_attention_mask=written_mask(pattern, real))
    sparse = hf_sparse.patch_model(tiny_pair(name), pattern)
    got = logits(sparse, **inputs, decoder_attention_mask=real)
    torch.testing.assert_close(got[real == 1], expected[real == 1], **CLOSE)
    if side == "none":
        torch.testing.assert_close(logits(sparse, **inputs), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["bart", "marian"])
def test_gradients_of_a_loss_are_those_of_eager_attention(name, checkpointed):
    pattern, inputs = StreamingLLM(sinks=1, window=4), both_inputs()
    inputs["labels"] = tokens(2, N, seed=3)
    eager, sparse = tiny_pair(name, "eager"), hf_sparse.patch_model(tiny_pair(name), pattern)
    for model in (eager, sparse):
        model.train()
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
    if checkpointed:
        sparse.gradient_checkpointing_enable({"use_reentrant": False})
    mask = written_mask(pattern, torch.ones(2, N))
    expected = eager(**inputs, decoder_attention_mask=mask).loss
    loss = sparse(**inputs, use_cache=False).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    for each in (expected, loss):
        each.backward()
    theirs = dict(eager.named_parameters())
    for parameter_name, parameter in sparse.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[parameter_name].grad, **CLOSE)


def test_weights_are_those_of_eager_attention():
    pattern, inputs = Longformer(window=3, global_tokens=(0,)), both_inputs()
    mask = written_mask(pattern, torch.ones(2, N))
    eager, sparse = tiny_pair("bart", "eager"), hf_sparse.patch_model(tiny_pair("bart"), pattern)
    with torch.no_grad():
        expected = eager(**inputs, decoder_attention_mask=mask, output_attentions=True)
        got = sparse(**inputs, output_attentions=True)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(got[kind]) == len(expected[kind]) > 0
        for ours, theirs in zip(got[kind], expected[kind], strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(got.logits, logits(sparse, **inputs))


def test_saved_and_loaded_it_runs_the_same_pattern(tmp_path):
    inputs, model = (
        both_inputs(),
        hf_sparse.patch_model(tiny_pair("bart"), "streaming_llm", sinks=2, window=4),
    )
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf_sparse.load(tmp_path), **inputs), expected)
    named = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, attn_implementation="sparse_streaming_llm"
    )
    assert torch.equal(logits(named.eval(), **inputs), expected)


def test_an_implementation_named_in_the_config_makes_the_decoder_sparse():
    inputs = both_inputs()
    named = tiny_pair("marian", "sparse_sliding_window")
    narrow = tiny_pair("marian", "eager")
    window = hf_sparse.get_pattern("sliding_window")
    expected = logits(narrow, **inputs, decoder_attention_mask=written_mask(window, torch.ones(2, N)))
    torch.testing.assert_close(logits(named, **inputs), expected, **CLOSE)


def test_layers_and_heads_are_those_of_the_decoder():
    heads = tuple(SlidingWindow(window) for window in (3, 5, 7, 9))
    model = hf_sparse.patch_model(tiny_pair("bart"), hf_sparse.PerHead(heads), layers=[1])
    text = hf_sparse.describe(model, seq_len=64)
    assert "1 of 2 sparse (1); the others dense" in text
    assert "encoder   dense, and so is attention across to it" in text
    with pytest.raises(ValueError, match=r"layers must hold indices from 0 to 1 of Bart\w+, got 2"):
        hf_sparse.patch_model(model, "sliding_window", layers=[2])
    with pytest.raises(ValueError, match="4"):
        hf_sparse.patch_model(model, hf_sparse.PerHead(heads[:2]))


@pytest.mark.parametrize("task", ["SequenceClassification", "QuestionAnswering"])
def test_models_that_read_with_a_decoder_run_the_pattern(task):
    torch.manual_seed(0)
    config = transformers.BartConfig(**{**SIZES, "eos_token_id": 3})
    model = randomized(getattr(transformers, f"BartFor{task}")(config))
    ids = tokens(2, N)
    ids[:, -1] = 3
    with torch.no_grad():
        dense = model(ids)[0]
        torch.testing.assert_close(
            hf_sparse.patch_model(model, "sliding_window", window=N)(ids)[0], dense, **CLOSE
        )
        assert (hf_sparse.patch_model(model, "sliding_window", window=3)(ids)[0] - dense).abs().max() > 1e-3


def test_whisper_hears_densely_and_writes_sparsely():
    sizes = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}
    sizes |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}
    config = transformers.WhisperConfig(**sizes, suppress_tokens=None, begin_suppress_tokens=None)
    torch.manual_seed(0)
    dense = randomized(transformers.WhisperForConditionalGeneration(config))
    sparse = hf_sparse.patch_model(copy.deepcopy(dense), "sliding_window", window=4)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(2, N)}
    mask = written_mask(SlidingWindow(4), torch.ones(2, N))
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(
            sparse(**inputs).logits, dense(**inputs, decoder_attention_mask=mask).logits, **CLOSE
        )
    assert "at 64 tokens" in hf_sparse.describe(sparse)


@pytest.mark.parametrize("composite", [False, True], ids=["gpt2", "vision-encoder-decoder"])
def test_a_decoder_only_class_with_cross_attention_runs_the_pattern(composite):
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True
    )
    torch.manual_seed(0)
    if composite:
        sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24}
        vit = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
        model = transformers.VisionEncoderDecoderModel(config)
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": tokens(2, N)}
    else:
        model = transformers.GPT2LMHeadModel(gpt2)
        inputs = {"input_ids": tokens(2, N), "encoder_hidden_states": torch.randn(2, 5, 32)}
    model = randomized(model)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    mask = {
        ("decoder_" if composite else "") + "attention_mask": written_mask(SlidingWindow(4), torch.ones(2, N))
    }
    expected = logits(eager, **inputs, **mask)
    sparse = hf_sparse.patch_model(model, "sliding_window", window=4)
    torch.testing.assert_close(logits(sparse, **inputs), expected, **CLOSE)


_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
REFUSED = {
    "T5ForConditionalGeneration": (_T5, "the model adds a position bias to the scores"),
    "T5GemmaForConditionalGeneration": (
        {"encoder": _GEMMA, "decoder": _GEMMA},
        "it cannot be told which are those of the decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_attention_changes_the_scores_or_hides_its_role_is_refused(name):
    sizes, reason = REFUSED[name]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**sizes))
    with pytest.raises(ValueError, match=f"{name} cannot be patched: .*{reason}"):
        hf_sparse.patch_model(model, "sliding_window", window=4)
    assert not hasattr(model.config.get_text_config(), "sparse_attention")


def test_a_call_without_a_mask_is_dense_only_where_its_module_says_so():
    module = torch.nn.Module()
    module.config = transformers.BartConfig(**SIZES)
    with pytest.raises(
        ValueError, match="Module attends without a mask and does not say whether it is causal"
    ):
        stays_dense(module, None, None)
    assert stays_dense(module, None, False) and not stays_dense(module, None, True)
    module.is_causal = False  # of the module itself, whatever else is passed
    assert stays_dense(module, None, True)
    assert not stays_dense(module, torch.ones(1, 1, 4, 4), False)  # a caller's: refused farther on
    module.config = SimpleNamespace(is_encoder_decoder=True, model_type="detr")
    with pytest.raises(ValueError, match="belongs to a detr model, which decodes no text"):
        stays_dense(module, None, False)


def test_masks_pair_by_pair_and_foreign_caches_are_refused():
    model, inputs = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=4), both_inputs()
    with pytest.raises(ValueError, match=r"attention_mask reached BartAttention as a 4-D"):
        model(**inputs, decoder_attention_mask=torch.zeros(2, 1, N, N))
    other = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=8)
    with pytest.raises(ValueError, match="this cache was made for sliding_window"):
        model(**inputs, past_key_values=hf_sparse.make_cache(other))


def test_cached_encoder_outputs_are_taken():
    model, inputs = hf_sparse.patch_model(tiny_pair("bart"), "sliding_window", window=4), both_inputs()
    expected = logits(model, **inputs)
    with torch.no_grad():
        hidden = model.get_encoder()(inputs.pop("input_ids"), attention_mask=inputs["attention_mask"])[0]
    again = logits(model, **inputs, encoder_outputs=BaseModelOutput(last_hidden_state=hidden))
    assert torch.equal(again, expected)


def test_arguments_that_change_the_scores_are_refused_of_dense_calls_too():
    module = torch.nn.Module()
    module.config = transformers.BartConfig(**SIZES)
    query = torch.randn(1, 4, 3, 8)
    mask = DenseMask(None, (1, 1, 3, 3), query.device)
    with pytest.raises(ValueError, match="passes 'position_bias' to attention"):
        sparse_attention(module, query, query, query, mask, position_bias=torch.zeros(1, 4, 3, 3))
