"""What does not fit is refused with its reason before a token is computed, and the cache goes on as if never asked."""

import copy

import pytest
import torch
from caching import CLOSE, decoder, fed
from tiny_models import logits, tiny, tokens
from transformers import DynamicCache, StaticCache

import hf_sparse
from hf_sparse import SlidingWindow, StreamingLLM, Strided
from hf_sparse.hf.mask import running_forwards
from hf_sparse.plan import held

PATTERN = StreamingLLM(sinks=2, window=4)
PLACED = StreamingLLM(sinks=2, window=4, positions="cache")
IDS = tokens(2, 40)
GREEDY = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)


def filled(model, kind="ours"):
    """Return a cache that holds the first 20 tokens."""
    config = model.config
    cache = hf_sparse.make_cache(model) if kind == "ours" else DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=30)
    fed(model, IDS[:, :20], cache, (20,))
    return cache


def goes_on(model, cache):
    """Assert that the cache continues the first 20 tokens."""
    assert cache.get_seq_length() == 20
    got = fed(model, IDS[:, 20:28], cache, (3, *(1,) * 5))
    torch.testing.assert_close(got, logits(model, IDS[:, :28], use_cache=False)[:, 20:], **CLOSE)


def refused(model, match, call):
    """Assert that `call` raises before any attention is computed."""
    with hf_sparse.recording() as ran, pytest.raises(ValueError, match=match):
        call()
    assert not ran.calls


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("kind", ["ours", "dynamic", "static"])
@pytest.mark.parametrize(
    ("before", "after"), [(PATTERN, SlidingWindow(window=4)), (PATTERN, PLACED)], ids=str
)
def test_a_pattern_changed_between_two_calls(before, after, kind, generate):
    model = decoder("llama", before)
    cache = filled(model, kind)
    hf_sparse.patch_model(model, after)
    match = "this cache was made for .*streaming_llm" if kind == "ours" else "was filled under streaming_llm"
    if generate:
        refused(model, match, lambda: model.generate(IDS[:, :25], past_key_values=cache, **GREEDY))
    else:
        refused(model, match, lambda: logits(model, IDS[:, 20:21], past_key_values=cache))
    hf_sparse.patch_model(model, before)
    goes_on(model, cache)


def test_a_pattern_changed_before_the_first_call_is_refused_too():
    model = decoder("llama", PATTERN)
    cache = hf_sparse.make_cache(model)
    hf_sparse.patch_model(model, Strided(stride=4))
    refused(
        model, "make a new one with hf_sparse.make_cache", lambda: logits(model, IDS, past_key_values=cache)
    )


def test_a_cache_of_another_model():
    model, twin, other = decoder("llama", PATTERN), decoder("llama", PATTERN), decoder("qwen3", PATTERN)
    cache = filled(model)
    for stranger in (twin, other):
        match = "made for another model"
        refused(stranger, match, lambda m=stranger: logits(m, IDS[:, 20:21], past_key_values=cache))
        refused(stranger, match, lambda m=stranger: m.generate(IDS[:, :25], past_key_values=cache, **GREEDY))
    goes_on(model, cache)


def test_a_cache_in_an_unpatched_model():
    model = decoder("llama", PATTERN)
    cache = filled(model)
    with pytest.raises(ValueError, match="outside a call of its patched model"):
        logits(tiny("llama"), IDS[:, 20:21], past_key_values=cache)
    hf_sparse.unpatch_model(model)
    with pytest.raises(ValueError, match="outside a call of its patched model"):
        logits(model, IDS[:, 20:21], past_key_values=cache)
    hf_sparse.patch_model(model, PATTERN)
    goes_on(model, cache)


def test_another_attention_in_the_place_of_ours():
    model = decoder("llama", PATTERN)
    cache = filled(model)
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    refused(
        model, "but 'eager' attention is set", lambda: logits(model, IDS[:, 20:21], past_key_values=cache)
    )
    model.set_attn_implementation(name)
    goes_on(model, cache)


