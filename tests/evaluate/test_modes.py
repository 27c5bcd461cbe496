"""Modes, curves and key tokens against loops over full logits; nothing hangs on how the work is cut up."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_sparse
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity, save_results, table
from hf_sparse.evaluate.method import key_positions

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [SOURCE[i * 700 : i * 700 + 250 + 110 * i] for i in range(5)]
PATTERNS = [hf_sparse.SlidingWindow(window=8), hf_sparse.StreamingLLM(sinks=2, window=6)]


def ids_of(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def nats_after(model, fed, targets):
    """Nats of the last len(targets) predictions from the tokens fed, from full logits in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([fed])).logits[0].double().log_softmax(-1)
    return [-logits[len(fed) - len(targets) + i, target].item() for i, target in enumerate(targets)]


def rolling_nats(model, ids, length):
    found = []
    for first in range(1, len(ids), length):
        targets = ids[first : first + length]
        stop = first + len(targets)
        found += nats_after(model, ids[max(0, stop - 1 - length) : stop - 1], targets)
    return found


def strided_nats(model, ids, length, stride):
    found, scored = [], 1
    for begin in range(0, len(ids), stride):
        stop = min(begin + length, len(ids))
        if scored < stop:
            fed = ids[begin : stop - 1]
            found += nats_after(model, [ids[0], *fed[1:]], ids[scored:stop])
            scored = stop
    return found


@pytest.mark.parametrize("pattern", [None, *PATTERNS], ids=str)
@pytest.mark.parametrize("mode", ["rolling", "strided"])
def test_windows_are_read_as_a_loop_reads_them(tiny_model, tiny_tokenizer, mode, pattern):
    result = perplexity(
        tiny_model,
        tiny_tokenizer,
        TEXTS,
        max_length=60,
        mode=mode,
        stride=25 if mode == "strided" else None,
        patterns=[pattern] if pattern else [],
        batch_size=3,
        head_chunk=50,
    )
    with hf_sparse.patched(tiny_model, pattern or "full"):
        for i, text in enumerate(TEXTS):
            ids = ids_of(tiny_tokenizer, text)
            loop = (
                rolling_nats(tiny_model, ids, 60)
                if mode == "rolling"
                else strided_nats(tiny_model, ids, 60, 25)
            )
            assert len(loop) == result.tokens[i] == len(ids) - 1
            assert result.runs[-1].nats[i] == pytest.approx(sum(loop), rel=1e-5)
    assert result.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    dense = result.runs[0]
    words = sum(len(text.split()) + text[0].isspace() + text[-1].isspace() for text in TEXTS)
    assert result.words.sum() == words
    total = dense.nats.sum()
    assert result.word_perplexity(dense) == pytest.approx(math.exp(total / words))
    assert result.byte_perplexity(dense) == pytest.approx(math.exp(total / result.bytes.sum()))
    assert result.bits_per_byte(dense) == pytest.approx(math.log2(result.byte_perplexity(dense)))


def test_bos_of_later_windows_is_a_choice(tiny_model, tiny_tokenizer):
    def nats(**settings):
        result = perplexity(tiny_model, tiny_tokenizer, TEXTS[3:], max_length=40, **settings)
        return result.runs[0].nats

    ids = [ids_of(tiny_tokenizer, text) for text in TEXTS[3:]]
    plain = [sum(rolling_nats(tiny_model, few, 40)) for few in ids]
    assert nats(mode="rolling") == pytest.approx(plain, rel=1e-5)
    assert abs(nats(mode="rolling", bos_each_window=True) - plain).min() > 1e-3
    with_bos = [sum(strided_nats(tiny_model, few, 40, 20)) for few in ids]
    assert nats(mode="strided") == pytest.approx(with_bos, rel=1e-5)
    assert abs(nats(mode="strided", bos_each_window=False) - with_bos).min() > 1e-3


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("full", {"batch_size": 4}),
        ("full", {"prefill_chunk": 17}),
        ("full", {"prefill_chunk": 64, "head_chunk": 9}),
        ("full", {"batch_size": 5, "head_chunk": 3}),
        ("strided", {"batch_size": 3}),
        ("strided", {"prefill_chunk": 37}),
        ("rolling", {"batch_size": 7}),
        ("rolling", {"prefill_chunk": 48}),
    ],
    ids=str,
)
def test_results_do_not_hang_on_batches_and_chunks(tiny_model, tiny_tokenizer, mode, settings):
    patterns = [*PATTERNS, "longformer", hf_sparse.StreamingLLM(sinks=2, window=6, positions="cache")]

    def measure(**more):
        return perplexity(
            tiny_model,
            tiny_tokenizer,
            TEXTS[:3],
            max_length=100,
            mode=mode,
            patterns=patterns,
            contexts=(20, 45, 90),
            context_targets=12,
            **more,
        )

    one, other = measure(), measure(**settings)
    for a, b in zip(one.runs, other.runs, strict=True):
        assert b.nats == pytest.approx(a.nats, rel=1e-6)
        assert b.context_nats == pytest.approx(a.context_nats, rel=1e-6, nan_ok=True)
        assert b.density == pytest.approx(a.density)


