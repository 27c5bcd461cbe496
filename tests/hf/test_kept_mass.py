"""The mass that a running model keeps: against eager weights, in every way to feed a text, and without a trace."""

import itertools

import numpy as np
import pytest
import torch
from caching import left_padded
from tiny_models import logits, tiny, tokens

import hf_sparse
from hf_sparse import Full, PerHead, PerLayer, SlidingWindow, StreamingLLM, TopKBlocks, get_pattern

SELECTOR = TopKBlocks(keep=4, block=4, local=0, query_block=2)
ALL = 10**6  # queries: every one
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def measured(model, *args, queries=ALL, seed=0, **kwargs):
    with hf_sparse.monitored(model, queries=queries, seed=seed) as mass, torch.no_grad():
        model(*args, use_cache=False, **kwargs)
    return mass.layers


def eager_mass(name, model, ids, layer):
    """Return what a layer whose input is that of the dense model keeps, [H], from the two models' weights."""
    dense = tiny(name, "eager")(ids, output_attentions=True, use_cache=False).attentions[layer]
    read = model(ids, output_attentions=True, use_cache=False).attentions[layer] > 0
    return (dense * read).sum(-1).mean((0, 2)).tolist()


@pytest.mark.parametrize(
    "name, pattern",
    [
        *itertools.product(
            ("llama", "gemma2", "gpt2"), (SELECTOR, SlidingWindow(5), SELECTOR | SlidingWindow(6))
        ),
        ("llama", get_pattern("lsh", block=4, sinks=0, local=0, rounds=2)),
        ("llama", get_pattern("vertical_slash", block=4, renew=8)),
        ("bert", SlidingWindow(5)),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_weights_of_the_eager_model(name, pattern):
    ids = tokens(2, 45)
    for layer in (0, 1):  # the other one is dense
        patterns = [Full(), Full()]
        patterns[layer] = pattern
        model = hf_sparse.patch_model(tiny(name), PerLayer(patterns))
        found = measured(model, ids)
        np.testing.assert_allclose(found[layer].heads, eager_mass(name, model, ids, layer), atol=1e-5)
        assert found[1 - layer].mean == pytest.approx(1) and found[layer].mean < 0.95
        assert found[layer].queries == 2 * 45


def test_a_sample_is_near_the_whole_and_each_call_draws_another():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(2, 60)
    whole = measured(model, ids)
    with hf_sparse.monitored(model, queries=5, seed=1) as mass, torch.no_grad():
        for _ in range(80):
            model(ids, use_cache=False)
    for layer, found in mass.layers.items():
        assert found.queries == 2 * 5 * 80
        assert 0 < abs(found.mean - whole[layer].mean) < 0.03
    assert mass.mean == pytest.approx(np.mean([found.mean for found in mass.layers.values()]))
    assert measured(model, ids, queries=5)[0] == measured(model, ids, queries=5)[0]
    assert measured(model, ids, queries=5)[0] != measured(model, ids, queries=5, seed=1)[0]


def test_padding_is_not_measured():
    model = hf_sparse.patch_model(tiny("llama"), SELECTOR)
    rows = left_padded((0, 11), 40)
    both = measured(model, rows["input_ids"], attention_mask=rows["attention_mask"])
    alone = [measured(model, rows["input_ids"][:1]), measured(model, rows["input_ids"][1:, 11:])]
    for layer, found in both.items():
        parts = [(one[layer].mean, one[layer].queries) for one in alone]
        assert [queries for _, queries in parts] == [40, 29] and found.queries == 69
        assert found.mean == pytest.approx(sum(mean * queries for mean, queries in parts) / 69, abs=1e-5)


@pytest.mark.parametrize("steps", [[40], [30, *[1] * 10], [7, 13, 1, 19]], ids=str)
def test_a_cache_keeps_what_one_pass_keeps(steps):
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(2, 40)
    whole = measured(model, ids)
    cache = hf_sparse.make_cache(model)
    with hf_sparse.monitored(model, queries=ALL) as mass, torch.no_grad():
        for part in ids.split(steps, 1):
            model(part, past_key_values=cache)
    for layer, found in mass.layers.items():
        assert found.queries == whole[layer].queries == 80
        assert found.mean == pytest.approx(whole[layer].mean, abs=1e-5)


def test_queries_whose_keys_the_cache_has_dropped_are_left_out():
    model, ids = hf_sparse.patch_model(tiny("llama"), StreamingLLM(sinks=2, window=6)), tokens(2, 30)
    with hf_sparse.monitored(model, queries=ALL) as mass:
        model.generate(ids, max_new_tokens=40, do_sample=False)
    prompt = measured(model, ids)
    assert 60 <= mass.layers[0].queries < 80  # some tokens are dropped later than they might be
    assert mass.layers[0].mean == pytest.approx(prompt[0].mean, abs=0.1)


def test_heads_held_apart_by_the_cache_are_refused():
    pattern = PerHead([SlidingWindow(3), SlidingWindow(3), Full(), Full()])
    model = hf_sparse.patch_model(tiny("llama"), pattern)
    with hf_sparse.monitored(model), pytest.raises(ValueError, match="pass use_cache=False"):
        model.generate(tokens(1, 20), max_new_tokens=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_as_without(checkpointing):
    ids, results = tokens(2, 40), []
    for watched in (False, True):
        model = hf_sparse.patch_model(tiny("gpt2"), SELECTOR).train()  # drops tokens at random
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        if watched:
            with hf_sparse.monitored(model, queries=9) as mass:
                loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
        else:
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        results.append((loss.detach(), torch.rand(3), *[p.grad for p in model.parameters()]))
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)
    assert [found.queries for found in mass.layers.values()] == [18, 18]  # not those that ran again


def test_outputs_are_as_without_and_the_model_is_left_alone():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 40)
    before = {module: set(vars(module)) for module in model.modules()}
    want = logits(model, ids)
    with hf_sparse.monitored(model) as outer, hf_sparse.monitored(model, queries=3) as inner:
        assert torch.equal(logits(model, ids), want)
    assert (outer.layers[1].queries, inner.layers[1].queries) == (16, 3)
    logits(model, ids)
    assert outer.layers[1].queries == 16
    for module, names in before.items():
        assert set(vars(module)) == names
    inner.reset()
    assert inner.layers == {} and np.isnan(inner.mean)


def test_describe_reports_it_inside_the_block_alone():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 40)
    before = hf_sparse.describe(model)
    with hf_sparse.monitored(model) as mass:
        assert (
            hf_sparse.describe(model)
            == f"{before}\nmass      of the dense attention: nothing is measured yet"
        )
        logits(model, ids)
        text = hf_sparse.describe(model)
    assert f"mass      {mass.mean:.3f} of the dense attention is kept, the mean of 2 layers\n" in text
    assert f"layer 1: {mass.layers[1].mean:.3f} of 16 queries" in text and text.endswith(str(mass))
    assert hf_sparse.describe(model) == before