@pytest.mark.parametrize(("name", "learned"), [("gpt2", 128), ("opt", 130)])
def test_a_text_longer_than_the_learned_positions(name, learned):
    model, long = decoder(name, PATTERN), tokens(2, learned + 3)
    whole = logits(model, IDS, use_cache=False)
    match = f"the text has {learned + 3} tokens but .* has learned {learned} positions"
    refused(model, match, lambda: logits(model, long))
    refused(model, match, lambda: model.generate(long, **GREEDY))
    cache, behind = hf_sparse.make_cache(model), learned - 2
    fed(model, long[:, :behind], cache, (behind,))
    match = f"the text has {learned + 1} tokens"
    refused(model, match, lambda: logits(model, long[:, behind : behind + 3], past_key_values=cache))
    assert cache.get_seq_length() == behind
    assert torch.isfinite(logits(model, long[:, behind:learned], past_key_values=cache)).all()
    torch.testing.assert_close(logits(model, IDS, use_cache=False), whole)


def test_a_static_cache_shorter_than_the_text():
    model = decoder("llama", PATTERN)
    short = StaticCache(config=model.config, max_cache_len=16)
    match = "the static cache has 16 slots but 20 tokens have to go in"
    refused(model, match, lambda: logits(model, IDS[:, :20], past_key_values=short))
    match = (
        "hold tokens 0 to 16: make a static cache longer"  # found where generate makes the masks beforehand
    )
    refused(model, match, lambda: model.generate(IDS[:, :20], past_key_values=short, **GREEDY))
    cache = filled(model, "static")
    refused(model, "30 slots but 31 tokens", lambda: logits(model, IDS[:, 20:31], past_key_values=cache))
    goes_on(model, cache)


@pytest.mark.parametrize("kind", ["ours", "dynamic"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 20), (2, 22), (1, 21), (3, 21)], ids=str)
def test_a_mask_that_does_not_fit(kind, shape):
    model = decoder("llama", PATTERN)
    cache, mask = filled(model, kind), torch.ones(shape, dtype=torch.long)
    match = (
        rf"attention_mask is \[{shape[0]}, {shape[1]}\] but the call has 2 rows of 21 tokens, 20 cached ones"
    )
    refused(model, match, lambda: logits(model, IDS[:, 20:21], past_key_values=cache, attention_mask=mask))
    goes_on(model, cache)


@pytest.mark.parametrize("length", [20, 12, 25])
def test_a_text_that_the_cache_has_seen_already(length):
    """transformers then hands in the whole text again, or its end, or nothing."""
    model = decoder("llama", PATTERN)
    cache = filled(model)
    if length == 25:
        refused(model, "no new token", lambda: logits(model, IDS[:, :0], past_key_values=cache))
    else:
        text = IDS[:, :length]
        refused(model, "would be read twice", lambda: model.generate(text, past_key_values=cache, **GREEDY))
    goes_on(model, cache)


