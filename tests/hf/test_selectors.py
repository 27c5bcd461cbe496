"""Models under content-based patterns: what is refused, training, saving, padding, and two models at once."""

from dataclasses import replace

import pytest
import torch
from caching import CLOSE, decoder, left_padded
from tiny_models import ENCODERS, logits, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import hf_sparse
from hf_sparse import Full, PerHead, PerLayer, Quest, SlidingWindow, TopKBlocks, get_pattern, recording
from hf_sparse.evaluate import perplexity
from hf_sparse.train.config import AdaptationArguments
from hf_sparse.train.model import load_patched

SELECTOR = TopKBlocks(keep=4, block=4, local=0, query_block=2)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_torch_gives_what_the_reference_gives(name):
    ids = tokens(2, 45)
    out = []
    for backend in ("reference", "torch"):
        with recording() as seen:
            out.append(
                logits(hf_sparse.patch_model(tiny(name), SELECTOR, backend=backend), ids, use_cache=False)
            )
        assert {call.backend for call in seen.calls} == {backend}
        assert all(call.pairs < call.dense_pairs for call in seen.calls[-2:])
    torch.testing.assert_close(out[1], out[0], **CLOSE)


def test_the_whole_budget_is_the_dense_model():
    ids = tokens(2, 40)
    dense = logits(tiny("llama"), ids)
    full = logits(hf_sparse.patch_model(tiny("llama"), "topk_blocks", keep=1.0, block=4), ids)
    torch.testing.assert_close(full, dense, **CLOSE)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused_and_left_as_they_were(name):
    model, ids = tiny(name), tokens(1, 20)
    before = logits(model, ids)
    with pytest.raises(ValueError, match="selects for causal attention"):
        hf_sparse.patch_model(model, SELECTOR)
    assert torch.equal(logits(model, ids), before) and not hasattr(model.config, "sparse_attention")


def test_layers_without_keys_are_refused():
    """LFM2's first layer is a convolution; selecting in all layers is selecting in those that have keys."""
    with pytest.raises(
        ValueError, match=r"layer 0 has no attention whose keys topk_blocks.* give .* to layers 1$"
    ):
        decoder("lfm2", PerLayer((SELECTOR, Full())))
    assert "1 of 1 sparse" in hf_sparse.describe(decoder("lfm2", SELECTOR), seq_len=200)


def test_single_heads_are_refused():
    with pytest.raises(ValueError, match="cannot hold a content-based pattern"):
        hf_sparse.patch_model(tiny("llama"), PerHead((SELECTOR, *[SlidingWindow(4)] * 3)))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_without_summaries_are_refused_at_the_first_call(cache):
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 20)
    made = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=64)
    )
    with pytest.raises(ValueError, match=r"does not keep; use hf_sparse\.make_cache"):
        model(ids, past_key_values=made)
    out = model(ids)  # makes a DynamicCache by itself
    with pytest.raises(ValueError, match=r"does not keep; use hf_sparse\.make_cache"):
        model(ids[:, :1], past_key_values=out.past_key_values)


def test_more_layers_than_budgets_are_refused():
    with pytest.raises(ValueError, match="keep has 3 entries and the model has 2 layers"):
        hf_sparse.patch_model(tiny("llama"), "topk_blocks", keep=[3, 4, 5])


def test_layers_share_what_the_lowest_selects(monkeypatch):
    model, ids, scored = tiny("llama"), tokens(1, 60), []
    score = TopKBlocks.score
    monkeypatch.setattr(TopKBlocks, "score", lambda *given: scored.append(None) or score(*given))
    for reuse, times in ((1, 2), (2, 1)):
        scored.clear()
        hf_sparse.patch_model(model, TopKBlocks(keep=4, block=4, reuse=reuse))(ids, use_cache=False)
        assert len(scored) == times


