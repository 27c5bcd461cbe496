"""What cannot be calibrated is refused in one sentence, before anything is run."""

import numpy as np
import pytest
import torch
import transformers
from tiny_models import random_model, tiny

from hf_sparse import (
    BigBird,
    DilatedWindow,
    Full,
    GlobalTokens,
    Layered,
    Longformer,
    PerHead,
    PerLayer,
    ReRoPE,
    SlidingWindow,
    StreamingLLM,
    calibrate,
)
from hf_sparse.calibrate.request import Search, default_candidates
from hf_sparse.calibrate.scores import Ablation, AttentionMass

from .test_calibrate_models import encoder_tokenizer
from .writers import LENGTH, texts, tokenizer, writer

WINDOW = SlidingWindow(4)


def refused(message, model=None, given=None, **options):
    """Assert that a calibration is refused with that message before the model has read any token of the texts."""
    model = writer() if model is None else model
    read = []
    model.register_forward_hook(lambda module, args, kwargs, out: read.append(1), with_kwargs=True)
    settings = {"candidates": [WINDOW], "tokenizer": tokenizer(), "length": LENGTH, "samples": 2}
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(model, texts() if given is None else given, **{**settings, **options})
    assert not read and "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, None, "0.5", float("nan")])
def test_a_budget_is_a_share(budget):
    for of in ("density", "prefill"):
        refused(
            r"budget must be above 0 and at most 1, a share of what the dense model costs, got ",
            budget=budget,
            of=of,
        )


def test_a_budget_below_the_cheapest_says_the_least():
    refused(
        r"budget=0.05 is below the 0.202 that the cheapest candidates need \(sliding_window\(window=4\); density at 37 "
        r"tokens\); raise it to 0.202 or more, or add a cheaper candidate",
        budget=0.05,
    )
    result = calibrate(
        writer(),
        texts(),
        [WINDOW],
        0.202,
        tokenizer=tokenizer(),
        length=LENGTH,
        samples=1,
        score="layer_output",
    )
    assert (result.chosen.choice == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "neuron"}, "unit must be one of head, kv_head, layer, got 'neuron'"),
        ({"score": "gradient_gate"}, "unknown score 'gradient_gate'"),
        ({"score": Ablation}, "score must be a name or a Score, got <class"),
        ({"of": "watts"}, "of must be one of density, kv_bytes, prefill, decode, got 'watts'"),
        ({"objective": "accuracy"}, "objective must be one of loss, kl, got 'accuracy'"),
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"samples": True}, "samples must be a whole number >= 1, got True"),
        ({"samples": 2.0}, "samples must be a whole number >= 1, got 2.0"),
        ({"tokens": 0}, r"tokens must be a whole number >= 1 \(for which the cost is counted\), got 0"),
        ({"tokens": True}, "tokens must be a whole number >= 1"),
        ({"length": 2}, "length must be a whole number >= 4"),
        ({"samples": 40}, "the texts hold 4 windows of length=37 tokens, and samples=40 are asked for"),
        ({"stages": 0}, "stages must be a whole number >= 1, got 0"),
        ({"beyond": -1}, "beyond must be a whole number >= 0, got -1"),
        ({"beyond": True}, "beyond must be a whole number >= 0, got True"),
        ({"rescore": "often"}, "rescore must be True, False or 'unit', got 'often'"),
        (
            {"score": "attention_mass", "rescore": True},
            "the score attention_mass is the same whatever the other units run, so rescore=True changes nothing",
        ),
        ({"score": "head_output", "rescore": "unit"}, "rescore='unit' changes nothing; leave it out"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"backend": "cudnn"}, "unknown backend 'cudnn'"),
        ({"head_chunk": 0}, "head_chunk must be a whole number >= 1"),
        ({"of": "kv_bytes"}, "4 query heads share 2 key-value heads here; use unit='kv_head'"),
        ({"of": "kv_bytes", "unit": "layer", "budget": 0.1}, "budget=0.1 is below the 0.79"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(options, message):
    refused(message, **options)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "there is nothing to choose between; give a candidate besides dense, such as SlidingWindow"),
        (["full"], "there is nothing to choose between"),
        (
            [WINDOW, SlidingWindow(4)],
            r"the candidate sliding_window\(window=4\) is given twice; name each once",
        ),
        (["sliding"], "unknown pattern 'sliding'"),
        (
            [SlidingWindow(LENGTH)],
            r"sliding_window\(window=37\) costs no less than dense attention at 37 tokens",
        ),
        (["sliding_window"], r"calibrate for more tokens"),
        ([PerHead((Full(), WINDOW, WINDOW, WINDOW))], "differs between layers or heads; give its members"),
        (
            [WINDOW | PerHead((Full(), WINDOW, WINDOW, WINDOW))],
            "differs between layers or heads; give its members",
        ),
        ([PerLayer((Full(), WINDOW))], "differs between layers or heads; give its members"),
        ([Layered(pattern=WINDOW, dense_every=2)], "differs between layers or heads; give its members"),
        (
            [ReRoPE(window=4, pattern=WINDOW)],
            "moves far keys to other places, which heads of one layer cannot do",
        ),
        ([StreamingLLM(sinks=1, window=4, positions="cache")], "moves far keys to other places"),
        (["topk_blocks"], "selects by content for whole layers, so heads cannot choose it"),
        (
            [Longformer(window=4, global_tokens=()) | GlobalTokens(token_ids=(5,))],
            "depends on the tokens of an input or has weights of its own",
        ),
        (
            [Longformer(window=4, global_projections=True)],
            "depends on the tokens of an input or has weights of its own",
        ),
        ([WINDOW | Longformer(window=4, global_projections=True)], "depends on the tokens of an input"),
    ],
    ids=str,
)
def test_candidates_that_contradict_the_model(candidates, message):
    refused(message, candidates=candidates)


