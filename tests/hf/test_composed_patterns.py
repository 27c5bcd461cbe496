"""Patterns that differ per head and per layer in a model: every backend, training, decoding, saving, describing."""

import pytest
import torch
from tiny_models import logits, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import hf_sparse
from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.hf import settings, settings_from_json, settings_to_json
from hf_sparse.patterns.algebra import PerHead, PerLayer
from hf_sparse.patterns.grouped_heads import GroupedHeads
from hf_sparse.patterns.layered import Layered
from hf_sparse.patterns.random import Random

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
# four query heads on two key heads, two layers
HEADS = PerHead((SlidingWindow(3), Strided(4, "absolute") | SlidingWindow(2), StreamingLLM(1, 3), Full()))
PATTERNS = [
    HEADS,
    PerLayer((SlidingWindow(3), HEADS)),
    PerLayer((Full(), Longformer(3, (0, 4)))),
    Layered(layers={1: "strided"}),
    Longformer(window=(2, 6), global_tokens=(0,), dilation=(1, 2, 1, 3)),
    GroupedHeads(window=4, adaptive_window=False) | StreamingLLM(1, 2),
    Random(keys_per_query=3),
]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}


def _patch(name, pattern, **settings):
    return hf_sparse.patch_model(tiny(name), pattern, **settings)


def _padded(batch=2, length=21):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 1, 0
    return ids, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_the_torch_backend_gives_logits_and_gradients_of_the_reference(name, pattern):
    ids, mask = _padded()
    results = []
    for backend in ("reference", "torch"):
        model = _patch(name, pattern, backend=backend)
        out = model(ids, attention_mask=mask).logits[mask == 1]
        out.square().mean().backward()
        results.append((out, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
    (expected, wanted), (got, gradients) = results
    torch.testing.assert_close(got, expected, **CLOSE)
    for key in wanted:
        torch.testing.assert_close(
            gradients[key], wanted[key], atol=2e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
    full = logits(_patch(name, "full"), ids, attention_mask=mask)[mask == 1]
    assert (full - got).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_decoding_equals_no_cache(name, pattern):
    ids, mask = _padded()
    model = _patch(name, pattern)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    whole, cache, parts = logits(model, ids, attention_mask=mask), DynamicCache(config=model.config), []
    for start, stop in ((0, 9), (9, 10), (10, 21)):
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
        parts.append(logits(model, ids[:, start:stop], **given))
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_they_are_saved_and_loaded_under_a_name_transformers_knows(pattern, tmp_path):
    ids = tokens(1, 20)
    model = _patch("llama", pattern, layers=[1])
    composed = not pattern.name
    assert model.config._attn_implementation == ("sparse_custom" if composed else f"sparse_{pattern.name}")
    model.save_pretrained(tmp_path)
    loaded = hf_sparse.load(tmp_path)
    assert settings(loaded).pattern == pattern and settings(loaded).layers == (1,)
    assert settings_from_json(settings_to_json(settings(model))) == settings(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_every_layer_runs_its_own_pattern():
    ids = tokens(1, 20)
    first, second = SlidingWindow(3), Strided(4)
    model = _patch("llama", PerLayer((first, second)), backend="torch")
    with hf_sparse.recording() as recorder:
        logits(model, ids)
    pairs = [call.pairs for call in recorder.calls]
    assert pairs == [4 * int(pattern.mask(20).sum()) for pattern in (first, second)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (PerHead((Full(), SlidingWindow(2))), "2 entries and the model has 4 query heads"),
        (PerLayer((Full(),) * 3), "3 entries and the model has 2 layers"),
        (Longformer(window=(4, 4, 4)), "window .* 2 layers"),
        (Longformer(window=4, dilation=(1, 2)), "dilation .* 4 query heads"),
        (Layered(layers={(0, 3): SlidingWindow(2)}), "do not fit a model whose last layer is 1"),
        (GroupedHeads(local_heads=3, global_heads=2), "do not add up to the 4 query heads"),
        (PerLayer((Full(), PerHead((Full(),) * 3))), "4 query heads"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(pattern, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        hf_sparse.patch_model(model, pattern)
    assert not hasattr(model.config, "sparse_attention") and model.config._attn_implementation == "sdpa"


def test_a_saved_pattern_that_does_not_fit_the_config_is_refused_at_the_first_forward(tmp_path):
    config = _patch("llama", PerLayer((Full(), SlidingWindow(2)))).config
    config.num_hidden_layers = 3
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sparse_custom")
    with pytest.raises(ValueError, match="3 layers"):
        logits(model, tokens(1, 9))


def test_layers_that_cannot_be_told_apart_are_refused():
    import transformers

    options = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**options))
    with pytest.raises(
        ValueError, match=r"does not know which layer it is, so per_layer\(.* cannot be told apart"
    ):
        hf_sparse.patch_model(model, PerLayer((Full(), SlidingWindow(2))))
    hf_sparse.patch_model(model, HEADS)


def test_describe_shows_them_shortly_and_counts_dense_layers_as_dense():
    n = 40
    model = _patch("llama", PerLayer((Full(), SlidingWindow(4))))
    text = hf_sparse.describe(model, seq_len=n)
    assert "pattern   per_layer(0: full(), 1: sliding_window(window=4))" in text
    assert "layers    1 of 2 sparse (1); the others dense" in text
    pairs, dense = SlidingWindow(4).mask(n).sum(), Full().mask(n).sum()
    assert (
        f"density {pairs / dense:.3f} in the sparse layers, {(pairs + dense) / (2 * dense):.3f} in all"
        in text
    )
    text = hf_sparse.describe(_patch("llama", HEADS), seq_len=n)
    assert f"density {HEADS.mask(n, heads=4).sum() / (4 * dense):.3f} in the sparse layers" in text
    text = hf_sparse.describe(_patch("llama", "sliding_window", window=n), seq_len=n)
    assert "0 of 2 sparse; at this length the pattern leaves nothing out" in text and "density 1.000" in text
    text = hf_sparse.describe(_patch("gemma2", HEADS), seq_len=n)
    assert "there it removes what strided(stride=4, anchor='absolute') and streaming_llm(sinks=1" in text


def test_a_model_trains_sparse_from_scratch_by_name():
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**options, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sparse_grouped_heads")
    assert settings(model).pattern == GroupedHeads()
    ids = tokens(4, 8).repeat(1, 40)  # 320 tokens, more than the window of the local heads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with hf_sparse.recording() as recorder:
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    mask = GroupedHeads().mask(320, heads=6)
    assert recorder.density == pytest.approx(float(mask.sum() / (6 * Full().mask(320).sum())))
    assert recorder.density < 0.6 and len(recorder.calls) == 10


def test_describe_cuts_long_lists_and_says_small_densities():
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=20, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    hf_sparse.patch_model(model, PerLayer(tuple(SlidingWindow(2 + i) for i in range(20))))
    text = hf_sparse.describe(model, seq_len=100_000)
    assert "5: sliding_window(window=7), ... 19: sliding_window(window=21))" in text and "6: sl" not in text
    assert "density 0.00023 in the sparse layers" in text
    hf_sparse.patch_model(model, hf_sparse.GlobalTokens((), token_ids=tuple(range(30))))
    assert "the tokens (0, 1, 2, 3, 4, 5, ... 29: 30 in all) of the input" in hf_sparse.describe(model)
