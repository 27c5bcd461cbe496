"""Key heads that need the distance hold all keys, the others a ring: the numbers of no cache, and fewer bytes."""

import copy
import pickle

import pytest
import torch
from caching import CLOSE, PREFILLS, caches, fed, left_padded
from tiny_models import _COMMON, _ROPE, logits, random_model, tokens
from transformers import DynamicCache

import hf_sparse
from hf_sparse import (
    Full,
    GroupedHeads,
    Layered,
    Longformer,
    PerHead,
    PerLayer,
    Random,
    ReRoPE,
    SlidingWindow,
    SparseTransformerStrided,
    StreamingLLM,
    Strided,
    recording,
)
from hf_sparse.hf.cache_layer import SparseLayer
from hf_sparse.hf.computed import AttentionCall, computed_by
from hf_sparse.hf.kv_bytes import kv_bytes
from hf_sparse.hf.ragged_layer import RaggedLayer
from hf_sparse.plan import Constraint, cost, held
from hf_sparse.plan.held import SLACK

HEADS, KV_HEADS, SIZE = 8, 4, 8  # two query heads share a key head
GQA = {**_ROPE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": HEADS * SIZE}
MODELS = {
    "gqa": ("LlamaForCausalLM", {**GQA, "max_position_embeddings": 4096}),
    "gpt2": (
        "GPT2LMHeadModel",
        {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": HEADS, "n_positions": 128},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**GQA, "head_dim": SIZE, "sliding_window": 9, "query_pre_attn_scalar": SIZE}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2ForCausalLM", {**GQA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
}
RING = SlidingWindow(window=4)
# The dense head lies in the third key head: the others' numbers, 0, 1 and 3, are not evenly spaced.
ONE_DENSE = PerHead((RING,) * 4 + (RING, Full()) + (RING,) * 2)
THREE = PerHead((StreamingLLM(2, 5), RING, Full(), RING, RING, RING, StreamingLLM(2, 5), RING))
PATTERNS = [
    ONE_DENSE,
    THREE,
    PerLayer((THREE, PerHead((Full(),) * 4 + (Strided(3, "absolute"),) * 2 + (RING,) * 2))),
    Layered(pattern=ONE_DENSE, dense_every=2),
    GroupedHeads(local_heads=6, window=4, global_token_ratio=0.25, adaptive_window=False),
    SparseTransformerStrided(stride=4, heads="split"),
    Longformer(window=3, global_tokens=(0, 7), dilation=(1, 1, 1, 1, 2, 2, 3, 3)),
    PerHead((RING,) * 6 + (Random(keys_per_query=4),) * 2),
    PerHead((ONE_DENSE,) * 4 + (THREE,) * 4),
]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)


def patched(pattern, name="gqa"):
    return hf_sparse.patch_model(random_model(*MODELS[name]), pattern)


def ragged(cache):
    return [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]


def check(model, prefills=PREFILLS):
    """Feed a padded batch and a single row in each way, and compare with no cache."""
    rows = left_padded((0, 9, 3), 26)
    for ids, mask in ((rows["input_ids"], rows["attention_mask"]), (tokens(1, 26, seed=5), None)):
        seen = {} if mask is None else {"attention_mask": mask}
        whole = logits(model, ids, use_cache=False, **seen)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        for lengths in prefills.values():
            cache = hf_sparse.make_cache(model)
            assert ragged(cache)
            part = fed(model, ids, cache, lengths, mask)
            torch.testing.assert_close(part[real], whole[real], **CLOSE)


@every_pattern
def test_patterns_whose_heads_differ_give_the_logits_of_no_cache(pattern, small_slack):
    check(patched(pattern))


@every_model
def test_architectures_give_the_logits_and_beams_of_no_cache(name, small_slack):
    model = patched(THREE, name)
    # a text fed in chunks reaches the linear layers of hybrids as other sums; they are not ours
    check(model, {"prompt": PREFILLS["prompt"]} if name == "lfm2" else {"chunks": PREFILLS["chunks"]})
    for beams in (1, 3):
        expected = model.generate(**left_padded(), use_cache=False, num_beams=beams, **GREEDY)
        made = model.generate(**left_padded(), num_beams=beams, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(made.sequences, expected) and ragged(made.past_key_values)


def test_half_precision_and_gradients():
    model, ids = patched(ONE_DENSE), tokens(2, 40)
    embeds, grads = model.get_input_embeddings()(ids).detach(), []
    for lengths in ((40,), (12, 1, 1, 20, 6)):
        inputs, cache = embeds.clone().requires_grad_(), hf_sparse.make_cache(model)
        parts = [model(inputs_embeds=x, past_key_values=cache).logits for x in inputs.split(lengths, 1)]
        torch.cat(parts, 1).square().sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5 * float(grads[0].abs().max()), rtol=1e-4)
    half = model.to(torch.bfloat16)
    exact = logits(model, ids, use_cache=False).float()
    got = fed(half, ids, hf_sparse.make_cache(half), (30, *(1,) * 10)).float()
    assert (got - exact).norm() < 0.05 * exact.norm()  # a few roundings of 2 ** -8


def test_global_tokens_of_a_call_stay_where_their_heads_see_them(small_slack):
    model = patched(Longformer(window=3, global_tokens=(), dilation=(1, 1, 1, 1, 2, 2, 3, 3)))
    ids, chosen = tokens(2, 30), torch.zeros(2, 30, dtype=torch.long)
    chosen[0, 2], chosen[1, [4, 11]] = 1, 1
    whole = logits(model, ids, global_attention_mask=chosen, use_cache=False)
    cache, parts = hf_sparse.make_cache(model), []
    assert ragged(cache)
    for start, stop in ((0, 14), *((n, n + 1) for n in range(14, 30))):
        seen = {"global_attention_mask": chosen[:, :stop], "past_key_values": cache}
        parts.append(logits(model, ids[:, start:stop], **seen))
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tokens_are_taken_back_and_rows_chosen(count, small_slack):
    model, ids = patched(THREE), tokens(3, 30)
    cache = hf_sparse.make_cache(model)
    fed(model, ids[:, :14], cache, (14,))
    cache.activate_past_recording()
    fed(model, tokens(3, count, seed=9), cache, (1,) * count)
    cache.crop(-count)
    cache.stop_recording()
    assert cache.get_seq_length() == 14
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    again = ids[rows].repeat_interleave(2, 0)
    got = fed(model, again[:, 14:], cache, (5, *(1,) * 11))
    torch.testing.assert_close(got, logits(model, again, use_cache=False)[:, 14:], **CLOSE)


def test_what_a_ring_has_dropped_cannot_be_taken_back(small_slack):
    model, ids = patched(ONE_DENSE), tokens(1, 30)
    cache = hf_sparse.make_cache(model)
    fed(model, ids, cache, (20, *(1,) * 10))
    before = [account.held for account in cache._accounts]
    with pytest.raises(ValueError, match="10 tokens are to be taken back"):
        cache.crop(-10)
    assert before == [account.held for account in cache._accounts]
    more = tokens(1, 4, seed=3)
    got = fed(model, more, cache, (1,) * 4)
    expected = logits(model, torch.cat((ids, more), 1), use_cache=False)[:, 30:]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_copies_offloaded_and_reset(how, small_slack):
    model, ids = patched(THREE), tokens(2, 40)
    whole, cache = logits(model, ids, use_cache=False), hf_sparse.make_cache(model)
    fed(model, ids[:, :20], cache, (20,))
    twin = how(cache)
    for layer in twin.layers:
        layer.offload()
        layer.prefetch()
    for one in (cache, twin):  # the second is not disturbed by what the first has gone on to hold
        torch.testing.assert_close(fed(model, ids[:, 20:], one, (1,) * 20), whole[:, 20:], **CLOSE)
    assert twin.nbytes == cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.kept == 0
    other = tokens(3, 25, seed=4)
    got = fed(model, other, cache, (12, *(1,) * 13))
    torch.testing.assert_close(got, logits(model, other, use_cache=False), **CLOSE)


def test_assisted_generation():
    model, ids = patched(THREE), tokens(1, 20)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=patched(ONE_DENSE), **GREEDY), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_one_dense_key_head_of_four_holds_what_theory_says():
    n, window = 2000, 64
    ring, model = SlidingWindow(window), patched(PerHead((Full(),) * 2 + (SlidingWindow(window),) * 6))
    cache = hf_sparse.make_cache(model)
    fed(model, tokens(1, n), cache, (n,))
    per_slot = 2 * SIZE * 4  # key and value of one head, fp32
    slots = (n + SLACK) + 3 * (window - 1 + SLACK)
    assert cache.nbytes == 2 * per_slot * slots and cache.kept == n
    dense = DynamicCache(config=model.config)
    fed(model, tokens(1, n), dense, (n,))
    assert cache.nbytes < 0.35 * sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    told = cost(PerHead((Full(),) * 2 + (ring,) * 6), n, heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE)
    assert told.kv_bytes_held == per_slot * (n + 3 * (window - 1))


TOLD = [("gqa", pattern) for pattern in (*PATTERNS, RING, Strided(4))] + [
    (name, pattern) for name in MODELS if name != "gqa" for pattern in (THREE, RING)
]


@pytest.mark.parametrize(("name", "pattern"), TOLD, ids=range(len(TOLD)))
def test_bytes_are_told_beforehand(name, pattern):
    model, n = patched(pattern, name), 100
    cache = hf_sparse.make_cache(model)
    fed(model, tokens(1, n), cache, (n,))
    settings = hf_sparse.hf.settings(model)
    assert kv_bytes(settings, model.config, n, dtype_bytes=4) == cache.nbytes
    assert kv_bytes(pattern, model.config, n, dtype_bytes=2) == cache.nbytes / 2


def test_bytes_told_bound_those_of_a_text_read_in_steps(small_slack, monkeypatch):
    monkeypatch.setattr("hf_sparse.hf.kv_bytes.SLACK", 3)
    model, ids, cache = patched(THREE), tokens(1, 60), None
    cache = hf_sparse.make_cache(model)
    room = len(cache.layers) * KV_HEADS * 3 * 2 * SIZE * 4
    for start in range(60):
        fed(model, ids[:, start : start + 1], cache, (1,))
        told = kv_bytes(THREE, model.config, start + 1, dtype_bytes=4)
        assert told - room <= cache.nbytes <= told
        assert kv_bytes(THREE, model.config, start + 1, dtype_bytes=4, room=False) == told - room
    with pytest.raises(ValueError, match="got n=0"):
        kv_bytes(THREE, model.config, 0, dtype_bytes=4)


def test_a_step_reads_only_what_its_plan_says(small_slack):
    model, ids, n = patched(THREE), tokens(1, 40), 40
    cache = hf_sparse.make_cache(model)
    fed(model, ids, cache, (n - 1,))
    with recording() as seen:
        logits(model, ids[:, n - 1 :], past_key_values=cache)
    reads = [min(4, n), n, 2 + 5]  # a window, all, sinks and a window
    per_layer = 5 * reads[0] + reads[1] + 2 * reads[2]
    for layer in (0, 1):
        calls = [call for call in seen.calls if call.layer == layer]
        assert len(calls) == 3 and sum(call.pairs for call in calls) == per_layer
        assert sum(call.dense_pairs for call in calls) == n * HEADS
    held_now = [part.layer.held.length for part in cache.layers[0].parts]
    assert held_now[1] == n and max(held_now[0], held_now[2]) <= 2 + 5 + 3


def kinds(pattern, name="gqa"):
    return [type(layer) for layer in hf_sparse.make_cache(patched(pattern, name)).layers]


def test_layers_stay_whole_where_their_key_heads_keep_the_same():
    assert kinds(RING) == [SparseLayer] * 2
    # differing query heads of every key head, differing patterns that all keep everything
    assert kinds(PerHead((RING, Full()) * 4)) == [SparseLayer] * 2
    assert kinds(PerHead((Strided(4),) * 4 + (Full(),) * 4)) == [SparseLayer] * 2
    # the model's own window of 9 leaves the same of both
    wide = PerHead((SlidingWindow(20),) * 4 + (Full(),) * 4)
    assert kinds(wide, "gemma3") == [SparseLayer, RaggedLayer]
    assert kinds(PerLayer((RING, ONE_DENSE))) == [SparseLayer, RaggedLayer]


def test_layers_share_the_accounts_of_what_they_keep():
    cache = hf_sparse.make_cache(patched(PerLayer((ONE_DENSE, PerHead((Full(),) * 4 + (RING,) * 4)))))
    assert len(ragged(cache)) == 2 and len(cache._accounts) == 2


def test_places_keep_the_heads_together(small_slack):
    model = patched(ReRoPE(window=3, pattern=ONE_DENSE))
    cache, ids = hf_sparse.make_cache(model), tokens(1, 26)
    assert not ragged(cache)
    got = fed(model, ids, cache, PREFILLS["chunks"])
    torch.testing.assert_close(got, logits(model, ids, use_cache=False), **CLOSE)


def test_a_latent_cache_keeps_the_heads_together():
    latents = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    options = {**_ROPE, **latents, "num_key_value_heads": 4, "v_head_dim": 8, "first_k_dense_replace": 2}
    model = hf_sparse.patch_model(
        random_model("DeepseekV3ForCausalLM", options), PerHead((Full(),) + (RING,) * 3)
    )
    cache, ids = hf_sparse.make_cache(model), tokens(1, 40)
    assert not ragged(cache)
    got = fed(model, ids, cache, (40,))
    torch.testing.assert_close(got, logits(model, ids, use_cache=False), **CLOSE)
    assert kv_bytes(hf_sparse.hf.settings(model), model.config, 40, dtype_bytes=4) == cache.nbytes


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(ONE_DENSE, "gqa"), (THREE, "gemma3"), (PATTERNS[2], "gpt2")],
    ids=["one-dense", "three", "per-layer"],
)
def test_weights_are_those_of_no_cache_with_zeros_for_what_was_dropped(pattern, name, small_slack):
    model, rows = patched(pattern, name), left_padded((0, 9, 3), 26)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    whole = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    real = (mask == 1)[:, None, :, None]
    cache, begin = hf_sparse.make_cache(model), 0
    for length in (15, 1, 4, 1, 5):
        end = begin + length
        out = model(
            ids[:, begin:end], attention_mask=mask[:, :end], output_attentions=True, past_key_values=cache
        )
        for got, want in zip(out.attentions, whole, strict=True):
            want = want[:, :, begin:end, :end] * real[:, :, begin:end]
            torch.testing.assert_close(got * real[:, :, begin:end], want, **CLOSE)
        begin = end
    assert any(len({part.layer.keys.shape[2] for part in layer.parts}) > 1 for layer in ragged(cache))