def test_a_window_of_the_text_must_be_long_enough_for_the_candidates():
    refused(
        r"sliding_window\(window=40\) costs no less than dense attention at 37 tokens \(density\)",
        candidates=[SlidingWindow(40)],
        tokens=1000,
    )


def test_the_first_candidate_may_be_dense_and_a_single_one_needs_no_list():
    for candidates in ([Full(), WINDOW], [WINDOW, "full"], WINDOW):
        result = calibrate(
            writer(),
            texts(),
            candidates,
            1.0,
            tokenizer=tokenizer(),
            length=LENGTH,
            samples=1,
            score="layer_output",
        )
        assert result.candidates == (Full(), WINDOW)
    result = calibrate(
        writer(),
        texts(),
        "dilated_window",
        1.0,
        tokenizer=tokenizer(),
        length=LENGTH,
        samples=1,
        score="layer_output",
    )
    assert result.candidates == (Full(), DilatedWindow())


@pytest.mark.parametrize("of", ["kv_bytes", "decode"])
def test_an_encoder_has_no_cache(of):
    options = {"of": of, "unit": "head", "tokenizer": encoder_tokenizer()}
    refused("BertForMaskedLM is an encoder; use of='(density|prefill)'", tiny("bert"), **options)


def test_learned_positions_bound_texts_and_times():
    refused(
        "length=4096 is beyond the 128 positions of GPT2LMHeadModel; use length=128 or less",
        tiny("gpt2"),
        length=4096,
    )
    refused("tokens=500 is beyond the 128 positions", tiny("gpt2"), of="prefill", tokens=500)


def test_models_without_a_head_for_language_are_refused():
    options = {"vocab_size": 64, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = random_model("T5ForConditionalGeneration", options)
    refused("T5ForConditionalGeneration has no causal language-model head", t5)
    refused("LlamaModel has no causal language-model head", transformers.LlamaModel(tiny("llama").config))
    refused("Linear is no model of transformers", torch.nn.Linear(2, 2))


def test_the_tokenizer_of_another_model(tiny_tokenizer):
    words = " ".join(map(str, range(300)))
    refused("use the tokenizer that belongs to the model", given=[words], tokenizer=tiny_tokenizer)


def test_texts_are_a_list_of_texts():
    refused("got a single one; put it into a list", given="a text")
    refused("there are no documents to evaluate; give at least one", given=[])
    refused("none of the 1 documents has 2 tokens to score; give longer texts", given=[" "])


def test_a_model_that_patterns_cannot_be_put_into():
    options = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    refused(
        "MambaForCausalLM has no attention heads to choose for", random_model("MambaForCausalLM", options)
    )


def test_a_search_of_one_stage_counts_its_passes():
    search = Search(AttentionMass(), False, 1, 0)
    assert search.budgets(0.2, 0.5) == [0.5] and search.passes((2, 4, 3), False) == 2 + 1 + 3 + 1
    assert Search(Ablation(), "unit", 2, 1).passes((1, 2, 3), True) == (4 + 3) * 5 + 3 + 3 + 1 + 1


def test_drawn_blocks_may_be_candidates():
    blocks = BigBird(block=2, window_blocks=3, global_blocks=1, random_blocks=1)
    result = calibrate(
        tiny("llama"), texts(), [blocks], 0.9, tokenizer=tokenizer(), length=LENGTH, samples=1, objective="kl"
    )
    assert np.isfinite(result.gains).all() and result.chosen.cost <= 0.9


def test_default_candidates_keep_sinks_and_leave_at_least_half_out():
    assert [str(one) for one in default_candidates(2048)] == [
        f"streaming_llm(sinks=4, window={window})" for window in (28, 124, 508)
    ]
    assert len(default_candidates(1023)) == 2
    assert default_candidates(63) == ()