def test_context_curve_scores_the_same_tokens_from_less_and_less(tiny_model, tiny_tokenizer):
    result = perplexity(
        tiny_model,
        tiny_tokenizer,
        TEXTS,
        max_length=320,
        patterns=PATTERNS[:1],
        contexts=(250, 30, 70),
        context_targets=20,
    )
    ids = [ids_of(tiny_tokenizer, text)[:320] for text in TEXTS]
    long = [i for i, few in enumerate(ids) if len(few) >= 250]
    assert result.contexts == (30, 70, 250) and 0 < len(long) < len(TEXTS)
    assert np.flatnonzero(result.on_curve).tolist() == long
    with hf_sparse.patched(tiny_model, PATTERNS[0]):
        for i in long:
            for point, context in enumerate(result.contexts):
                seen = ids[i][-context:-1]
                expected = sum(nats_after(tiny_model, [ids[i][0], *seen[1:]], ids[i][-20:]))
                assert result.runs[1].context_nats[i, point] == pytest.approx(expected, rel=1e-5)
    dense = result.runs[0]
    assert result.loss_by_context(dense) == pytest.approx(
        dense.context_nats[long].sum(axis=0) / (20 * len(long))
    )
    differences = result.context_difference(result.runs[1], dense)
    assert [d.units for d in differences] == [len(long)] * 3
    with pytest.raises(ValueError, match=r"no document reaches the 400 tokens of the longest context"):
        perplexity(tiny_model, tiny_tokenizer, TEXTS[:1], max_length=500, contexts=(400,))


def test_key_tokens_are_those_that_need_the_long_context(tiny_model, tiny_tokenizer, monkeypatch):
    # a random model has none in the published sense: its losses are far above two nats
    monkeypatch.setattr("hf_sparse.evaluate.method.KEY_LOSS", 6.0)
    result = perplexity(
        tiny_model, tiny_tokenizer, TEXTS[2:], max_length=150, key_tokens=16, patterns=PATTERNS[:1]
    )
    expected = []
    for text in TEXTS[2:]:
        ids = ids_of(tiny_tokenizer, text)[:150]
        whole = np.array(nats_after(tiny_model, ids[:-1], ids[1:]))
        short = np.array(strided_nats(tiny_model, ids, 16, 4))
        expected.append(np.flatnonzero((short - whole > 6.0) & (whole < 6.0)))
    assert result.key_counts.tolist() == [len(few) for few in expected] and sum(result.key_counts) > 0
    with hf_sparse.patched(tiny_model, PATTERNS[0]):
        for i, text in enumerate(TEXTS[2:]):
            ids = ids_of(tiny_tokenizer, text)[:150]
            sparse = np.array(nats_after(tiny_model, ids[:-1], ids[1:]))
            assert result.runs[1].key_nats[i] == pytest.approx(sparse[expected[i]].sum(), rel=1e-5, abs=1e-9)
    run = result.runs[0]
    assert result.key_perplexity(run) == pytest.approx(math.exp(run.key_nats.sum() / result.key_counts.sum()))


def test_key_positions():
    whole, short = np.array([0.5, 0.5, 3.0, 1.9]), np.array([3.0, 2.0, 9.0, 3.8])
    assert key_positions(whole, short).tolist() == [0]


def test_a_document_may_be_longer_than_the_model_in_rolling_mode(tiny_model, tiny_tokenizer):
    long = Document("long", SOURCE[:12_000])
    result = perplexity(tiny_model, tiny_tokenizer, [long], max_length=512, mode="rolling")
    assert result.tokens[0] > 3000 and result.text.truncated == 0
    assert result.position_tokens.sum() == result.tokens[0]
    assert sum(len(blocks) for blocks in result.runs[0].block_nats) == math.ceil(result.tokens[0] / 2048)


