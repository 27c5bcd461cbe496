"""Embeddings: what a person would compute by hand, whatever the batch, the windows and the padding."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5Model,
)

import hf_sparse
from hf_sparse import encode
from hf_sparse.documents import Document

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 700 : i * 700 + 100 + 150 * i] for i in (3, 0, 4, 1, 2)]
_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 2,
}
_BERT = {**_SIZES, "intermediate_size": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "bert": lambda n: BertForMaskedLM(BertConfig(**_BERT, max_position_embeddings=n)),
    "roberta": lambda n: RobertaForMaskedLM(RobertaConfig(**_BERT, max_position_embeddings=n + 3)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=n, initializer_range=0.3)
    ),
    "opt": lambda n: OPTForCausalLM(
        OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=n, init_std=0.3)
    ),
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(**_BERT, max_position_embeddings=n)),
}


def model_of(name, positions=512):
    torch.manual_seed(0)
    return MODELS[name](positions).eval()


@pytest.fixture(scope="session")
def encoder_tokenizer(tiny_tokenizer):
    """The tiny tokenizer, with <s> before every text and </s> after it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def states(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def by_hand(model, windows, pooling):
    """Pool the states of one window after the other, each run alone and without padding."""
    each = [states(model, ids) for ids in windows]
    if pooling == "mean":
        return torch.cat(each).mean(0)
    return torch.stack([one[0] for one in each]).mean(0) if pooling == "cls" else each[-1][-1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", list(MODELS))
def test_batches_equal_documents_one_by_one(name, sparse, side, encoder_tokenizer, monkeypatch):
    model = model_of(name)
    if sparse:
        hf_sparse.patch_model(model, "longformer", window=9)
    monkeypatch.setattr(encoder_tokenizer, "padding_side", side)
    for pooling in ("mean", "last") if name in ("gpt2", "opt", "llama") else ("mean", "cls", "last"):
        expected = torch.stack(
            [by_hand(model, [encoder_tokenizer(text)["input_ids"]], pooling) for text in TEXTS]
        )
        found = encode(model, encoder_tokenizer, TEXTS, pooling=pooling, batch_size=3)
        assert found.dtype == torch.float32 and found.shape == (5, 32) and not found.requires_grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_extended_encoder_reads_a_long_document_at_once_and_a_longer_one_in_windows(
    name, encoder_tokenizer
):
    model = model_of(name)
    hf_sparse.extend_positions(model, 4096, "copy")
    hf_sparse.patch_model(model, "longformer", window=65)
    plain = encoder_tokenizer(SOURCE * 2, add_special_tokens=False)["input_ids"]
    lengths, calls = (2998, 10_000), []
    texts = [encoder_tokenizer.decode(plain[:n]) for n in lengths]
    tokens = [encoder_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [len(ids) for ids in tokens] == list(lengths)
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = encode(model, encoder_tokenizer, texts, batch_size=1)
    hook.remove()
    assert calls == [
        (1, 3336),
        (1, 3335),
        (1, 3335),
        (1, 3000),
    ]  # special tokens counted, no window above 4,096
    parts = tokens[1][:3334], tokens[1][3334:6667], tokens[1][6667:]
    windows = [[[0, *tokens[0], 1]], [[0, *part, 1] for part in parts]]
    for row, own in zip(found, windows, strict=True):
        torch.testing.assert_close(row, by_hand(model, own, "mean"), atol=1e-5, rtol=1e-5)
    cls = encode(model, encoder_tokenizer, texts, pooling="cls")
    torch.testing.assert_close(cls[1], by_hand(model, windows[1], "cls"), atol=1e-5, rtol=1e-5)


def test_last_reads_the_end_of_a_document_with_a_full_window_before_it(encoder_tokenizer):
    model = model_of("llama", 64)
    ids = encoder_tokenizer(SOURCE[:1000], add_special_tokens=False)["input_ids"]
    expected = by_hand(model, [[0, *ids[-62:], 1]], "last")
    found = encode(model, encoder_tokenizer, [SOURCE[:1000]], pooling="last")
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_max_length_cuts_windows_and_no_position_limit_reads_everything_at_once(
    encoder_tokenizer, tiny_tokenizer
):
    model = model_of("bert")
    ids = encoder_tokenizer(SOURCE[:600], add_special_tokens=False)["input_ids"]
    half = -(-len(ids) // 2)
    windows = [[0, *ids[:half], 1], [0, *ids[half:], 1]]
    found = encode(model, encoder_tokenizer, [SOURCE[:600]], max_length=half + 2)
    torch.testing.assert_close(found[0], by_hand(model, windows, "mean"), atol=1e-5, rtol=1e-5)
    alibi = BloomModel(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4)).eval()
    everything = tiny_tokenizer(SOURCE[:6000])["input_ids"]
    found = encode(alibi, tiny_tokenizer, [SOURCE[:6000]])
    torch.testing.assert_close(found[0], by_hand(alibi, [everything], "mean"), atol=1e-5, rtol=1e-5)


def test_names_norms_and_modes(encoder_tokenizer, tiny_tokenizer):
    model = model_of("bert").train()
    documents = [Document(f"text {i}", text) for i, text in enumerate(TEXTS)]
    plain = encode(model, encoder_tokenizer, TEXTS)
    assert torch.equal(plain, encode(model, encoder_tokenizer, documents))  # and no dropout
    assert model.training and model.bert.encoder.layer[0].training
    assert torch.equal(plain, encode(model.bert, encoder_tokenizer, iter(documents)))
    unit = encode(model, encoder_tokenizer, TEXTS, normalize=True)
    torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))
    assert not torch.equal(plain, encode(model, tiny_tokenizer, TEXTS))  # special tokens count


def test_an_adapter_and_low_precision_are_seen(encoder_tokenizer):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = model_of("llama")
    plain = encode(model, encoder_tokenizer, TEXTS)
    low = encode(copy.deepcopy(model).to(torch.bfloat16), encoder_tokenizer, TEXTS)
    assert low.dtype == torch.float32 and 1e-4 < (low - plain).abs().max() < 0.3
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = encode(adapted, encoder_tokenizer, TEXTS)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(found, encode(merged, encoder_tokenizer, TEXTS), atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    prompted = get_peft_model(
        model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="has an adapter of virtual tokens"):
        encode(prompted, encoder_tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        (["a text", " \n"], {}, "document 1 holds no text; leave it out"),
        ([Document("empty.txt", "")], {}, "empty.txt holds no text"),
        ([], {}, "there are no documents to encode"),
        ("one text", {}, "documents must be a list of texts, got a single one"),
        (["a \ud800 b"], {}, "document document 0 is not valid Unicode"),
        (["a text"], {"pooling": "max"}, "pooling must be one of mean, cls, last, got 'max'"),
        (["a text"], {"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        (["a text"], {"max_length": 2.5}, "max_length must be a whole number >= 1, got 2.5"),
        (["a text"], {"max_length": 2}, "max_length=2 leaves no room beside the 2 special tokens"),
        (["a text"], {"max_length": 1024}, "max_length=1024 is beyond the 512 positions of BertForMaskedLM"),
    ],
)
def test_what_cannot_be_encoded_is_refused(documents, settings, message, encoder_tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(model_of("bert"), encoder_tokenizer, documents, **settings)


def test_models_that_have_no_such_embedding_are_refused(encoder_tokenizer):
    with pytest.raises(
        ValueError, match=r"pooling='cls' .* GPT2LMHeadModel, a causal model, has seen no other token"
    ):
        encode(model_of("gpt2"), encoder_tokenizer, TEXTS, pooling="cls")
    with pytest.raises(
        ValueError, match=r"T5Model has an encoder and a decoder; give model\.get_encoder\(\)"
    ):
        encode(T5Model(T5Config(vocab_size=400, d_model=32, num_layers=1)), encoder_tokenizer, TEXTS)
    narrow = BertModel(BertConfig(**{**_BERT, "vocab_size": 100})).eval()
    with pytest.raises(ValueError, match="but BertModel knows only 0 to 99; use the tokenizer that belongs"):
        encode(narrow, encoder_tokenizer, TEXTS)
    # every frequency has a factor for short texts and one for long ones
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4}
    longrope |= {"long_factor": [4.0] * 4, "original_max_position_embeddings": 128}
    phi = LlamaForCausalLM(LlamaConfig(**_BERT, max_position_embeddings=512, rope_parameters=longrope)).eval()
    with pytest.raises(
        ValueError, match=r"those of the longest text in a batch \(longrope\); use batch_size=1"
    ):
        encode(phi, encoder_tokenizer, TEXTS)
    assert encode(phi, encoder_tokenizer, TEXTS, batch_size=1).isfinite().all()
    dynamic = hf_sparse.extend_positions(model_of("llama"), 1024, "dynamic")
    with pytest.raises(
        ValueError, match="an embedding would depend on other documents; extend its positions by linear"
    ):
        encode(dynamic, encoder_tokenizer, TEXTS)
