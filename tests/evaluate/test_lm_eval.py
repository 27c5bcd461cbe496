"""The model type "hf-sparse" of lm-evaluation-harness, and its rolling perplexity against ours."""

import argparse
import copy
import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.evaluate import perplexity
from hf_sparse.hf import settings_from_json

lm_eval = pytest.importorskip(
    "lm_eval", reason="needs lm-evaluation-harness: pip install 'hf_sparse[lm-eval]'"
)
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hf_sparse.evaluate.lm_eval_model import SparseHFLM, loaded_models  # noqa: E402 - it needs lm_eval

BASE = Path(__file__).parents[2] / "recipes" / "tiny_base"
LENGTH = 64  # tokens per window
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
# shorter than a window, a few characters more than one, several times longer, and bytes that are no characters
TEXTS = [SOURCE[:50], SOURCE[300:620], SOURCE[1000:2000], "Überall 漢字 🙂  und\n\n\tLücken. " * 5]
PATTERNS = {"sliding_window": {"window": 8}, "longformer": {"window": 8, "global_tokens": [0, 5]}}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Nothing is looked up on the hub or kept, and what lm_eval sets in the process is taken back."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)


@pytest.fixture
def rolling_task(tmp_path):
    """A task over TEXTS with the three metrics of loglikelihood_rolling."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return rolling(file)


def rolling(file):
    metrics = {"word_perplexity": False, "byte_perplexity": False, "bits_per_byte": False}
    return {
        "task": "local_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {
                "metric": name,
                "aggregation": "bits_per_byte" if name == "bits_per_byte" else "weighted_perplexity",
                "higher_is_better": better,
            }
            for name, better in metrics.items()
        ],
    }


def evaluate(model, task, **kwargs):
    """Run lm_eval on one task; return its results, and the metrics by name."""
    results = lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **kwargs
    )
    figures = results["results"][task["task"]]
    return results, {
        name.removesuffix(",none"): value for name, value in figures.items() if name.endswith(",none")
    }


@torch.inference_mode()
def brute_force(model, tokenizer):
    """The three metrics from one forward pass per window."""
    nats = 0.0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        for first in range(1, len(ids), LENGTH):
            end = min(first + LENGTH, len(ids))
            fed = ids[max(0, end - 1 - LENGTH) : end - 1]
            log = model(torch.tensor([fed])).logits[0].log_softmax(-1)
            scored = ids[first:end]
            nats -= log[-len(scored) :].gather(1, torch.tensor(scored)[:, None]).sum().item()
    words, size = (sum(len(re.split(r"\s+", t)) for t in TEXTS), sum(len(t.encode()) for t in TEXTS))
    return {
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }


def assert_equal(found, expected):
    """The three metrics agree to a ten-thousandth of their size."""
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def ours(result, run):
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {name: getattr(result, name)(run) for name in names}


@pytest.mark.parametrize("folder", ["tiny model", "tiny base"])
def test_rolling_is_that_of_lm_eval(folder, tiny_model_folder, rolling_task):
    """Dense and with two patterns, on documents shorter and several times longer than a window."""
    source = BASE if folder == "tiny base" else tiny_model_folder
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    patterns = [hf_sparse.get_pattern(name, **options) for name, options in PATTERNS.items()]
    result = perplexity(model, tokenizer, TEXTS, max_length=LENGTH, mode="rolling", patterns=patterns)
    lengths = [document.tokens for document in result.text.documents]
    assert len(lengths) == len(TEXTS) and min(lengths) < LENGTH and max(lengths) > 3 * LENGTH

    _, dense = evaluate(HFLM(model, tokenizer=tokenizer, max_length=LENGTH), rolling_task)
    assert_equal(dense, brute_force(model, tokenizer))
    assert_equal(ours(result, result.runs[0]), dense)
    for run, (name, options) in zip(result.runs[1:], PATTERNS.items(), strict=True):
        model_args = {"pretrained": str(source), "max_length": LENGTH, "pattern": name, **options}
        results, found = evaluate("hf-sparse", rolling_task, model_args=model_args, device="cpu")
        with hf_sparse.patched(model, name, **options):
            assert_equal(found, brute_force(model, tokenizer))
        assert_equal(ours(result, run), found)
        assert found["word_perplexity"] != pytest.approx(dense["word_perplexity"], rel=1e-2)
        proof = results["config"]["sparse_attention"]
        assert proof["density"] == pytest.approx(run.density) and proof["density"] < 1
        assert (proof["calls"], proof["layers"]) == (sum(proof["ran"].values()), list(range(run.layers)))


def test_a_tokenizer_that_adds_bos_is_told_not_to(tiny_model, tiny_tokenizer, rolling_task):
    """lm_eval puts BOS in front of what begins with BOS already, and scores that one, unless add_bos_token=False."""
    adds = copy.deepcopy(tiny_tokenizer)
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert adds("a").input_ids[0] == adds.bos_token_id
    result = perplexity(tiny_model, adds, TEXTS, max_length=LENGTH, mode="rolling")
    expected = ours(result, result.runs[0])
    model = HFLM(tiny_model, tokenizer=adds, max_length=LENGTH, add_bos_token=False)
    assert_equal(evaluate(model, rolling_task)[1], expected)
    _, twice = evaluate(HFLM(tiny_model, tokenizer=adds, max_length=LENGTH), rolling_task)
    assert twice["word_perplexity"] != pytest.approx(expected["word_perplexity"], rel=1e-4)


def test_batches_change_nothing(tiny_model_folder, rolling_task):
    model_args = {
        "pretrained": str(tiny_model_folder),
        "max_length": LENGTH,
        "pattern": "strided",
        "stride": 7,
    }
    first, one = evaluate("hf-sparse", rolling_task, model_args=model_args, device="cpu", batch_size=1)
    second, four = evaluate("hf-sparse", rolling_task, model_args=model_args, device="cpu", batch_size=4)
    assert_equal(four, one)
    calls = [results["config"]["sparse_attention"]["calls"] for results in (first, second)]
    assert calls[0] > calls[1]


def test_generation_is_counted_and_sparse(tiny_model_folder, tiny_model, tmp_path):
    """generate_until gives what a patched model generates."""
    file = tmp_path / "prompts.jsonl"
    prompt = SOURCE[:200]
    file.write_text(json.dumps({"text": prompt}) + "\n", encoding="utf-8")
    task = rolling(file) | {
        "task": "local_prompts",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"max_gen_toks": 12, "until": ["never"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    model_args = {"pretrained": str(tiny_model_folder), "pattern": "sliding_window", "window": 4}
    results, _ = evaluate("hf-sparse", task, model_args=model_args, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    hf_sparse.patch_model(tiny_model, "sliding_window", window=4)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = tiny_model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    (sample,) = results["samples"]["local_prompts"]
    assert sample["resps"] == [[tokenizer.decode(expected, skip_special_tokens=True)]]
    assert results["config"]["sparse_attention"]["calls"] == 2 * len(expected)  # one of each layer per token


def test_an_adapter_brings_its_pattern(adapter_folder, tiny_model_folder, rolling_task):
    loaded = hf_sparse.load(adapter_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    expected = brute_force(loaded.eval(), tokenizer)
    model_args = {"pretrained": str(tiny_model_folder), "peft": str(adapter_folder), "max_length": LENGTH}
    results, found = evaluate("hf-sparse", rolling_task, model_args=model_args, device="cpu")
    assert_equal(found, expected)
    settings = results["config"]["sparse_attention"]["settings"]
    assert settings["pattern"] == {"name": "sliding_window", "options": {"window": 8}}
    _, other = evaluate("hf-sparse", rolling_task, model_args={**model_args, "pattern": "full"}, device="cpu")
    with hf_sparse.patched(loaded, "full"):
        assert_equal(other, brute_force(loaded, tokenizer))
    assert other["word_perplexity"] != pytest.approx(found["word_perplexity"], rel=1e-2)


def test_a_saved_pattern_and_the_name_of_an_implementation(tmp_path, tiny_model, tiny_tokenizer):
    """With its options, its layers and its backend; another backend may be asked for."""
    folder = str(tmp_path / "saved")
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5, layers=[1], backend="reference")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    for named in ({}, {"attn_implementation": "sparse_sliding_window"}):
        saved = SparseHFLM(folder, device="cpu", **named).proof()["settings"]
        assert saved["pattern"]["options"] == {"window": 5}
        assert (saved["layers"], saved["backend"]) == ([1], "reference")
    assert SparseHFLM(folder, device="cpu", sparse_backend="torch").proof()["settings"]["backend"] == "torch"
    other = SparseHFLM(folder, device="cpu", pattern={"name": "strided", "options": {"stride": 3}})
    assert other.proof()["settings"]["pattern"]["name"] == "strided"
    stored = {**saved, "layers": [0]}
    assert SparseHFLM(folder, device="cpu", pattern=stored).proof()["settings"] == stored
    with pytest.raises(
        ValueError, match=r"sparse_strided is not sliding_window\(window=5\).*leave attn_impl"
    ):
        SparseHFLM(folder, device="cpu", attn_implementation="sparse_strided")


def test_learned_sinks_saved_with_a_model_are_read(tmp_path, tiny_model, tiny_tokenizer):
    folder, ids = str(tmp_path / "saved"), torch.arange(3, 40)[None]
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5, learned_sinks=True)
    with torch.no_grad():
        tiny_model.model.layers[1].self_attn.learned_sinks.weight.add_(0.05)
        tiny_model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        found = SparseHFLM(folder, device="cpu", dtype="float32")
        assert found.proof()["settings"]["learned_sinks"] is True
        assert torch.equal(found.model(ids).logits, tiny_model(ids).logits)


def test_the_first_process_has_the_counts_of_all(tiny_model, tiny_tokenizer, monkeypatch):
    """lm_eval waits for every process after each kind of request; the others begin at zero again."""
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5)
    model = SparseHFLM(tiny_model, tokenizer=tiny_tokenizer)
    model._model_call(torch.zeros(1, 20, dtype=torch.long))
    one = model.counted
    assert one.calls == 2 and one.pairs < one.dense_pairs
    monkeypatch.setattr(model, "gather_object", lambda row: [row, row | {"layers": [7]}])
    model.barrier()
    assert model.counted.calls == 4 and model.counted.density == one.density
    assert model.counted.layers == {0, 1, 7}
    monkeypatch.setattr(model, "gather_object", lambda row: None)  # as on any other process
    model.barrier()
    assert model.counted.calls == 0


def test_trying_out_batch_sizes_is_not_counted(tiny_model, tiny_tokenizer):
    """With batch_size=auto lm_eval runs batches of equal tokens, which are no part of any figure."""
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5)
    model = SparseHFLM(tiny_model, tokenizer=tiny_tokenizer, max_length=LENGTH, max_batch_size=2)
    model._model_call(torch.zeros(1, 20, dtype=torch.long))
    before = model.counted
    assert model._detect_batch_size() == 2
    assert model.counted == before and before.calls == 2


def test_the_implementation_of_a_plain_model(tiny_model_folder):
    model = SparseHFLM(str(tiny_model_folder), device="cpu", attn_implementation="sparse_longformer")
    assert model.proof()["settings"]["pattern"]["name"] == "longformer"


def test_a_pattern_that_adapts_is_resolved_for_the_length(tiny_model_folder):
    model = SparseHFLM(str(tiny_model_folder), device="cpu", pattern="grouped_heads")
    expected = hf_sparse.get_pattern("grouped_heads").resolve(512)  # the model's max_position_embeddings
    assert settings_from_json(model.proof()["settings"]).pattern == expected


def test_models_loaded_are_collected(tiny_model, tiny_tokenizer):
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5)
    with loaded_models() as models:
        model = SparseHFLM(tiny_model, tokenizer=tiny_tokenizer)
    SparseHFLM(tiny_model, tokenizer=tiny_tokenizer)
    assert models == [model]


def test_dense_figures_are_refused(tiny_model, tiny_tokenizer, rolling_task):
    hf_sparse.patch_model(tiny_model, "sliding_window", window=5)
    model = SparseHFLM(tiny_model, tokenizer=tiny_tokenizer, max_length=LENGTH)
    tiny_model.set_attn_implementation("sdpa")  # behind its back
    with pytest.raises(ValueError, match=r"no attention call .* went through sliding_window\(window=5\)"):
        evaluate(model, rolling_task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "nothing sparse was asked for: .*tiny_model has no pattern saved with it; name one with --pattern",
        ),
        ({"attn_implementation": "sdpa"}, "nothing sparse was asked for"),
        ({"pattern": "longformr"}, "unknown pattern 'longformr'. Did you mean 'longformer'"),
        ({"pattern": "longformer", "window": 0}, "window must"),
        (
            {"pattern": "longformer", "windw": 8},
            r"cannot be loaded with these arguments \(.*windw.*check the names",
        ),
        ({"pattern": {"name": "longformr"}}, "longformr"),
        ({"pattern": "FILE"}, "the pattern file .*three_heads.json was made for 3 query heads, and Llama"),
        ({"pattern": "longformer", "sparse_backend": "fast"}, "backend"),
        (
            {"pattern": "strided", "attn_implementation": "sparse_longformer"},
            "sparse_longformer is not strided",
        ),
        (
            {"peft": "ADAPTER", "attn_implementation": "sparse_strided"},
            "sparse_strided is not sliding_window",
        ),
        ({"peft": "MODEL"}, "has no sparse_attention.json; name the pattern to run it with"),
        ({"pattern": "strided", "peft": "MODEL"}, "has no adapter_config.json"),
        (
            {"pretrained": "ADAPTER", "pattern": "strided"},
            "is an adapter; write pretrained=.*tiny_model,peft=",
        ),
    ],
)
def test_mistakes(arguments, message, tiny_model_folder, adapter_folder, tmp_path):
    file = hf_sparse.save_pattern(hf_sparse.PerHead((hf_sparse.Full(),) * 3), tmp_path / "three_heads.json")
    places = {"MODEL": str(tiny_model_folder), "ADAPTER": str(adapter_folder), "FILE": str(file)}
    known = {
        name: places.get(value, value) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        SparseHFLM(**{"pretrained": str(tiny_model_folder), "device": "cpu", **known})


def test_a_loaded_model_keeps_its_attention(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="loaded already keeps its attention"):
        SparseHFLM(tiny_model, tokenizer=tiny_tokenizer, pattern="strided")
    with pytest.raises(ValueError, match="nothing sparse was asked for: LlamaForCausalLM"):
        SparseHFLM(tiny_model, tokenizer=tiny_tokenizer)
