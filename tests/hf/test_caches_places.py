"""Places in the cache: what a token sees is what a model sees that is given only the kept tokens, from place 0 on."""

import copy

import pytest
import torch
import transformers
from caching import CLOSE, caches, decoder, fed, left_padded
from places_oracle import dense_with_places
from rotary_models import ROTATED
from tiny_models import _ROPE, logits, tiny, tokens

import hf_sparse
from hf_sparse import PerLayer, ReRoPE, SelfExtend, SlidingWindow, StreamingLLM, Strided
from hf_sparse.plan import held

SINKS, WINDOW = 2, 5
PATTERN = StreamingLLM(sinks=SINKS, window=WINDOW, positions="cache")
ROTARY = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox"]
LEARNED = ["gpt2", "opt"]


@pytest.fixture
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)
    monkeypatch.setattr("hf_sparse.hf.cache.SLACK", 3)  # the base moves every 9 tokens


def one_layer(class_name, options):
    """Return a model of one layer, in which keys and values depend on their own token alone."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**{**options, "num_hidden_layers": 1}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    model.set_attn_implementation("eager")
    return model.eval()


def from_scratch(model, ids):
    """Return the logits [N, V] of each token among the sinks and its window, computed at places 0, 1, 2, ..."""
    rows = []
    for n in range(1, ids.shape[1] + 1):
        kept = ids[:, :n] if n <= SINKS + WINDOW else torch.cat((ids[:, :SINKS], ids[:, n - WINDOW : n]), 1)
        rows.append(logits(model, kept, use_cache=False)[0, -1])
    return torch.stack(rows)


ONE_LAYER = {
    "llama": ("LlamaForCausalLM", _ROPE),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in _ROPE.items() if k != "num_key_value_heads"}),
    **{name: ROTATED[name] for name in ("linear", "yarn", "llama3", "stablelm", "cohere", "glm")},
}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_equals_recomputing_the_kept_tokens_from_scratch(name, small_slack):
    model, ids = one_layer(*ONE_LAYER[name]), tokens(1, 70)
    expected = from_scratch(model, ids)
    hf_sparse.patch_model(model, PATTERN)
    torch.testing.assert_close(logits(model, ids, use_cache=False)[0], expected, **CLOSE)
    for lengths in ((70,), (20, 30, *(1,) * 20), (1,) * 70):
        got = fed(model, ids, hf_sparse.make_cache(model), lengths)
        torch.testing.assert_close(got[0], expected, **CLOSE)


@pytest.mark.parametrize("name", ROTARY)
def test_far_past_the_positions_of_training_in_every_layer(name, small_slack):
    ids = tokens(1, 300)
    expected = dense_with_places(name, PATTERN, ids)
    model = decoder(name, PATTERN)
    cache = hf_sparse.make_cache(model)
    got = fed(model, ids, cache, (150, 10, 40, *(1,) * 100))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert model.config.max_position_embeddings == 128 and cache.get_seq_length() == 300


def test_the_base_moves_with_the_real_slack_too():
    ids, model = tokens(1, 520), decoder("llama", PATTERN)
    cache, bases, parts = hf_sparse.make_cache(model), set(), []
    for start, stop in [(0, 100), *((n, n + 1) for n in range(100, 520))]:
        parts.append(logits(model, ids[:, start:stop], past_key_values=cache))
        bases.add(cache._base)
    torch.testing.assert_close(
        torch.cat(parts, 1), dense_with_places("llama", PATTERN, ids), atol=2e-5, rtol=1e-4
    )
    assert len(bases) == 4 and 520 - max(bases) <= 2 * (SINKS + WINDOW) + held.SLACK


@pytest.mark.parametrize("name", [*ROTARY, *LEARNED])
def test_rows_that_begin_later_see_the_same(name, small_slack):
    model, rows = decoder(name, PATTERN), left_padded((0, 21, 4), 60)
    batch = fed(
        model, rows["input_ids"], hf_sparse.make_cache(model), (30, *(1,) * 30), rows["attention_mask"]
    )
    for row, pads in enumerate((0, 21, 4)):
        alone = rows["input_ids"][row : row + 1, pads:]
        for cache in (None, hf_sparse.make_cache(model)):
            lengths = (60 - pads,) if cache is None else (7, *(1,) * (53 - pads))
            got = (
                logits(model, alone, use_cache=False) if cache is None else fed(model, alone, cache, lengths)
            )
            torch.testing.assert_close(batch[row, pads:], got[0], **CLOSE)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_are_places_and_the_rest_is_the_mask(name, mask, small_slack):
    n = 200  # beyond the 128 positions that were learned
    ids, place = tokens(1, n), torch.arange(n).clamp(max=SINKS + WINDOW - 1)[None]
    allowed = PATTERN.mask(n, n)[0]
    bias = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    expected = logits(tiny(name, "eager"), ids, attention_mask=bias, position_ids=place)
    model, seen = decoder(name, PATTERN), {"attention_mask": torch.ones_like(ids)} if mask else {}
    torch.testing.assert_close(logits(model, ids, use_cache=False, **seen), expected, **CLOSE)
    torch.testing.assert_close(logits(model, ids, **seen), expected, **CLOSE)
    for cache in caches(model, 220).values():
        got = fed(model, ids, cache, (120, 40, *(1,) * 40), seen.get("attention_mask"))
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", LEARNED)
def test_packed_samples_under_learned_places(name):
    model, a, b = decoder(name, PATTERN), tokens(1, 25, seed=1), tokens(1, 14, seed=2)
    places = torch.cat((torch.arange(25), torch.arange(14)))[None]
    packed = logits(model, torch.cat((a, b), 1), position_ids=places, use_cache=False)
    alone = torch.cat([logits(model, x, use_cache=False) for x in (a, b)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("name", ["llama", *LEARNED])
def test_a_mask_without_padding_hides_no_packed_samples(name):
    model, ids = decoder(name, PATTERN), tokens(1, 39)
    alone = torch.cat([logits(model, x, use_cache=False) for x in ids.split((25, 14), 1)], 1)
    packed = {"position_ids": torch.cat((torch.arange(25), torch.arange(14)))[None], "use_cache": False}
    got = logits(model, ids, attention_mask=torch.ones_like(ids), **packed)
    torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("name", ["llama", *LEARNED])
def test_padding_counts_more_than_position_ids(name):
    model, rows = decoder(name, PATTERN), left_padded((0, 6), 30)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    got = logits(model, ids, attention_mask=mask, position_ids=torch.arange(30)[None], use_cache=False)
    expected = logits(model, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize(
    "pattern",
    [
        ReRoPE(window=4, pattern=StreamingLLM(sinks=2, window=9)),
        SelfExtend(group=3, window=4, pattern=Strided(4, anchor="absolute") | SlidingWindow(9)),
        SelfExtend(group=2, window=5),
        PerLayer((PATTERN, ReRoPE(window=3))),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_other_places_equal_the_oracle_from_a_cache(name, pattern, small_slack):
    ids, model = tokens(1, 90), decoder(name, pattern)
    expected = dense_with_places(name, pattern, ids)
    for cache in caches(model, 100).values():
        got = fed(model, ids, cache, (33, 17, *(1,) * 40))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_generation_goes_on_past_learned_positions():
    model, rows = decoder("gpt2", PATTERN), left_padded((0, 6), 17)
    greedy = {"do_sample": False, "max_new_tokens": 150, "pad_token_id": 1}
    out = model.generate(**rows, **greedy)
    assert out.shape == (2, 167)
    assert torch.equal(out, model.generate(**rows, use_cache=False, **greedy))


def test_layers_without_the_pattern_keep_positions_of_the_text(small_slack):
    model, ids = decoder("llama", PATTERN, layers=[1]), tokens(1, 60)
    whole = logits(model, ids, use_cache=False)
    cache = hf_sparse.make_cache(model)
    torch.testing.assert_close(fed(model, ids, cache, (20, *(1,) * 40)), whole, **CLOSE)
    assert cache._base == 0  # a dense layer sees every distance


def test_the_first_keys_are_never_turned(small_slack):
    model, ids = decoder("llama", PATTERN), tokens(1, 120)
    cache = hf_sparse.make_cache(model)
    fed(model, ids[:, :30], cache, (30,))
    before = [layer.keys[:, :, :SINKS].clone() for layer in cache.layers]
    fed(model, ids[:, 30:], cache, (1,) * 90)
    assert cache._base > 60
    assert all(
        torch.equal(layer.keys[:, :, :SINKS], b) for layer, b in zip(cache.layers, before, strict=True)
    )


def test_half_precision_follows_full_precision(small_slack):
    ids = tokens(1, 100)
    exact = decoder("llama", PATTERN)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    whole = logits(exact, ids, use_cache=False)
    plain = (logits(half, ids, use_cache=False) - whole).abs().mean()
    stepped = (fed(half, ids, hf_sparse.make_cache(half), (20, *(1,) * 80)) - whole).abs().mean()
    assert stepped <= 2 * plain


def test_a_row_that_is_mostly_padding_keeps_its_first_keys_at_their_places(small_slack):
    """The base may not move while some row's first keys lie among those that it turns."""
    model, rows = decoder("llama", PATTERN), left_padded((0, 58), 90)
    ids, mask, cache = rows["input_ids"], rows["attention_mask"], hf_sparse.make_cache(model)
    got = fed(model, ids, cache, (60, *(1,) * 30), mask)
    torch.testing.assert_close(got[1, 58:], logits(model, ids[1:, 58:], use_cache=False)[0], **CLOSE)
    torch.testing.assert_close(got[0], logits(model, ids[:1], use_cache=False)[0], **CLOSE)
    assert cache._base > 0