def test_attention_computed_by_something_else_is_refused():
    model, ids = patched(ONE_DENSE), tokens(1, 20)
    with computed_by(model, AttentionCall.attend):
        model(ids, use_cache=False)
        with pytest.raises(ValueError, match="computed by something else"):
            model(ids, past_key_values=hf_sparse.make_cache(model))


def test_keys_that_change_behind_the_cache_are_refused(monkeypatch):
    model, ids = patched(ONE_DENSE), tokens(1, 20)
    cache = hf_sparse.make_cache(model)
    update = cache.update
    monkeypatch.setattr(cache, "update", lambda *a, **k: tuple(x * 1 for x in update(*a, **k)))
    with pytest.raises(ValueError, match="changes keys or values between"):
        model(ids, past_key_values=cache)


def test_an_attention_that_never_asks_is_refused(monkeypatch):
    model, ids = patched(ONE_DENSE), tokens(1, 20)
    cache = hf_sparse.make_cache(model)
    monkeypatch.setattr(type(cache), "_take_held_heads", lambda *_: None)
    with pytest.raises(ValueError, match="a layer attended without asking"):
        model(ids, past_key_values=cache)


def test_describe_tells_the_bytes_of_the_cache():
    model, n = patched(PerHead((Full(),) * 2 + (SlidingWindow(64),) * 6)), 2000
    cache = hf_sparse.make_cache(model)
    fed(model, tokens(1, n), cache, (n,))
    without_room = cache.nbytes - len(cache.layers) * KV_HEADS * SLACK * 2 * SIZE * 4
    assert f"holds {without_room / 2**20:.3g} MiB" in hf_sparse.describe(model, seq_len=n)
    assert cost(Full(), 10, constraint=Constraint(False), heads=4, kv_heads=2).kv_bytes_held == 10 * 2 * 512


def test_every_cache_gives_the_same(small_slack):
    model, ids = patched(THREE), tokens(2, 30)
    whole = logits(model, ids, use_cache=False)
    for cache in caches(model).values():
        torch.testing.assert_close(fed(model, ids, cache, (13, 4, *(1,) * 13)), whole, **CLOSE)


def test_a_call_outside_the_model_is_refused():
    cache = hf_sparse.make_cache(patched(ONE_DENSE))
    x = torch.zeros(1, KV_HEADS, 3, SIZE)
    with pytest.raises(ValueError, match="outside a call"):
        cache.update(x, x, 0)
    with pytest.raises(ValueError, match="gives its cache 2 key heads but its config names 4"):
        cache.update(x[:, :2], x[:, :2], 0)
