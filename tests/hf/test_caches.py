"""Every cache and every way to feed it give the logits and the tokens of no cache at all."""

import pytest
import torch
from caching import CLOSE, HYBRIDS, NAMES, OPTIONS, PATTERNS, PREFILLS, caches, decoder, fed, left_padded
from tiny_models import logits, tokens

from hf_sparse import Full, PerHead, SlidingWindow, SparseTransformerFixed, StreamingLLM, available_patterns
from hf_sparse.hf.cache import SparseCache
from hf_sparse.plan import held

PAIR = [SparseTransformerFixed(block=6, summary=2), StreamingLLM(sinks=2, window=4)]
PLACED = StreamingLLM(sinks=2, window=4, positions="cache")
RAGGED = PerHead((Full(), SlidingWindow(3), SlidingWindow(4), StreamingLLM(sinks=1, window=4)))
SELECTORS = [pattern for pattern in PATTERNS if pattern.content_based]
OTHERS = [
    (name, p)
    for name in NAMES
    if name != "llama"
    for p in (*PAIR, PLACED, RAGGED, SELECTORS[-1])
    if (name, p) != ("bart", PLACED)
]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
others = pytest.mark.parametrize(("name", "pattern"), OTHERS, ids=str)


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    monkeypatch.setattr(held, "SLACK", 3)  # keys are dropped after every third token


def check_logits(model, kinds=("ours", "dynamic", "static"), prefills=PREFILLS):
    """Feed a batch with and without padding to each kind of cache in each way."""
    rows = left_padded((0, 9, 3), 26)
    for ids, mask in ((rows["input_ids"], rows["attention_mask"]), (tokens(1, 26, seed=5), None)):
        seen = {} if mask is None else {"attention_mask": mask}
        whole = logits(model, ids, use_cache=False, **seen)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask == 1
        for way, lengths in prefills.items():
            for kind, cache in caches(model).items():
                if kind in kinds:
                    part = fed(model, ids, cache, lengths, mask)
                    torch.testing.assert_close(
                        part[real], whole[real], **CLOSE, msg=lambda m, k=kind, w=way: f"{k}, {w}: {m}"
                    )


def check_tokens(model, kinds=("ours", "dynamic", "static"), beams=(1, 3)):
    """Generate from a padded batch with each kind of cache, greedily and with beams."""
    rows = left_padded()
    for count in beams:
        expected = model.generate(**rows, use_cache=False, num_beams=count, **GREEDY)
        for kind, cache in caches(model).items():
            if kind == "static" and count > 1:  # a static cache has one row per beam from the start
                continue
            if kind in kinds:
                out = model.generate(**rows, past_key_values=cache, num_beams=count, **GREEDY)
                assert torch.equal(out, expected), f"{kind}, {count} beams"
        made = model.generate(**rows, num_beams=count, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(made.sequences, expected) and isinstance(made.past_key_values, SparseCache)


def test_every_registered_pattern_is_tried():
    assert sorted(OPTIONS) == available_patterns()


@every_pattern
def test_every_cache_gives_the_logits_of_no_cache(pattern):
    check_logits(decoder("llama", pattern), prefills={k: v for k, v in PREFILLS.items() if k != "whole"})


@every_pattern
def test_every_cache_gives_the_tokens_of_no_cache(pattern):
    check_tokens(decoder("llama", pattern))


@others
def test_every_architecture_gives_the_logits_of_no_cache(name, pattern):
    # a text fed in chunks reaches the linear layers of hybrids as other sums; they are not ours
    prefills = {"prompt": PREFILLS["prompt"]} if name in HYBRIDS else {"chunks": PREFILLS["chunks"]}
    check_logits(decoder(name, pattern), ("ours",), prefills)


@others
def test_every_architecture_gives_the_tokens_of_no_cache(name, pattern):
    check_tokens(decoder(name, pattern), ("dynamic",))  # ours is what generate makes


def fits(name, pattern):
    """True where the model can see tokens at the places of the pattern; BART's forward takes no position ids."""
    placed = any(pattern.places(layer) is not None for layer in (0, 1))
    return (
        not placed or name not in ("bart", "gpt2", "opt") or (name != "bart" and pattern.name == PLACED.name)
    )


PRODUCT = [(name, pattern) for name in NAMES for pattern in PATTERNS if fits(name, pattern)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), PRODUCT, ids=str)
def test_the_whole_product(name, pattern):
    model = decoder(name, pattern)
    prefills = {"prompt": PREFILLS["prompt"]} if name in HYBRIDS else PREFILLS
    check_logits(model, ("ours", "dynamic") if name in HYBRIDS else ("ours", "dynamic", "static"), prefills)
    check_tokens(model, ("ours", "dynamic"))


@pytest.mark.parametrize("pattern", [PAIR[1], PLACED, *SELECTORS], ids=str)
def test_pads_anywhere_among_new_tokens(pattern):
    """A call may bring pads behind tokens, between them, one token only, or none at all for a row."""
    model, texts = decoder("llama", pattern), tokens(3, 24)
    lengths = (6, 2, 5, 3, 1, 1, 7, 2)
    real = torch.zeros(3, sum(lengths), dtype=torch.long)
    real[0] = torch.tensor(
        [1] * 6 + [1, 0] + [1, 0, 0, 0, 0] + [1, 0, 1] + [1] + [0] + [1] * 5 + [0, 1] + [1, 1]
    )
    real[1] = torch.tensor(
        [0] * 5 + [1] + [1, 0] + [0, 0, 1, 0, 0] + [0, 0, 0] + [1] + [1] + [1] * 7 + [0, 1]
    )
    real[2] = torch.tensor(
        [0] * 6 + [1, 0] + [0, 1, 0, 0, 0] + [1, 1, 1] + [0] + [1] + [1, 0, 1, 0, 1, 1, 1] + [1, 0]
    )
    ids = torch.ones_like(real)
    for row in range(3):
        ids[row, real[row] == 1] = texts[row, : int(real[row].sum())]
    for cache in caches(model).values():
        got = fed(model, ids, cache, lengths, real, (real.cumsum(-1) - 1).clamp(min=0))
        for row in range(3):
            alone = logits(model, texts[row : row + 1, : int(real[row].sum())], use_cache=False)[0]
            torch.testing.assert_close(got[row, real[row] == 1], alone, **CLOSE)
