"""Every way to generate gives, from our cache, what it gives from transformers' own."""

import copy
import threading

import pytest
import torch
from caching import CLOSE, decoder, left_padded
from tiny_models import logits, tokens
from transformers import DynamicCache, TextStreamer, pipeline

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, SparseTransformerFixed, StreamingLLM
from hf_sparse.hf.cache import SparseCache
from hf_sparse.plan import held

PLACED = StreamingLLM(sinks=2, window=4, positions="cache")
PATTERNS = [Longformer(window=3, global_tokens=(0, 7)), SparseTransformerFixed(block=6, summary=2), PLACED]
NEW = {
    "max_new_tokens": 14,
    "pad_token_id": 1,
    "suppress_tokens": [1],
}  # where a pad is said, generate hides it
GREEDY = {"do_sample": False, **NEW}


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)
    monkeypatch.setattr("hf_sparse.hf.cache.SLACK", 3)


def dynamic(model):
    return DynamicCache(config=model.config.get_text_config())


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "early stopping": {
        "num_beams": 3,
        "do_sample": False,
        "early_stopping": True,
        "eos_token_id": [9, 30, 41],
    },
    "eos": {"do_sample": False, "eos_token_id": [9, 30, 41, 50]},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 5},
    "beams after chunks": {"num_beams": 3, "do_sample": False, "prefill_chunk_size": 4},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_same_tokens_as_with_a_dynamic_cache(pattern, way):
    model, rows, outs = decoder("llama", pattern), left_padded((0, 6, 1)), []
    for cache in ({}, {"past_key_values": dynamic(model)}, {"past_key_values": hf_sparse.make_cache(model)}):
        torch.manual_seed(7)
        outs.append(model.generate(**rows, **cache, **NEW, **WAYS[way], return_dict_in_generate=True))
    assert type(outs[1].past_key_values) is DynamicCache
    assert isinstance(outs[0].past_key_values, SparseCache) and isinstance(
        outs[2].past_key_values, SparseCache
    )
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[2].sequences, outs[1].sequences)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "falcon_h1"])
def test_a_dialogue_over_several_calls(name, pattern):
    """Each turn hands in all tokens so far, in a batch whose rows are padded on the left in every turn."""
    model = decoder(name, pattern)
    cache, rows = hf_sparse.make_cache(model), left_padded((0, 6), 15)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    inner = (
        0 if name == "mistral" else 3
    )  # its own layers count the window in slots, with pads between tokens
    for turn in range(3):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(out, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
        assert cache.get_seq_length() == out.shape[1] - 1  # the last token has not been through the model
        said = left_padded((0, inner), 7, seed=turn + 1)  # the next thing said is padded within the rows
        mask = torch.cat((mask, torch.ones(2, out.shape[1] - mask.shape[1], dtype=mask.dtype)), 1)
        ids = torch.cat((out, said["input_ids"]), 1)
        mask = torch.cat((mask, said["attention_mask"]), 1)
    assert name != "llama" or cache.kept < cache.get_seq_length()


def test_a_dialogue_without_a_mask():
    model, cache = decoder("llama", PLACED), None
    ids = tokens(1, 9)
    for _ in range(3):
        out = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **GREEDY))
        cache, ids = out.past_key_values, torch.cat((out.sequences, tokens(1, 5, seed=3)), 1)


def test_the_cache_that_generate_returns_goes_on_in_forward():
    model, ids = decoder("llama", PLACED), tokens(2, 9)
    out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    step = logits(model, out.sequences[:, -1:], past_key_values=out.past_key_values)
    torch.testing.assert_close(step[:, 0], logits(model, out.sequences, use_cache=False)[:, -1], **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_draft_model_proposes_and_nothing_changes(pattern):
    model, draft = decoder("llama", pattern), decoder("llama", SlidingWindow(window=3))
    with torch.no_grad():  # proposes other tokens now and then
        draft.lm_head.weight += 0.3 * torch.randn_like(draft.lm_head.weight)
    ids = tokens(1, 17)
    expected = model.generate(ids, use_cache=False, **{**GREEDY, "max_new_tokens": 40})
    for assistant in (draft, copy.deepcopy(model)):
        out = model.generate(ids, assistant_model=assistant, **{**GREEDY, "max_new_tokens": 40})
        assert torch.equal(out, expected)
    cache = hf_sparse.make_cache(model)
    out = model.generate(
        ids, assistant_model=draft, past_key_values=cache, **{**GREEDY, "max_new_tokens": 40}
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_prompt_lookup_changes_nothing(pattern):
    model, ids = decoder("llama", pattern), tokens(1, 6).repeat(1, 4)
    more = {**GREEDY, "max_new_tokens": 40}
    expected = model.generate(ids, use_cache=False, **more)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **more), expected)
    cache = hf_sparse.make_cache(model)
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=4, past_key_values=cache, **more), expected
    )
    ids = torch.cat((expected, tokens(1, 5)), 1)
    out = model.generate(ids, past_key_values=cache, **more)
    assert torch.equal(out, model.generate(ids, use_cache=False, **more))
    assert cache.kept < cache.get_seq_length()  # a plain call drops keys again


