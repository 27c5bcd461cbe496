"""The figures against computations that share nothing with them."""

import argparse
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import hf_sparse
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity, tokenize, variants

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 700 : i * 700 + 300 + 90 * i] for i in range(6)]
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def brute_force(model, tokenizer, text, max_length):
    """Nats of every token of a text after BOS, from full logits in float64."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:max_length]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [-logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1)]


HEADS = {
    Gemma2ForCausalLM: Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    CohereForCausalLM: CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.3),
    GraniteForCausalLM: GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0),
    GPT2LMHeadModel: GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=0
    ),
    GPTNeoXForCausalLM: GPTNeoXConfig(**SMALL),
    OPTForCausalLM: OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        init_std=0.3,
    ),
}


def test_equals_full_logits(tiny_model, tiny_tokenizer):
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=500, head_chunk=7)
    expected = [brute_force(tiny_model, tiny_tokenizer, text, 500) for text in TEXTS]
    dense = result.runs[0]
    assert [len(nats) for nats in expected] == result.tokens.tolist()
    assert dense.nats == pytest.approx([sum(nats) for nats in expected], rel=1e-5)
    flat = [nats for document in expected for nats in document]
    assert result.nats_per_token(dense) == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert result.perplexity(dense) == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-4)
    macro = math.exp(sum(sum(nats) / len(nats) for nats in expected) / len(expected))
    assert result.macro_perplexity(dense) == pytest.approx(macro, rel=1e-4)


@pytest.mark.parametrize("architecture", HEADS, ids=lambda architecture: architecture.__name__)
def test_what_the_model_does_behind_its_decoder_is_applied(architecture, tiny_tokenizer):
    torch.manual_seed(0)
    model = architecture(HEADS[architecture]).eval()
    result = perplexity(model, tiny_tokenizer, TEXTS[:2], max_length=64, head_chunk=9)
    expected = [sum(brute_force(model, tiny_tokenizer, text, 64)) for text in TEXTS[:2]]
    assert result.runs[0].nats == pytest.approx(expected, rel=1e-5)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_model, tiny_tokenizer):
    torch.nn.init.zeros_(tiny_model.lm_head.weight)
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=100)
    assert result.perplexity(result.runs[0]) == pytest.approx(400, rel=1e-6)
    assert result.macro_perplexity(result.runs[0]) == pytest.approx(400, rel=1e-6)


def test_chunk_size_does_not_matter_and_logits_stay_small(tiny_model, tiny_tokenizer):
    rows = []
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    one, three, all_at_once = (
        perplexity(tiny_model, tiny_tokenizer, TEXTS[3:], max_length=90, head_chunk=chunk).runs[0].nats
        for chunk in (1, 13, 10_000)
    )
    assert one == pytest.approx(three, rel=1e-6) and one == pytest.approx(all_at_once, rel=1e-6)
    rows.clear()
    perplexity(tiny_model, tiny_tokenizer, TEXTS[3:], max_length=90, head_chunk=17)
    assert max(rows) == 17


def test_position_and_block_sums_are_the_document_sums(tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 4096
    texts = [SOURCE[:9000], TEXTS[0]]
    result = perplexity(tiny_model, tiny_tokenizer, texts, max_length=3000, patterns=["sliding_window"])
    assert max(result.tokens) > 2048
    assert result.position_tokens.sum(axis=1).tolist() == result.tokens.tolist()
    assert result.position_tokens[0, :4].tolist() == [1, 2, 4, 8]
    for run in result.runs:
        assert run.position_nats.sum(axis=1) == pytest.approx(run.nats, rel=1e-9)
        assert [blocks.sum() for blocks in run.block_nats] == pytest.approx(run.nats, rel=1e-9)
        assert [len(blocks) for blocks in run.block_nats] == [2, 1]
        assert math.isclose(result.loss_by_position(run)[0], run.position_nats[:, 0].sum() / 2)


def test_documents_do_not_touch_each_other(tiny_model, tiny_tokenizer):
    together = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=150).runs[0].nats
    alone = [perplexity(tiny_model, tiny_tokenizer, [text], max_length=150).runs[0].nats[0] for text in TEXTS]
    assert together == pytest.approx(alone, rel=1e-9)


def test_sparse_runs_score_the_same_tokens_with_another_mask(tiny_model, tiny_tokenizer):
    window = hf_sparse.SlidingWindow(window=8)
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=120, patterns=["full", window])
    dense, full, sparse = result.runs
    assert full.nats == pytest.approx(dense.nats, rel=1e-5)
    with hf_sparse.patched(tiny_model, window):
        expected = [sum(brute_force(tiny_model, tiny_tokenizer, text, 120)) for text in TEXTS]
    assert sparse.nats == pytest.approx(expected, rel=1e-5)
    assert abs(sparse.nats - dense.nats).min() > 1e-3
    n = result.tokens  # tokens read: the last one is only predicted
    pairs, all_pairs = 8 * n - 28, n * (n + 1) // 2
    assert sparse.density == pytest.approx(pairs.sum() / all_pairs.sum(), rel=1e-9)
    assert (sparse.calls, sparse.layers, sum(sparse.ran.values())) == (12, 2, 12)
    assert (dense.density, dense.calls, full.density) == (1.0, 0, 1.0)


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer):
    ids = torch.arange(3, 40)[None]
    before = tiny_model(ids).logits
    tiny_model.train()
    tiny_model.lm_head.eval()
    random_state = torch.get_rng_state()
    perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=50, patterns=["sliding_window"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tiny_model.training and tiny_model.model.training and not tiny_model.lm_head.training
    assert "forward" not in vars(tiny_model.model)
    tiny_model.eval()
    assert torch.equal(tiny_model(ids).logits, before)


def test_a_patched_model_is_measured_dense_too_and_stays_patched(tiny_model, tiny_tokenizer):
    dense = perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=80).runs[0].nats
    hf_sparse.patch_model(tiny_model, "sliding_window", window=4, layers=[1])
    saved = hf_sparse.hf.settings(tiny_model)
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=80, patterns=[saved])
    assert result.runs[0].nats == pytest.approx(dense, rel=1e-6)
    assert result.runs[1].label == "sliding_window(window=4) in layers 1"
    assert result.runs[1].nats == pytest.approx(
        [sum(brute_force(tiny_model, tiny_tokenizer, TEXTS[0], 80))], rel=1e-5
    )
    assert hf_sparse.hf.settings(tiny_model) == saved


def test_a_sparse_run_without_a_sparse_call_is_refused(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(variants, "patched", lambda *args, **kwargs: nullcontext())
    with pytest.raises(ValueError, match="these would be dense figures"):
        perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=50, patterns=["sliding_window"])


def test_a_head_that_chunks_change_is_refused(tiny_model, tiny_tokenizer):
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: out - out.mean(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="output head of LlamaForCausalLM cannot be run in chunks"):
        perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=50)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: BertModel(BertConfig(**SMALL)), "BertModel has no causal language-model head"),
        (lambda: BertLMHeadModel(BertConfig(**SMALL)), "lets a token see the ones after it"),
    ],
)
def test_encoders_are_refused(model, message, tiny_tokenizer):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        perplexity(model(), tiny_tokenizer, TEXTS[:1], max_length=50)


def test_wrong_arguments(tiny_model, tiny_tokenizer):
    def run(**change):
        perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], **{"max_length": 50, **change})

    with pytest.raises(ValueError, match=r"unknown pattern 'sliding'"):
        run(patterns=["sliding"])
    with pytest.raises(ValueError, match=r"unknown backend 'fast'"):
        run(backend="fast")
    with pytest.raises(ValueError, match=r"head_chunk must be a whole number >= 1.*got 0"):
        run(head_chunk=0)
    with pytest.raises(ValueError, match=r"max_length must be a whole number >= 3.*got 2"):
        run(max_length=2)
    with pytest.raises(ValueError, match=r"only a PeftModel has adapters"):
        run(without_adapter=True)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(ValueError, match=r"max_length=65 is beyond the 64 positions of GPT2LMHeadModel"):
        perplexity(gpt2, tiny_tokenizer, TEXTS[:1], max_length=65)


def test_every_token_is_scored_once(tiny_tokenizer):
    text = tokenize(tiny_tokenizer, [Document("a", TEXTS[5])], 10_000)
    ids = tiny_tokenizer(TEXTS[5], add_special_tokens=False)["input_ids"]
    assert list(text.documents[0].ids) == [0, *ids]
    assert (text.documents[0].tokens, text.truncated, text.prefix) == (len(ids), 0, "bos")
    assert text.documents[0].text_bytes == len(TEXTS[5].encode())


def test_truncation_counts_what_is_kept_and_cut(tiny_tokenizer):
    ids = tiny_tokenizer(TEXTS[5], add_special_tokens=False)["input_ids"]
    text = tokenize(tiny_tokenizer, [Document("a", TEXTS[5])], 50)
    (document,) = text.documents
    assert (len(document.ids), document.tokens, document.truncated) == (50, 49, len(ids) - 49)
    assert document.text_bytes == len(tiny_tokenizer.decode(ids[:49]).encode())


class SlowTokenizer:
    """Words of a fixed list, everything else unknown; it knows no offsets."""

    bos_token_id, eos_token_id = 0, None
    words = ("<s>", "<unk>", "one", "two", "three")

    def __call__(self, text, **kwargs):
        known = {word: i for i, word in enumerate(self.words)}
        return {"input_ids": [known.get(word.lower(), 1) for word in text.split()]}

    def decode(self, ids, **kwargs):
        return " ".join(self.words[i] for i in ids)


def test_a_tokenizer_without_offsets_has_the_bytes_of_a_whole_text():
    text = "One  two   extraordinary THREE\n"
    (whole,) = tokenize(SlowTokenizer(), [Document("a", text)], 100).documents
    assert (whole.text_bytes, whole.words) == (len(text), 5)  # what decoding gives has 19 bytes
    (cut,) = tokenize(SlowTokenizer(), [Document("a", text)], 4).documents
    assert (cut.text_bytes, cut.truncated) == (len("one two <unk>"), 1)


def test_settings_that_leave_the_backend_open_get_the_one_asked_for(tiny_model, tiny_tokenizer):
    window = hf_sparse.SlidingWindow(window=8)
    hf_sparse.patch_model(tiny_model, window, layers=[1])
    own = hf_sparse.hf.settings(tiny_model)
    for given, wanted in ((own, "reference"), (replace(own, backend="torch"), "torch")):
        result = perplexity(
            tiny_model, tiny_tokenizer, TEXTS[:1], max_length=60, patterns=[given], backend="reference"
        )
        assert {name.split("/")[0] for name in result.runs[1].ran} == {wanted}


def test_without_a_prefix_the_first_token_is_context(tiny_tokenizer):
    ids = tiny_tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    text = tokenize(tiny_tokenizer, [Document("a", TEXTS[0])], 1000, bos=False)
    (document,) = text.documents
    assert (list(document.ids), document.tokens, text.prefix) == (ids, len(ids) - 1, "none")
    assert document.text_bytes == len(tiny_tokenizer.decode(ids[1:]).encode())


def test_eos_stands_in_for_a_missing_bos(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    text = tokenize(tokenizer, [Document("a", TEXTS[0])], 1000)
    assert (text.documents[0].ids[0], text.prefix) == (1, "eos")


def test_short_documents_are_skipped_and_named(tiny_tokenizer):
    named = [Document("empty", ""), Document("one", "a"), Document("long", TEXTS[0])]
    text = tokenize(tiny_tokenizer, named, 100)
    assert [(skipped.name, skipped.reason) for skipped in text.skipped] == [
        ("empty", "no text"),
        ("one", "fewer than 2 tokens to score"),
    ]
    assert [document.name for document in text.documents] == ["long"]
    with pytest.raises(ValueError, match="none of the 2 documents has 2 tokens to score"):
        tokenize(tiny_tokenizer, named[:2], 100)
    with pytest.raises(ValueError, match="there are no documents"):
        tokenize(tiny_tokenizer, [], 100)


def test_bytes_of_text_beyond_ascii(tiny_tokenizer):
    words = "größe 漢字 🙂 " * 20
    whole = tokenize(tiny_tokenizer, [Document("a", words)], 10_000).documents[0]
    assert whole.text_bytes == len(words.encode())
    with pytest.raises(ValueError, match="document a is not valid Unicode"):
        tokenize(tiny_tokenizer, [Document("a", "x \ud800 y")], 100)


def test_same_tokens_have_the_same_fingerprint(tiny_model, tiny_tokenizer):
    one, same, other = (
        perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=length) for length in (60, 60, 61)
    )
    assert one.difference(one.runs[0], same.runs[0]).estimate == 0
    with pytest.raises(ValueError, match="scored different tokens"):
        one.difference(one.runs[0], other.runs[0])
