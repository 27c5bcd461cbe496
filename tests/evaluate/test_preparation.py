"""What is refused before anything is measured, and models that are read although they lack what most have."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import hf_sparse
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity
from hf_sparse.evaluate.head import ChunkedHead
from hf_sparse.evaluate.probes import Copy, probe
from hf_sparse.evaluate.serving import serve

TEXT = "import os\nfor name in os.listdir('.'):\n    print(name)\n" * 3


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (TEXT, r"documents must be a list of texts, got a single one; put it into a list"),
        (Document("a", TEXT), r"documents must be a list of texts, got a single one"),
        ([TEXT, None], r"document 1 is NoneType, no text; give strings, or"),
        ([{"text": TEXT}], r"document 0 is dict, no text"),
        ([], r"there are no documents"),
    ],
)
def test_what_is_no_list_of_texts(tiny_model, tiny_tokenizer, documents, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model, tiny_tokenizer, documents, max_length=30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 1.5}, r"seed must be a whole number .* got 1.5"),
        ({"mask_share": 0.3}, r"mask_share=0.3 is for encoders, this is a causal model"),
        ({"context_targets": 8}, r"context_targets=8 is of the context curve, and there is none"),
    ],
)
def test_settings_that_would_mean_nothing(tiny_model, tiny_tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model, tiny_tokenizer, [TEXT], max_length=30, **settings)


def test_a_prefix_for_each_window_needs_one(tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    settings = {"max_length": 30, "mode": "strided"}
    with pytest.raises(ValueError, match=r"bos_each_window=True asks for a token that this tokenizer lacks"):
        perplexity(tiny_model, tokenizer, [TEXT], bos_each_window=True, **settings)
    assert perplexity(tiny_model, tokenizer, [TEXT], **settings).text.prefix == "none"


def test_a_wrapped_model_is_named(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"DataParallel is no model of transformers"):
        perplexity(torch.nn.DataParallel(tiny_model), tiny_tokenizer, [TEXT], max_length=30)


def test_a_model_without_a_cache(tiny_tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    model = MambaForCausalLM(config).eval()
    result = perplexity(model, tiny_tokenizer, [TEXT], max_length=40, head_chunk=7)
    ids = [0, *tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]][:40]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = -sum(logits[i, token].item() for i, token in enumerate(ids[1:]))
    assert result.runs[0].nats[0] == pytest.approx(expected, rel=1e-5)
    assert result.runs[0].served.kv_bytes is None and result.runs[0].served.tokens == 40
    with pytest.raises(ValueError, match=r"prefill_chunk=8 needs a cache .* MambaForCausalLM has none"):
        perplexity(model, tiny_tokenizer, [TEXT], max_length=40, prefill_chunk=8)
    with pytest.raises(ValueError, match=r"prefill_chunk=8 needs a cache .* MambaForCausalLM has none"):
        probe(model, tiny_tokenizer, [Copy(block=8)], lengths=[80], prefill_chunk=8)


def test_chunks_that_a_recurrent_layer_does_not_join_are_refused(tiny_tokenizer, monkeypatch):
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_experts=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        initializer_range=0.3,
    )
    model = JambaForCausalLM(config).eval()
    with pytest.raises(
        ValueError, match=r"JambaForCausalLM scores tokens otherwise when they are fed in chunks"
    ):
        perplexity(model, tiny_tokenizer, [TEXT], max_length=60, prefill_chunk=20)
    with pytest.raises(ValueError, match=r"leave prefill_chunk out"):
        probe(model, tiny_tokenizer, [Copy(block=8)], lengths=[80], prefill_chunk=20)
    assert perplexity(model, tiny_tokenizer, [TEXT], max_length=60).tokens[0] == 59
    monkeypatch.setattr("hf_sparse.evaluate.scoring.LONG", 40)  # chunks that nobody asked for are tried too
    monkeypatch.setattr("hf_sparse.evaluate.scoring.CHUNK", 20)
    with pytest.raises(ValueError, match=r"leave prefill_chunk out, and use a max_length of at most 40"):
        perplexity(model, tiny_tokenizer, [TEXT], max_length=60, patterns=["sliding_window"])


def test_chunks_that_a_recurrent_layer_joins_are_fed(tiny_tokenizer):
    torch.manual_seed(0)
    heads = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    for kind in ("key", "value"):
        heads[f"linear_num_{kind}_heads"] = 2
    config = Qwen3NextConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        **{
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "initializer_range": 0.3,
            **heads,
        },
    )
    model = Qwen3NextForCausalLM(config).eval()
    whole, chunked = (
        perplexity(model, tiny_tokenizer, [TEXT], max_length=70, prefill_chunk=chunk).runs[0].nats
        for chunk in (None, 17)
    )
    assert chunked == pytest.approx(whole, rel=1e-5)


def test_a_model_that_is_its_own_decoder(tiny_tokenizer):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        initializer_range=0.3,
        attention_chunk_size=16,
        pad_token_id=2,
    )
    model = Llama4ForCausalLM(config).eval()
    assert model.get_decoder() is model
    result = perplexity(model, tiny_tokenizer, [TEXT], max_length=40, head_chunk=7)
    ids = [0, *tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]][:40]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = -sum(logits[i, token].item() for i, token in enumerate(ids[1:]))
    assert result.runs[0].nats[0] == pytest.approx(expected, rel=1e-5)


def test_a_model_whose_forward_cannot_leave_out_logits(tiny_model, tiny_tokenizer, monkeypatch):
    whole = type(tiny_model).forward

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None
    ):
        return whole(self, input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)

    expected = perplexity(tiny_model, tiny_tokenizer, [TEXT], max_length=40)
    monkeypatch.setattr(type(tiny_model), "forward", forward)
    result = perplexity(tiny_model, tiny_tokenizer, [TEXT], max_length=40)
    assert result.runs[0].nats == pytest.approx(expected.runs[0].nats, rel=1e-6)
    assert result.runs[0].served.kv_bytes == expected.runs[0].served.kv_bytes


@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_is_read_without_its_logits(tiny_model, masked):
    model, rows = tiny_model, []
    if masked:
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
        model = BertForMaskedLM(BertConfig(vocab_size=400, **small)).eval()
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    ids = torch.arange(90).numpy()
    found = serve(ChunkedHead(model, 1024), ids, torch.device("cpu"))
    assert set(rows) == {1} and found.tokens == 90 and (found.kv_bytes is None) == masked


def test_a_patched_prompt_fills_the_cache_of_its_pattern(tiny_model):
    hf_sparse.patch_model(tiny_model, "sliding_window", window=8)
    ids = torch.arange(300).numpy()
    found = [serve(ChunkedHead(tiny_model, 4), ids, torch.device("cpu"), chunk=chunk) for chunk in (None, 30)]
    dense_bytes = 300 * 2 * 2 * 2 * 8 * 4
    assert all(0 < one.kv_bytes < dense_bytes for one in found)