def test_text_is_streamed(tiny_model, tiny_tokenizer):
    class Heard(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    model = hf_sparse.patch_model(tiny_model, PLACED)
    prompt, heard = tiny_tokenizer("import os as", return_tensors="pt"), Heard(tiny_tokenizer)
    out = model.generate(
        prompt["input_ids"], streamer=heard, do_sample=False, max_new_tokens=30, eos_token_id=None
    )
    assert heard.text.strip() == tiny_tokenizer.decode(out[0]).strip()
    assert torch.equal(
        out,
        model.generate(
            prompt["input_ids"], use_cache=False, do_sample=False, max_new_tokens=30, eos_token_id=None
        ),
    )


def test_a_pipeline_generates_the_same_text(tiny_model, tiny_tokenizer):
    model = hf_sparse.patch_model(tiny_model, PLACED)
    model.generation_config.eos_token_id = None
    generator = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    options = {"max_new_tokens": 20, "do_sample": False}
    texts = ["import os as", "def path(x):\n    return x"]
    assert generator(texts, batch_size=2, **options) == generator(
        texts, use_cache=False, batch_size=2, **options
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pattern", [PATTERNS[0], PLACED], ids=str)
def test_a_static_cache_that_generate_makes(pattern, beams):
    model, rows = decoder("llama", pattern), left_padded()
    static = {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**rows, use_cache=False, num_beams=beams, **GREEDY)
    assert torch.equal(model.generate(**rows, **static, num_beams=beams, **GREEDY), expected)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [PATTERNS[0], PLACED], ids=str)
def test_a_static_cache_and_a_compiled_model(pattern):
    model, rows = decoder("llama", pattern), left_padded()
    expected = model.generate(**rows, use_cache=False, **GREEDY)
    torch._dynamo.reset()
    model.generation_config.compile_config = None
    compiled = torch.compile(model.forward, backend="eager")
    model.forward = compiled
    assert torch.equal(model.generate(**rows, cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_half_precision_gives_the_tokens_of_no_cache(pattern):
    """Close calls go either way in bfloat16; the model's weights are large enough that there are none here."""
    model, rows = decoder("llama", pattern).to(torch.bfloat16), left_padded()
    whole = model.generate(**rows, use_cache=False, **GREEDY)
    stepped = model.generate(**rows, **GREEDY)
    # where they part, the two best tokens are within rounding of each other
    for row in range(2):
        differ = (whole[row] != stepped[row]).nonzero()
        if len(differ):
            at = int(differ[0])
            scores = logits(model, whole[row : row + 1, 6 * row : at], use_cache=False)[0, -1].float()
            best = scores[[int(whole[row, at]), int(stepped[row, at])]]
            assert (best[0] - best[1]).abs() <= 0.02 * scores.abs().max()


def test_a_lora_model_generates_the_same():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model, rows = get_peft_model(decoder("llama", PLACED), config).eval(), left_padded()
    expected = model.generate(**rows, use_cache=False, **GREEDY)
    out = model.generate(**rows, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected) and isinstance(out.past_key_values, SparseCache)
    cache = hf_sparse.make_cache(model)
    assert torch.equal(model.generate(**rows, past_key_values=cache, **GREEDY), expected)


def test_guidance_reads_a_second_text_beside_the_first():
    model, rows, other = decoder("llama", PLACED), left_padded((0, 6)), left_padded((2, 0), 9, seed=5)
    ways = {
        "guidance_scale": 1.7,
        "negative_prompt_ids": other["input_ids"],
        "negative_prompt_attention_mask": other["attention_mask"],
        **GREEDY,
    }
    expected = model.generate(**rows, use_cache=False, **ways)
    assert torch.equal(model.generate(**rows, **ways), expected)
    assert torch.equal(model.generate(**rows, past_key_values=hf_sparse.make_cache(model), **ways), expected)


def test_embeddings_instead_of_ids():
    model, rows = decoder("llama", PLACED), left_padded((0, 6))
    given = {
        "inputs_embeds": model.get_input_embeddings()(rows["input_ids"]).detach(),
        "attention_mask": rows["attention_mask"],
    }
    out = model.generate(**given, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, SparseCache)
    assert torch.equal(out.sequences, model.generate(**given, use_cache=False, **GREEDY))


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:UserWarning")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_tuned_prefix_goes_into_a_cache_of_peft(pattern):
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model, ids = get_peft_model(decoder("llama", pattern), config).eval(), tokens(2, 17)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        best = model(input_ids=out).logits[:, 16:-1]
    best[..., NEW["suppress_tokens"]] = -torch.inf
    assert torch.equal(best.argmax(-1), out[:, 17:])


def test_two_threads_generate_at_once():
    models = [decoder("llama", PLACED), decoder("llama", SlidingWindow(window=5))]
    ids = tokens(2, 20)
    expected = [m.generate(ids, use_cache=False, **GREEDY) for m in models]
    outs = [None, None]

    def run(number):
        outs[number] = models[number].generate(ids, **GREEDY)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_an_unpatched_model_makes_its_own_cache():
    model = decoder("llama", PLACED)
    hf_sparse.unpatch_model(model)
    out = model.generate(tokens(1, 9), return_dict_in_generate=True, **GREEDY)
    assert type(out.past_key_values) is DynamicCache
