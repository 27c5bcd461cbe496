"""Layers that share keys or hold latents, and text models that get their masks from a model around them."""

import pytest
import torch
from caching import CLOSE, caches, fed, left_padded
from rotary_models import REFUSED
from tiny_models import _HYBRID, _ROPE, logits, random_model

import hf_sparse
from hf_sparse import PerLayer, SlidingWindow, SparseTransformerFixed, StreamingLLM
from hf_sparse.hf.stored_settings import key_sources
from hf_sparse.plan import held

FIXED = SparseTransformerFixed(block=6, summary=2)
PLACED = StreamingLLM(sinks=2, window=4, positions="cache")
# Of four layers the last two attend to the keys of the first two.
_SHARING = {
    **_ROPE,
    **_HYBRID,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
SPECIFICATIONS = {
    "gemma3n": (
        "Gemma3nForCausalLM",
        {
            **_SHARING,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": ("Gemma4ForCausalLM", {**_SHARING, "global_head_dim": 8}),
    "gemma3 with images": (  # the model around the text model makes the masks
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_ROPE, **_HYBRID, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
            "boi_token_index": 62,
            "eoi_token_index": 61,
        },
    ),
    "ministral3": ("Ministral3ForCausalLM", {**_ROPE, "head_dim": 8}),  # scales queries by their position
    "deepseek_v3": ("DeepseekV3ForCausalLM", REFUSED["deepseek_v2"][1]),
}
DIFFERENT = PerLayer(
    (SlidingWindow(window=3), StreamingLLM(sinks=1, window=6), FIXED, SlidingWindow(window=8))
)
CASES = [
    (name, p) for name in SPECIFICATIONS for p in (FIXED, PLACED) if (name, p) != ("deepseek_v3", PLACED)
]
CASES += [(name, DIFFERENT) for name in ("gemma3n", "gemma4")]


def built(name):
    return random_model(*SPECIFICATIONS[name])


@pytest.mark.parametrize(("name", "pattern"), CASES, ids=str)
def test_every_cache_gives_what_no_cache_gives(name, pattern, monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)
    monkeypatch.setattr("hf_sparse.hf.cache.SLACK", 3)
    model, rows = hf_sparse.patch_model(built(name), pattern), left_padded((0, 6), 30)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    for kind, cache in caches(model).items():
        if kind == "static":
            continue
        for lengths in ((14, *(1,) * 16), (7, 1, 11, 1, 10)):
            got = fed(model, ids, cache, lengths, mask)
            torch.testing.assert_close(
                got[mask == 1], whole[mask == 1], atol=1e-5 * float(whole.abs().max()), rtol=1e-4
            )
            cache = caches(model)[kind]
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    out = model.generate(**rows, return_dict_in_generate=True, **greedy)
    assert torch.equal(out.sequences, model.generate(**rows, use_cache=False, **greedy))
    if pattern is not DIFFERENT:
        assert out.past_key_values.kept < 30


def test_layers_that_share_keys_are_found():
    assert key_sources(built("gemma3n").config) == [0, 1, 0, 1]
    assert key_sources(built("ministral3").config) == [0, 1]


def test_the_last_queries_of_a_mask_are_those_of_the_text():
    """Gemma 4 goes on with the last token alone where others share its keys: the pattern must be that token's."""
    model, rows = hf_sparse.patch_model(built("gemma4"), PLACED), left_padded((0, 6), 30)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    for count in (1, 3):
        last = logits(model, ids, attention_mask=mask, use_cache=False, logits_to_keep=count)
        torch.testing.assert_close(last, whole[:, -count:], **CLOSE)
    packed = {"position_ids": torch.cat((torch.arange(18), torch.arange(12)))[None], "use_cache": False}
    whole = logits(model, ids[:1], **packed)
    last = logits(model, ids[:1], logits_to_keep=3, **packed)
    torch.testing.assert_close(last, whole[:, -3:], **CLOSE)