def test_mistakes_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"call hf_sparse\.patch_model before hf_sparse\.monitored"):
        hf_sparse.monitored(model).__enter__()
    hf_sparse.patch_model(model, SELECTOR)
    for queries in (0, 1.5, True):
        with pytest.raises(
            ValueError, match="queries must be a whole number per sequence and call from 1 on"
        ):
            hf_sparse.monitored(model, queries=queries).__enter__()
    for seed, said in ((-1, "seed must be >= 0, got -1"), (1.5, "seed must be a whole number, got 1.5")):
        with pytest.raises(ValueError, match=said):
            hf_sparse.monitored(model, seed=seed).__enter__()
    with hf_sparse.monitored(model):
        with pytest.raises(ValueError, match=r"another pattern inside hf_sparse\.monitored; leave the block"):
            hf_sparse.patch_model(model, SlidingWindow(5))
        logits(model, tokens(1, 9))  # goes on under its own


def test_blocks_may_be_left_in_any_order():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 9)
    first, second = hf_sparse.monitored(model), hf_sparse.monitored(model)
    one = first.__enter__()
    two = second.__enter__()
    logits(model, ids)
    first.__exit__(None, None, None)
    before = two.layers[1].queries
    logits(model, ids)
    assert two.layers[1].queries == 2 * before
    second.__exit__(None, None, None)
    logits(model, ids)
    assert two.layers[1].queries == 2 * before and one.layers[1].queries == before