@pytest.mark.parametrize(
    "of",
    [
        lambda reuse: TopKBlocks(keep=[3, 8], block=4, local=0, reuse=reuse),
        lambda reuse: PerLayer((replace(SELECTOR, reuse=reuse), Quest(dense_layers=0, reuse=reuse))),
    ],
)
def test_layers_of_other_selectors_share_nothing(of):
    ids, pairs = tokens(1, 60), []
    for reuse in (1, 2):
        model = hf_sparse.patch_model(tiny("llama"), of(reuse))
        with recording() as seen:
            logits(model, ids, use_cache=False)
        pairs.append([call.pairs for call in seen.calls])
    assert pairs[0] == pairs[1] and pairs[0][0] != pairs[0][1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_and_checkpointing_gives_the_same(reentrant):
    ids = tokens(2, 40)
    grads = []
    for checkpointing in (False, True):
        model = hf_sparse.patch_model(tiny("llama"), TopKBlocks(keep=4, block=4, local=0, reuse=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
        assert grad.isfinite().all()


def test_a_padded_batch_is_each_row_alone():
    model = hf_sparse.patch_model(tiny("llama"), SELECTOR)
    rows = left_padded((0, 11), 40)
    out = logits(model, ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    alone = logits(model, rows["input_ids"][1:, 11:])
    torch.testing.assert_close(out[1:, 11:], alone, **CLOSE)


def test_two_models_do_not_affect_each_other():
    ids = tokens(1, 40)
    one, other = (
        hf_sparse.patch_model(tiny("llama"), p) for p in (SELECTOR, Quest(keep=5, block=2, dense_layers=0))
    )
    first = logits(one, ids)
    caches = [hf_sparse.make_cache(model) for model in (one, other)]
    parts = []
    for token in range(40):
        for number, (model, cache) in enumerate(zip((one, other), caches, strict=True)):
            step = logits(model, ids[:, token : token + 1], past_key_values=cache)
            parts += [step] if number == 0 else []
    torch.testing.assert_close(torch.cat(parts, 1), first, **CLOSE)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    pattern = TopKBlocks(keep=[4, 0.5], block=4, represent="minmax") | SlidingWindow(7)
    model, ids = hf_sparse.patch_model(tiny("llama"), pattern), tokens(1, 40)
    model.save_pretrained(tmp_path)
    loaded = hf_sparse.load(tmp_path).eval()
    assert hf_sparse.hf.settings(loaded).pattern == pattern
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)


def test_weights_for_those_who_ask_are_of_what_is_read():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 40)
    with recording() as seen:
        weights = model(ids, output_attentions=True, use_cache=False).attentions
    for weight in weights:
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)), **CLOSE)
    assert int((weights[-1] > 0).sum()) <= seen.calls[-1].pairs < seen.calls[-1].dense_pairs


def test_describe_tells_the_density():
    model = hf_sparse.patch_model(tiny("llama"), "topk_blocks", keep=4, block=4, local=0)
    text = hf_sparse.describe(model, seq_len=128)
    assert "density 0.2" in text or "density 0.1" in text, text


AHEAD = [
    ("kvstar", {"keep": 3, "block": 4, "query_block": 2, "local": 0}),
    ("vertical_slash", {"vertical": 0.2, "slash": 0.2, "block": 4, "renew": 8, "local": 0}),
    ("lsh", {"block": 4, "rounds": 2, "buckets": 4, "shared_qk": True, "sinks": 0, "local": 0}),
]


@pytest.mark.parametrize(("name", "options"), AHEAD, ids=[name for name, _ in AHEAD])
def test_what_looks_ahead_is_for_the_prompt_of_a_generation(name, options):
    """The prompt's last token sees what its form selects; those that come after go on causally."""
    ids, kind = tokens(2, 40), "gpt_neox" if name == "lsh" else "llama"
    ahead = hf_sparse.patch_model(tiny(kind), name, selection="prompt", **options)
    causal = hf_sparse.patch_model(tiny(kind), name, **options)
    cache = hf_sparse.make_cache(ahead)
    with torch.no_grad():
        first = ahead(ids, past_key_values=cache).logits
        out = ahead.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert not torch.equal(first, logits(causal, ids, past_key_values=hf_sparse.make_cache(causal)))
    assert torch.equal(out[:, 40], first[:, -1].argmax(-1))
    with (
        pytest.raises(ValueError, match=r"earlier ones read.*not for a text without a cache"),
        torch.no_grad(),
    ):
        ahead(ids, use_cache=False)
    for model in (ahead, ahead.train()):
        with pytest.raises(
            ValueError, match=r"not for training \(use torch.no_grad\); use selection='causal'"
        ):
            model(ids, past_key_values=hf_sparse.make_cache(model))


def test_what_looks_ahead_measures_no_perplexity_and_trains_nothing(tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained("recipes/tiny_base"),
        AutoTokenizer.from_pretrained("recipes/tiny_base"),
    )
    ahead = get_pattern("kvstar", selection="prompt", dense_layers=4) | SlidingWindow(8)
    with pytest.raises(ValueError, match="not for a measure that tokens to come must not help"):
        perplexity(model, tokenizer, ["def f(): pass\n" * 40], max_length=64, patterns=[ahead])
    arguments = AdaptationArguments(
        model="recipes/tiny_base",
        pattern="kvstar",
        pattern_options={"selection": "prompt"},
        text=[str(tmp_path)],
        length=64,
    )
    with pytest.raises(ValueError, match="not for training"):
        load_patched(arguments, 64)


def test_more_tokens_than_can_be_taken_back_are_refused_before_any_is():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 100)
    cache = hf_sparse.make_cache(model)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="70 tokens are to be taken back and topk_blocks"):
        cache.crop(-70)
    cache.crop(-60)
    again = logits(model, ids[:, 40:], past_key_values=cache)
    torch.testing.assert_close(again, logits(model, ids, use_cache=False)[:, 40:], **CLOSE)
