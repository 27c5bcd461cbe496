"""A filled cache in other modes, copied, reset, cropped, and beside another one."""

import copy
import pickle

import pytest
import torch
from caching import CLOSE, caches, decoder, fed
from tiny_models import logits, tokens

import hf_sparse
from hf_sparse import SlidingWindow, StreamingLLM, TopKBlocks
from hf_sparse.plan import held
from hf_sparse.selectors.lsh import LSH

PLACED = StreamingLLM(sinks=2, window=4, positions="cache")


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)
    monkeypatch.setattr("hf_sparse.hf.cache.SLACK", 3)


@pytest.mark.parametrize("pattern", [PLACED, TopKBlocks(keep=3, block=1, local=0), LSH(block=2)], ids=str)
def test_prefill_in_inference_mode_and_steps_without(pattern):
    model, ids = decoder("llama", pattern), tokens(1, 40)
    whole = logits(model, ids, use_cache=False)
    cache = hf_sparse.make_cache(model)
    with torch.inference_mode():
        first = fed(model, ids[:, :20], cache, (19, 1)).clone()  # the 20th makes room for more
    rest = fed(model, ids[:, 20:], cache, (1,) * 20)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, **CLOSE)
    with torch.inference_mode():
        model(tokens(1, 3), past_key_values=cache)


def test_a_selection_that_holds_goes_on_from_inference_mode_to_training():
    model, ids = decoder("llama", TopKBlocks(keep=3, block=4, local=0)), tokens(1, 24)
    cache = hf_sparse.make_cache(model)
    with torch.inference_mode():
        fed(model, ids[:, :22], cache, (20, 1, 1))
    out = model(ids[:, 22:23], past_key_values=cache).logits
    out.square().sum().backward()
    torch.testing.assert_close(out, logits(model, ids[:, :23], use_cache=False)[:, -1:], **CLOSE)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradients_reach_the_tokens_of_a_cached_prefix():
    model, ids = decoder("llama", PLACED), tokens(1, 24)
    embeds = model.get_input_embeddings()(ids).detach()
    grads = []
    for lengths in ((24,), (10, 1, 1, 7, 1, 4)):
        inputs, start, parts = embeds.clone().requires_grad_(), 0, []
        cache = hf_sparse.make_cache(model)
        for length in lengths:
            out = model(inputs_embeds=inputs[:, start : start + length], past_key_values=cache)
            parts.append(out.logits)
            start += length
        torch.cat(parts, 1).square().sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5 * float(grads[0].abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["llama", "falcon_h1", "mistral"])
def test_copies_of_a_filled_cache_go_on_by_themselves(name, how):
    model, ids = decoder(name, PLACED), tokens(2, 40)
    whole = logits(model, ids, use_cache=False)
    cache = hf_sparse.make_cache(model)
    fed(model, ids[:, :20], cache, (20,))
    twin = how(cache)
    for one in (cache, twin):  # the second is not disturbed by what the first has gone on to hold
        got = fed(model, ids[:, 20:], one, (1,) * 20)
        torch.testing.assert_close(got, whole[:, 20:], atol=2e-5, rtol=1e-3)
    assert twin.nbytes == cache.nbytes


def test_two_models_take_turns():
    one, two = decoder("llama", PLACED), decoder("llama", SlidingWindow(window=5))
    ids, feeds = tokens(1, 30), []
    expected = [logits(m, ids, use_cache=False) for m in (one, two)]
    own = [hf_sparse.make_cache(m) for m in (one, two)]
    for start in range(30):
        feeds.append(
            [
                logits(m, ids[:, start : start + 1], past_key_values=c)
                for m, c in zip((one, two), own, strict=True)
            ]
        )
    for number in range(2):
        torch.testing.assert_close(torch.cat([f[number] for f in feeds], 1), expected[number], **CLOSE)


def test_a_cache_can_be_reset_and_filled_again():
    model, first, second = decoder("llama", PLACED), tokens(2, 30), tokens(3, 25, seed=4)
    cache = hf_sparse.make_cache(model)
    fed(model, first, cache, (20, *(1,) * 10))
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.kept == 0
    got = fed(model, second, cache, (12, *(1,) * 13))  # another number of rows
    torch.testing.assert_close(got, logits(model, second, use_cache=False), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "falcon_h1", "lfm2"])
def test_rows_are_chosen_and_repeated(name):
    """As contrastive search does; transformers' own caches of hybrids cannot."""
    model, ids = decoder(name, PLACED), tokens(3, 30)
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        cache = hf_sparse.make_cache(model)
        fed(model, ids[:, :20], cache, (20,))
        cache.batch_select_indices(rows)
        cache.batch_repeat_interleave(2)
        chosen = ids[rows].repeat_interleave(2, 0)
        got = fed(model, chosen[:, 20:], cache, (1,) * 10)
        expected = logits(model, chosen, use_cache=False)[:, 20:]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tokens_are_taken_back_where_their_keys_are_there(count):
    model, ids = decoder("llama", PLACED), tokens(2, 30)
    for kind, cache in caches(model).items():
        if kind == "static":
            continue
        fed(model, ids[:, :14], cache, (14,))
        if kind == "ours":
            for layer in cache.layers:
                layer.activate_past_recording()
        fed(model, tokens(2, count, seed=9), cache, (1,) * count)
        cache.crop(-count)
        assert cache.get_seq_length() == 14
        got = fed(model, ids[:, 14:], cache, (5, *(1,) * 11))
        torch.testing.assert_close(got, logits(model, ids, use_cache=False)[:, 14:], **CLOSE)
