"""Patching, unpatching, describing; models and processes that do not affect one another."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
import transformers
from tiny_models import ALL, logits, tiny, tokens

import hf_sparse
from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.hf import SparseSettings, settings, settings_from_json, settings_to_json


def test_patching_twice_is_patching_once_with_the_new_pattern():
    ids = tokens(1, 20)
    once = hf_sparse.patch_model(tiny("llama"), "strided", stride=3)
    twice = hf_sparse.patch_model(
        hf_sparse.patch_model(tiny("llama"), "sliding_window", window=2), "strided", stride=3
    )
    assert torch.equal(logits(once, ids), logits(twice, ids))
    assert once.config.to_dict() == twice.config.to_dict()
    hf_sparse.unpatch_model(twice)
    assert torch.equal(logits(twice, ids), logits(tiny("llama"), ids))
    assert twice.config._attn_implementation == "sdpa"


def test_unpatching_an_unpatched_model_does_nothing():
    model = tiny("llama", "eager")
    assert hf_sparse.unpatch_model(model) is model and model.config._attn_implementation == "eager"


def test_patched_restores_an_earlier_patch_and_also_after_an_error():
    ids = tokens(1, 20)
    model = hf_sparse.patch_model(tiny("llama"), "strided", stride=3)
    before = logits(model, ids)
    with pytest.raises(KeyError), hf_sparse.patched(model, SlidingWindow(2) | StreamingLLM(1, 2)) as same:
        assert same is model and model.config._attn_implementation == "sparse_custom"
        assert not torch.equal(logits(model, ids), before)
        raise KeyError
    assert torch.equal(logits(model, ids), before) and settings(model).pattern == Strided(3)
    hf_sparse.unpatch_model(model)
    with hf_sparse.patched(model, "sliding_window", window=2, layers=[0]):
        assert settings(model).layers == (0,)
    assert settings(model) is None and not hasattr(model.config, "sparse_attention")
    assert torch.equal(logits(model, ids), logits(tiny("llama"), ids))


def test_unpatching_after_a_nested_patched_gives_the_first_attention_back():
    model = hf_sparse.patch_model(tiny("llama", "eager"), "strided", stride=3)
    with hf_sparse.patched(model, "sliding_window", window=2):
        pass
    assert hf_sparse.unpatch_model(model).config._attn_implementation == "eager"


def test_the_trial_forward_puts_back_what_a_model_draws_and_counts():
    model = tiny("llama")
    model.register_buffer("seen", torch.zeros(1))

    def draw_and_count(module, args):
        module.seen += torch.rand(1)
        module.seen = module.seen + 1

    model.register_forward_pre_hook(draw_and_count)
    buffer, random = model.seen, torch.get_rng_state()
    hf_sparse.patch_model(model, "sliding_window", window=4)
    assert model.seen is buffer and not buffer.any() and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ALL)
def test_the_trial_forward_leaves_no_trace(name):
    model = tiny(name).train()
    model.get_input_embeddings().eval()  # flags may differ between modules
    flags = [m.training for m in model.modules()]
    buffers = {k: (v, v.clone()) for k, v in model.named_buffers()}
    random = torch.get_rng_state()
    hf_sparse.patch_model(model, "sliding_window", window=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == flags
    for key, buffer in model.named_buffers():
        assert buffer is buffers[key][0] and torch.equal(buffer, buffers[key][1])
    assert all(p.grad is None for p in model.parameters())


def test_models_that_share_a_config_do_not_affect_each_other():
    config = tiny("llama").config
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    ids = tokens(1, 20)
    dense = logits(second, ids)
    hf_sparse.patch_model(first, "sliding_window", window=2)
    assert torch.equal(logits(second, ids), dense) and not hasattr(config, "sparse_attention")
    hf_sparse.patch_model(second, "streaming_llm", sinks=1, window=2)
    interleaved = [logits(m, ids) for m in (first, second, first, second)]
    assert torch.equal(interleaved[0], interleaved[2]) and torch.equal(interleaved[1], interleaved[3])
    alone = hf_sparse.patch_model(copy.deepcopy(hf_sparse.unpatch_model(first)), "sliding_window", window=2)
    assert torch.equal(logits(alone, ids), interleaved[0])


def test_a_copy_is_patched_and_independent():
    ids = tokens(1, 20)
    for name in ("llama", "modernbert"):
        model = hf_sparse.patch_model(tiny(name), "sliding_window", window=2)
        before = logits(model, ids)
        twin = copy.deepcopy(model)
        hf_sparse.unpatch_model(model)
        assert torch.equal(logits(twin, ids), before)
        hf_sparse.unpatch_model(twin)
        assert torch.equal(logits(twin, ids), logits(model, ids))
        assert not any(m._forward_pre_hooks for m in twin.modules())


def test_the_config_of_a_patched_model_can_be_pickled():
    model = hf_sparse.patch_model(tiny("llama"), SlidingWindow(3) | Longformer(2, (0, 4)), layers=[1])
    config = pickle.loads(pickle.dumps(model.config))
    assert config._attn_implementation == "sparse_custom"
    assert settings_from_json(config.sparse_attention) == settings(model)


def test_names_work_in_from_config_and_set_attn_implementation():
    ids = tokens(1, 12)
    config = tiny("llama").config
    torch.manual_seed(0)
    named = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sparse_streaming_llm"
    ).eval()
    assert settings(named) == SparseSettings(StreamingLLM())
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.testing.assert_close(logits(named, ids), logits(dense, ids), atol=1e-5, rtol=1e-4)
    hf_sparse.patch_model(named, "sliding_window", window=2)
    hf_sparse.unpatch_model(named)
    assert named.config._attn_implementation == "sdpa" and torch.equal(logits(named, ids), logits(dense, ids))
    named.set_attn_implementation("sparse_custom")
    with pytest.raises(ValueError, match="'sparse_custom' has no saved pattern"):
        logits(named, ids)


def test_a_users_pattern_gets_a_name_and_is_saved_with_its_options():
    from hf_sparse.patterns.registry import _PATTERNS

    try:

        @hf_sparse.register_pattern("every_third_of_tests")
        @dataclass(frozen=True)
        class EveryThird(hf_sparse.Pattern):
            steps: tuple[int, ...] = (3,)

            def allows(self, context, head, query, key):
                return (query - key) % self.steps[0] == 0

        model = hf_sparse.patch_model(tiny("llama"), "every_third_of_tests", steps=(3,), layers=[0, 1])
        assert model.config._attn_implementation == "sparse_every_third_of_tests"
        ids = tokens(1, 20)
        strided = hf_sparse.patch_model(tiny("llama"), "strided", stride=3)
        torch.testing.assert_close(logits(model, ids), logits(strided, ids), atol=1e-5, rtol=1e-4)
        assert settings_from_json(model.config.sparse_attention).pattern == EveryThird((3,))
    finally:
        _PATTERNS.pop("every_third_of_tests", None)


def test_seq_len_resolves_options_once():
    from hf_sparse.patterns.registry import _PATTERNS

    try:

        @hf_sparse.register_pattern("half_of_tests")
        @dataclass(frozen=True)
        class Half(SlidingWindow):
            def resolve(self, seq_len):
                return SlidingWindow(seq_len // 2)

        model = hf_sparse.patch_model(tiny("llama"), "half_of_tests", seq_len=20)
        assert settings(model).pattern == SlidingWindow(10)
    finally:
        _PATTERNS.pop("half_of_tests", None)


def test_the_text_model_of_a_composite_is_patched_and_its_tower_is_not():
    common = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**common, "vocab_size": 64, "num_hidden_layers": 2}
    vision = {**common, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = tokens(1, 20)
    dense = logits(model, ids)
    hf_sparse.patch_model(model, "sliding_window", window=2)
    assert model.config.text_config._attn_implementation == "sparse_sliding_window"
    assert model.config.vision_config._attn_implementation == "sdpa" == model.config._attn_implementation
    assert (logits(model, ids) - dense).abs().max() > 1e-5
    assert "sliding_window(window=2)" in hf_sparse.describe(model)
    hf_sparse.unpatch_model(model)
    assert torch.equal(logits(model, ids), dense)


def test_threads_that_patch_and_run_their_own_models():
    ids, failures = tokens(1, 24), []
    expected = {
        w: logits(hf_sparse.patch_model(tiny("llama"), "sliding_window", window=w), ids) for w in range(1, 5)
    }

    def work(window):
        try:
            for _ in range(3):
                model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=window)
                assert torch.equal(logits(model, ids), expected[window])
        except (AssertionError, ValueError, RuntimeError, KeyError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1 + i % 4,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_every_attention_call_is_recorded():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    with hf_sparse.recording() as recorder:
        logits(model, tokens(1, 20))
    assert [call.layer for call in recorder.calls] == [0, 1]


def test_describe_says_what_runs():
    model = tiny("gemma2", "eager")
    assert hf_sparse.describe(model) == "Gemma2ForCausalLM: dense attention ('eager')"
    hf_sparse.patch_model(model, "streaming_llm", sinks=2, window=20, layers=[0])
    text = hf_sparse.describe(model, seq_len=100)
    assert "streaming_llm(sinks=2, window=20)" in text and "1 of 2 sparse (0); the others dense" in text
    assert "soft-capped at 2.0" in text and "own window of 9 keys" in text and "sinks" in text
    assert "at 100 tokens: density" in text
    model.set_attn_implementation("eager")
    text = hf_sparse.describe(model)
    assert "dense attention ('eager')" in text and "stored in its config but not active" in text
    assert "in training torch, operator tiled (attention dropout is 0.1)" in hf_sparse.describe(
        hf_sparse.patch_model(tiny("gpt2"), "full")
    )


def test_describe_counts_the_pairs_of_the_pattern_under_the_models_own_window():
    n, pattern = 40, SlidingWindow(20)
    model = hf_sparse.patch_model(tiny("gemma2"), pattern)
    causal, near = torch.ones(n, n).tril().bool(), torch.ones(n, n).triu(-8).bool()
    sparse = pattern.mask(n)[0].sum() + (pattern.mask(n)[0] & near).sum()
    density = float(sparse / (causal.sum() + (causal & near).sum()))
    assert f"density {density:.3f} in the sparse layers" in hf_sparse.describe(model, seq_len=n)


def test_settings_survive_json():
    for pattern in (SlidingWindow(3), Longformer(4, (0, 9)) | Strided(2, "absolute")):
        written = settings_to_json(SparseSettings(pattern, (0, 2), "reference"))
        assert settings_from_json(written) == SparseSettings(pattern, (0, 2), "reference")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"version": 2, "pattern": {"name": "full"}}, "has version 2, this hf_sparse reads version 1"),
        ({"version": 1, "pattern": {"name": "fulll"}}, "unknown pattern 'fulll'"),
        ({"version": 1, "pattern": {"name": "strided", "options": {"stride": 0}}}, "stride must be >= 1"),
        ({"version": 1, "pattern": {"name": "strided", "options": [1]}}, "must be a dict"),
        ({"version": 1, "pattern": "full"}, "a saved pattern must be"),
        ({"version": 1, "pattern": {"union": []}}, "a saved pattern must be"),
        ({"version": 1, "pattern": {"name": "full"}, "layers": ["0"]}, "must list layer indices"),
        ({"version": 1, "pattern": {"name": "full"}, "backend": "cuda"}, "unknown backend"),
        ({"version": 1, "pattern": {"name": "full"}, "heads": 1}, "unknown keys"),
        ({"pattern": {"name": "full"}}, "must hold 'version' and 'pattern'"),
        ("full", "must hold 'version' and 'pattern'"),
        ({"version": 1, "pattern": {1, 2}}, "is not plain JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_saved_settings_that_cannot_be_read_are_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        settings_from_json(saved)


def test_every_pattern_has_an_attention_and_a_mask_function():
    names = {"sparse_custom", *("sparse_" + name for name in hf_sparse.available_patterns())}
    assert names <= set(transformers.AttentionInterface().valid_keys())
    assert names <= set(transformers.AttentionMaskInterface().valid_keys())


def test_a_subclass_needs_a_name_of_its_own():
    @dataclass(frozen=True)
    class Narrower(SlidingWindow):
        def allows(self, context, head, query, key):
            return query - key < 2

    model = tiny("llama")
    for pattern in (Narrower(4), Narrower(4) | Full()):
        with pytest.raises(ValueError, match="Narrower has no name of its own"):
            hf_sparse.patch_model(model, pattern)


def test_unpatching_restores_the_attention_chosen_last():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    hf_sparse.patch_model(model, "sliding_window")
    model.set_attn_implementation("sdpa")
    hf_sparse.patch_model(model, "sliding_window")
    assert hf_sparse.unpatch_model(model).config._attn_implementation == "sdpa"