def test_padding_that_contradicts_what_the_cache_has_seen():
    model, mask = decoder("llama", PATTERN), torch.ones(2, 24, dtype=torch.long)
    mask[1, :6] = 0
    ids = IDS.masked_fill(torch.nn.functional.pad(mask, (0, 16), value=1) == 0, 1)
    whole = logits(model, ids[:, :24], attention_mask=mask, use_cache=False)
    cache = hf_sparse.make_cache(model)
    fed(model, ids[:, :20], cache, (20,), mask)
    match = "of the 20 tokens seen in row 1, 14 were real by the masks of earlier calls but 20 are"
    new = ids[:, 20:24]
    refused(model, match, lambda: logits(model, new, past_key_values=cache))
    ones = {"attention_mask": torch.ones_like(mask)}
    refused(model, match, lambda: logits(model, new, past_key_values=cache, **ones))
    refused(model, match, lambda: model.generate(ids[:, :24], past_key_values=cache, **ones, **GREEDY))
    got = logits(model, new, past_key_values=cache, attention_mask=mask)
    torch.testing.assert_close(got, whole[:, 20:], **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows(rows):
    model = decoder("llama", PATTERN)
    cache, new = filled(model), tokens(rows, 1)
    match = f"the cache holds 2 rows but the call has {rows}"
    refused(model, match, lambda: logits(model, new, past_key_values=cache))
    refused(model, match, lambda: model.generate(tokens(rows, 25), past_key_values=cache, **GREEDY))
    goes_on(model, cache)


@pytest.mark.parametrize("pattern", [PATTERN, PLACED], ids=str)
def test_tokens_taken_back_whose_keys_are_gone(pattern):
    model = decoder("llama", pattern)
    cache = filled(model)
    with pytest.raises(
        ValueError, match="18 tokens are to be taken back but keys that the sequence then needs"
    ):
        cache.crop(-18)
    with pytest.raises(ValueError, match="as a negative number, got 5"):
        cache.crop(5)
    goes_on(model, cache)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_that_stops_in_the_middle(layer):
    model = decoder("llama", PATTERN)
    cache, untouched = filled(model), filled(model)

    def stop(*args):
        raise RuntimeError("stopped")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        logits(model, IDS[:, 20:21], past_key_values=cache)
    hook.remove()
    if layer == 1:  # every layer has the keys of the token: it counts as seen
        assert cache.get_seq_length() == 21
        torch.testing.assert_close(
            fed(model, IDS[:, 21:28], cache, (1,) * 7),
            logits(model, IDS[:, :28], use_cache=False)[:, 21:],
            **CLOSE,
        )
    else:
        refused(model, "stopped in the middle", lambda: logits(model, IDS[:, 20:21], past_key_values=cache))
        cache.reset()
        fed(model, IDS[:, :20], cache, (20,))
        goes_on(model, cache)
    goes_on(model, untouched)


def test_a_forward_that_stops_before_the_first_layer():
    model = decoder("llama", PATTERN)
    cache = filled(model)
    with pytest.raises(IndexError):
        logits(model, torch.full((2, 1), 10_000), past_key_values=cache)  # no such token
    goes_on(model, cache)


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1"])
def test_an_interrupt_in_the_middle(where):
    """After KeyboardInterrupt PyTorch runs no hook; the next call must know nevertheless."""
    model = decoder("llama", PATTERN)
    cache = filled(model)

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.model.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model, IDS[:, 20:21], past_key_values=cache)
    hook.remove()
    if where == "layers.1":
        for _ in range(2):
            refused(
                model, "stopped in the middle", lambda: logits(model, IDS[:, 20:21], past_key_values=cache)
            )
        cache.reset()
        fed(model, IDS[:, :20], cache, (20,))
    goes_on(model, cache)
    assert not running_forwards()


@pytest.mark.parametrize("pattern", [PATTERN, PLACED], ids=str)
def test_packed_samples_cannot_be_continued(pattern):
    model = decoder("llama", pattern)
    cache = hf_sparse.make_cache(model)
    restart = torch.cat((torch.arange(12), torch.arange(8)))[None]
    with pytest.raises(ValueError, match="position_ids restart"):
        logits(model, IDS[:1, :20], past_key_values=cache, position_ids=restart)
    cache.reset()
    fed(model, IDS[:, :20], cache, (20,))
    goes_on(model, cache)


def test_what_has_no_use_for_a_cache():
    with pytest.raises(ValueError, match="make_cache needs a patched model"):
        hf_sparse.make_cache(tiny("llama"))
    with pytest.raises(ValueError, match="is bidirectional"):
        hf_sparse.make_cache(hf_sparse.patch_model(tiny("bert"), "sliding_window", window=4))


def test_a_copied_model_uses_a_cache_of_its_own():
    model = decoder("llama", PATTERN)
    cache, twin = filled(model), copy.deepcopy(model)
    refused(twin, "made for another model", lambda: logits(twin, IDS[:, 20:21], past_key_values=cache))
    goes_on(twin, filled(twin))
    goes_on(model, cache)