def test_a_tokenizer_without_bos_and_eos_scores_from_the_second_token(tiny_model, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    result = perplexity(tiny_model, tokenizer, TEXTS[2:], max_length=50, mode="strided")
    for i, text in enumerate(TEXTS[2:]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found, scored = [], 1
        for begin in range(0, len(ids), 25):
            stop = min(begin + 50, len(ids))
            if scored < stop:
                found += nats_after(tiny_model, ids[begin : stop - 1], ids[scored:stop])
                scored = stop
        assert result.runs[0].nats[i] == pytest.approx(sum(found), rel=1e-5)
    assert result.text.prefix == "none"


def test_what_a_run_holds_and_how_long_it_took(tiny_model, tiny_tokenizer):
    result = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=400, patterns=PATTERNS[:1])
    dense, sparse = result.runs
    longest = int(result.tokens.max()) + 1
    per_token = 2 * 2 * 2 * 8 * 4  # layers x (key, value) x kv heads x head size x bytes
    assert dense.served.tokens == sparse.served.tokens == longest
    assert dense.served.kv_bytes == longest * per_token
    assert sparse.served.kv_bytes < dense.served.kv_bytes
    assert min(dense.served.seconds, sparse.served.seconds, dense.tokens_per_second) > 0


def test_dense_attention_may_be_left_out(tiny_model, tiny_tokenizer, tmp_path):
    both = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=100, patterns=PATTERNS)
    alone = perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=100, patterns=PATTERNS, dense=False)
    assert [run.label for run in alone.runs] == [str(pattern) for pattern in PATTERNS]
    for run, same in zip(alone.runs, both.runs[1:], strict=True):
        assert (run.nats == same.nats).all() and alone.dense_of(run) is run
    written = save_results(alone, tmp_path, html=True, pictures=True)
    assert not [path for path in written if path.name == "quality_against_speed.png"]
    figures = json.loads((tmp_path / "results.json").read_text())
    assert [run["nats_above_dense"] for run in figures["runs"]] == [None, None]
    assert str(PATTERNS[0]) in table(alone)

    for settings, message in (
        ({"patterns": []}, "nothing to measure; name a pattern"),
        ({"patterns": PATTERNS, "key_tokens": 16}, "key_tokens=16 are found with dense attention"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(tiny_model, tiny_tokenizer, TEXTS, max_length=100, dense=False, **settings)


def test_long_windows_of_a_patched_model_are_fed_in_chunks(tiny_model, tiny_tokenizer, monkeypatch):
    fed = []
    tiny_model.model.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))

    def measure():
        fed.clear()
        result = perplexity(
            tiny_model, tiny_tokenizer, TEXTS[3:4], max_length=150, patterns=PATTERNS[:1], dense=False
        )
        return result.runs[0].nats, max(fed)

    whole, most = measure()
    assert most == 150  # the prompt whose cache is weighed
    monkeypatch.setattr("hf_sparse.evaluate.scoring.LONG", 100)
    monkeypatch.setattr("hf_sparse.evaluate.scoring.CHUNK", 40)
    monkeypatch.setattr("hf_sparse.evaluate.scoring.CHECKED", 30)  # fed at once, to try whether chunks may be
    chunked, most = measure()
    assert most == 40
    assert chunked == pytest.approx(whole, rel=1e-6)


def test_shortened_windows_may_go_without_bos(tiny_model, tiny_tokenizer):
    settings = {"max_length": 120, "contexts": (40,), "context_targets": 10}
    with_bos, without = (
        perplexity(tiny_model, tiny_tokenizer, TEXTS[3:4], **settings, bos_each_window=flag).runs[0]
        for flag in (None, False)
    )
    ids = ids_of(tiny_tokenizer, TEXTS[3])[:120]
    for run, first in ((with_bos, ids[0]), (without, ids[-40])):
        expected = sum(nats_after(tiny_model, [first, *ids[-39:-1]], ids[-10:]))
        assert run.context_nats[0, 0] == pytest.approx(expected, rel=1e-5)
    assert abs(with_bos.context_nats - without.context_nats).min() > 1e-3


def test_a_model_that_passes_ids_by_place_is_read_with_a_cache(tiny_tokenizer):
    """GPT-2 hands its body the ids without a keyword; its prompt fills a cache, and so do chunks of it."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    whole, parts = (
        perplexity(model, tiny_tokenizer, TEXTS[:2], max_length=100, patterns=PATTERNS, prefill_chunk=chunk)
        for chunk in (None, 33)
    )
    for a, b in zip(whole.runs, parts.runs, strict=True):
        assert b.nats == pytest.approx(a.nats, rel=1e-6)
        assert a.served is not None and a.served.kv_bytes
