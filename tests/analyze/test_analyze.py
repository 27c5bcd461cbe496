"""Analysis: the mass is that of the full attention weights, and patterns are made as large as the density asks for."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_model
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

import hf_sparse
from hf_sparse import (
    BlockLocal,
    EssentialSparseAttention,
    GlobalTokens,
    KVStar,
    PerHead,
    PerLayer,
    Quest,
    ReRoPE,
    SlidingWindow,
    StreamingLLM,
    Strided,
    TopKBlocks,
    analyze,
    patch_model,
    unpatch_model,
)
from hf_sparse.analyze import SIZES, Scaled
from hf_sparse.analyze.measure import kept_by_head, kept_by_window
from hf_sparse.backends import Call
from hf_sparse.calibrate.gated import Gated
from hf_sparse.calibrate.units import units_of
from hf_sparse.calibrate.windows import windows_of
from hf_sparse.evaluate.head import ChunkedHead
from hf_sparse.evaluate.processes import Processes
from hf_sparse.hf.computed import AttentionCall
from hf_sparse.plan import Constraint, Segments
from hf_sparse.plan.cost import cost

TEXTS = [Path(argparse.__file__).read_text(encoding="utf-8")[i * 3000 : (i + 1) * 3000] for i in range(3)]
LENGTH = 96
DENSE = 1.0  # as density: every pattern is then held against the others, whatever it reads


def analyzed(model, tokenizer, patterns=None, density=DENSE, **options):
    settings = {"tokenizer": tokenizer, "length": LENGTH, "samples": 2, "queries": LENGTH}
    return analyze(model, TEXTS, patterns, density, **{**settings, **options})


def read_windows(model, tokenizer, samples=2):
    return windows_of(ChunkedHead(model, 8), tokenizer, TEXTS, length=LENGTH, samples=samples, seed=0).entries


@torch.no_grad()
def dense_weights(model, ids):
    """The attention weights [L, H, N, N] of the model's own eager attention."""
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(kept)
    return torch.cat(weights)


@torch.no_grad()
def read_by(model, pattern, ids, layer):
    """Which pairs [H, N, N] a layer under the pattern reads of what the dense layers below it give."""
    patch_model(model, pattern, layers=[layer])
    weights = model(ids, output_attentions=True, use_cache=False).attentions[layer][0]
    unpatch_model(model)
    return weights > 0


PATTERNS = (
    SlidingWindow(11),
    StreamingLLM(sinks=2, window=9),
    Strided(7),
    PerHead((SlidingWindow(3), BlockLocal(8), Strided(5), SlidingWindow(40))),
    PerLayer((SlidingWindow(4), StreamingLLM(window=5))),
    TopKBlocks(keep=0.3, block=8, local=1),
    Quest(keep=4, block=4, dense_layers=0, sinks=0, local=0),
    EssentialSparseAttention(keep=0.2, block=8, local=0),
    KVStar(keep=0.4, block=8, query_block=4),
    TopKBlocks(keep=0.2, block=4) | Strided(9),
)


def test_mass_is_that_of_the_full_weights_on_the_pairs_that_are_read(tiny_model, tiny_tokenizer):
    found = analyzed(tiny_model, tiny_tokenizer, PATTERNS)
    assert found.mass.shape == (len(PATTERNS), 2, 4) and found.layers == (0, 1)
    assert found.patterns == PATTERNS
    expected = np.zeros(found.mass.shape)
    for window in read_windows(tiny_model, tiny_tokenizer):
        weights = dense_weights(tiny_model, window.ids)
        for number, pattern in enumerate(PATTERNS):
            for layer in range(2):
                read = read_by(tiny_model, pattern, window.ids, layer)
                expected[number, layer] += (weights[layer] * read).sum(-1).mean(-1).numpy() / 2
    np.testing.assert_allclose(found.mass, expected, rtol=1e-5)
    assert found.mass.min() > 0.05 and found.mass.max() < 0.999


def test_each_head_wants_the_comparable_pattern_that_keeps_most_of_its_mass(tiny_model, tiny_tokenizer):
    patterns = (SlidingWindow(12), Strided(8), StreamingLLM(sinks=1, window=11), SlidingWindow(70))
    found = analyzed(tiny_model, tiny_tokenizer, patterns, 0.25)
    assert found.comparable.tolist() == [True, True, True, False]
    assert (found.mass[3] > found.mass[:3].max(0)).any(), "the one that reads most would win"
    assert (found.wanted == found.mass[:3].argmax(0)).all()
    assert sum(found.wanted_by) == 8 and found.wanted_by[3] == found.nearly_by[3] == 0
    short = found.mass[:3].max(0) - found.mass
    assert found.nearly_by[:3] == [(short[number] < 0.01).sum() for number in range(3)]
    rows = found.table().splitlines()[4:8]  # the best first, and last what is not held against them
    assert "denser" in rows[3] and "window=70" in rows[3]
    means = [float(row.split("%")[1].split()[0]) for row in rows[:3]]
    assert means == sorted(means, reverse=True) and means[0] > means[2]


def test_patterns_that_all_have_their_size_are_held_against_each_other(tiny_model, tiny_tokenizer):
    found = analyzed(tiny_model, tiny_tokenizer, [SlidingWindow(60), SlidingWindow(3)], None)
    assert found.density == found.densities[0] > 0.8 and found.comparable.all()
    fitted = analyzed(tiny_model, tiny_tokenizer, [SlidingWindow(60), "streaming_llm"], None)
    assert fitted.density == 0.125 and fitted.comparable.tolist() == [False, True]


def test_of_patterns_that_keep_as_much_the_first_is_wanted(tiny_model, tiny_tokenizer):
    same = (BlockLocal(LENGTH), SlidingWindow(LENGTH), StreamingLLM(window=LENGTH))
    found = analyzed(tiny_model, tiny_tokenizer, same)
    assert (found.wanted == 0).all() and found.nearly_by == [8, 8, 8]
    assert "layers 0-1: all block_local" in found.table()


def test_a_few_queries_of_each_window_are_drawn_the_same_for_the_same_seed(tiny_model, tiny_tokenizer):
    once, again, other = (
        analyzed(tiny_model, tiny_tokenizer, PATTERNS[:6], queries=5, seed=seed).mass for seed in (3, 3, 4)
    )
    whole = analyzed(tiny_model, tiny_tokenizer, PATTERNS[:6]).mass
    assert (once == again).all()
    assert (once != other).any() and (once != whole).any()
    assert abs(once - whole).max() < 0.5


def test_the_model_is_as_before_and_its_own_pattern_is_set_aside(tiny_model, tiny_tokenizer):
    expected = analyzed(tiny_model, tiny_tokenizer, PATTERNS[:2]).mass
    ids = torch.arange(40)[None]
    patch_model(tiny_model, "sliding_window", window=3)
    before = tiny_model(ids).logits
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = analyzed(tiny_model.train(), tiny_tokenizer, PATTERNS[:2])
    assert tiny_model.training
    torch.testing.assert_close(tiny_model.eval()(ids).logits, before, rtol=0, atol=0)
    np.testing.assert_allclose(found.mass, expected, rtol=1e-6)


def test_usual_patterns_come_as_near_to_the_density_as_they_can(tiny_model, tiny_tokenizer):
    found = analyzed(tiny_model, tiny_tokenizer, None, 0.35, length=384, samples=1, queries=3)
    usual = [name for name, size in SIZES.items() if size.usual]
    assert found.names == [pattern.name for pattern in found.patterns] == usual
    for pattern, density in zip(found.patterns, found.densities, strict=True):
        assert density == pytest.approx(cost(pattern, 384, heads=4).density)
        assert density == pytest.approx(0.35, abs=0.07), pattern
    assert found.comparable.sum() >= len(usual) - 2
    for name in ("quest", "gsa_on_device"):
        assert found.patterns[usual.index(name)].dense_layers == 0
    assert found.notes == (
        "as if dense_layers=0, reuse=1, so that every layer selects: quest, gsa_on_device",
    )


@pytest.mark.parametrize("name", SIZES)
def test_no_other_size_comes_nearer(name):
    def density(pattern):
        if hasattr(pattern, "dense_layers"):
            pattern = dataclasses.replace(pattern, dense_layers=0)
        return cost(pattern, 128, heads=2).density

    size = SIZES[name]
    fitted = Scaled(name).fitted(128, 0.3, density)
    options = {**size.beside(128, 0.3), size.option: None}
    apart = abs(density(fitted) - 0.3)
    low, high = size.sizes(128, options)
    for tried in range(low, high + 1, max(1, (high - low) // 150)):
        other = hf_sparse.get_pattern(name, **{**options, size.option: size.value(tried)})
        # blocks that do not divide the window make a larger one read a little less here and there
        assert abs(density(other) - 0.3) >= apart - 1e-9, (fitted, other)


def test_options_besides_the_size_are_kept(tiny_model, tiny_tokenizer):
    given = [
        Scaled("streaming_llm", {"sinks": 9}),
        Scaled("topk_blocks", {"block": 4, "local": 0}),
        "strided",
    ]
    found = analyzed(tiny_model, tiny_tokenizer, given, 0.4, samples=1)
    streaming, topk, strided = found.patterns
    assert streaming.sinks == 9 and (topk.block, topk.local) == (4, 0) and strided == Strided(3)
    assert found.densities == pytest.approx((0.4, 0.4, 0.35), abs=0.02)
    with pytest.raises(ValueError, match="window of sliding_window is what is fitted, got 8"):
        Scaled("sliding_window", {"window": 8})
    with pytest.raises(ValueError, match="no option sets the size of full; these have one: sliding_window"):
        Scaled("full")


SHAPE = {
    "vocab_size": 400,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def test_density_counts_the_pairs_under_what_the_model_itself_allows(tiny_tokenizer):
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = 40
    mistral = random_model("MistralForCausalLM", {**SHAPE, **heads, "sliding_window": window})
    found = analyzed(mistral, tiny_tokenizer, [SlidingWindow(window // 2), SlidingWindow(window)])
    own = cost(SlidingWindow(window // 2), LENGTH, constraint=Constraint(window=window)).density
    assert found.densities == pytest.approx((own, 1))
    assert found.mass[1].min() == 1 > found.mass[0].max()


def test_density_is_that_of_all_layers_together(tiny_model, tiny_tokenizer):
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    alternating = {"sliding_window": 24, "layer_types": kinds, "num_hidden_layers": 3}
    gemma = random_model("Gemma2ForCausalLM", {**SHAPE, **heads, **alternating})
    (density,) = analyzed(gemma, tiny_tokenizer, [Strided(4)], queries=1, samples=1).densities
    local = cost(Strided(4), LENGTH, constraint=Constraint(window=24))
    whole = cost(Strided(4), LENGTH)
    assert density == (local.pairs + 2 * whole.pairs) / (local.dense_pairs + 2 * whole.dense_pairs)
    layers = SlidingWindow(4), StreamingLLM(window=30)
    (density,) = analyzed(tiny_model, tiny_tokenizer, [PerLayer(layers)], queries=1, samples=1).densities
    assert density == pytest.approx(np.mean([cost(one, LENGTH).density for one in layers]))


class Backwards(Processes):
    """Reads the windows in the other order, as processes that share them may."""

    def share(self, items):
        return list(items)[::-1]


def test_windows_keep_their_places_whoever_reads_them(tiny_model, tiny_tokenizer):
    head, units = ChunkedHead(tiny_model, 8), units_of(tiny_model, "head")
    windows = windows_of(head, tiny_tokenizer, TEXTS, length=LENGTH, samples=3, seed=0)
    same = dataclasses.replace(windows, entries=windows.entries[:1] * 2)
    gated = Gated(tiny_model, units, (hf_sparse.Full(),), "auto")
    rest = {"queries": 4, "seed": 0, "device": torch.device("cpu"), "bar": tqdm(disable=True)}
    one, other, twice = (
        kept_by_window(gated, head, windows, PATTERNS[:3], processes=processes, **rest)
        for windows, processes in ((windows, Processes()), (windows, Backwards()), (same, Processes()))
    )
    assert one.shape == (3, 3, 2, 4) and (one == other).all()
    assert (one[0] == twice[0]).all() and (twice[0] != twice[1]).any(), "each window draws its own queries"


@pytest.fixture
def encoder(tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=400, max_position_embeddings=128, initializer_range=0.3, **sizes)
    return BertForMaskedLM(config).eval()


@pytest.fixture
def masking(tiny_tokenizer):
    made = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    made.cls_token, made.sep_token, made.mask_token = "<s>", "</s>", "<pad>"
    return made


def test_an_encoder_is_measured_on_both_sides_and_by_patterns_of_positions_alone(encoder, masking):
    found = analyzed(encoder, masking, [SlidingWindow(6), StreamingLLM(sinks=1, window=4)], samples=1)
    (window,) = read_windows(encoder, masking, samples=1)
    weights = dense_weights(encoder, window.ids)
    for number, pattern in enumerate(found.patterns):
        expected = (weights * pattern.mask(LENGTH, causal=False)).sum(-1).mean(-1)
        np.testing.assert_allclose(found.mass[number], expected, rtol=1e-5)
    usual = analyzed(encoder, masking, None, 0.4, samples=1, queries=4)
    assert not any(pattern.content_based for pattern in usual.patterns) and len(usual.patterns) > 8
    assert "no causal model and these select for such alone: topk_blocks, quest" in usual.notes[0]
    with pytest.raises(ValueError, match=r"topk_blocks.* selects for causal .* BertForMaskedLM is no causal"):
        analyzed(encoder, masking, ["sliding_window", "topk_blocks"], 0.4)


def test_a_pattern_that_the_heads_do_not_fit_is_left_out_with_the_reason(tiny_tokenizer):
    heads = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    lone = random_model("LlamaForCausalLM", {**SHAPE, **heads, "num_hidden_layers": 1})
    found = analyzed(lone, tiny_tokenizer, None, 0.5, samples=1, queries=2)
    assert "shifted" not in found.names and "bigbird" in found.names
    assert found.notes[0].startswith("left out: shifted") and found.mass.shape[1:] == (1, 1)
    assert {"quest", "gsa_on_device"} < set(found.names)  # with dense_layers=0, else more than the model has
    assert len(found.notes) == 2
    with pytest.raises(ValueError, match="shifted"):
        analyzed(lone, tiny_tokenizer, ["shifted"], 0.5)


def test_mistakes_are_refused(tiny_model, tiny_tokenizer, encoder):
    def refused(match, *patterns, **options):
        with pytest.raises(ValueError, match=match):
            analyzed(tiny_model, tiny_tokenizer, patterns or None, **options)

    for density in (0, -0.5, 1.01, float("nan"), True, "half"):
        refused("density must be above 0 and at most 1", density=density)
    refused("unknown pattern 'sliding_windw'. Did you mean 'sliding_window'", "sliding_windw")
    refused("is given twice", SlidingWindow(4), SlidingWindow(4))
    refused("rerope.* scores far keys at other places", ReRoPE(window=8))
    refused("depends on the tokens of an input", GlobalTokens(token_ids=(3,)))
    refused(r"PerHead .* 2 .* 4", PerHead((SlidingWindow(4), SlidingWindow(3))))
    refused(
        "no pattern comes down to density=0.01 at 96 tokens, the sparsest is sliding_window",
        *(BlockLocal(16), SlidingWindow(12)),
        density=0.01,
    )
    refused("samples must be a whole number >= 1, got 0", samples=0)
    refused("queries must be a whole number >= 1, got 0", queries=0)
    refused("seed must be a whole number", seed=-1)
    refused("the texts hold .* windows of length=500 tokens, and samples=90", length=500, samples=90)
    with pytest.raises(ValueError, match="there is no pattern to analyse"):
        analyzed(tiny_model, tiny_tokenizer, [])
    with torch.no_grad():
        tiny_model.model.layers[1].self_attn.q_proj.weight[:] = float("nan")
    refused("not finite", SlidingWindow(4))


def test_weights_that_are_not_finite_are_told_of_in_the_call_itself(tiny_model, tiny_tokenizer):
    query = torch.full((1, 2, 8, 4), float("nan"))
    call = Call(hf_sparse.Full(), layer=3)
    asked = AttentionCall(tiny_model, query, query, query, call, Segments.whole(1, 8), "auto")
    with pytest.raises(ValueError, match="layer 3 gives attention weights that are not finite"):
        kept_by_head(asked, (SlidingWindow(4),), 4, (0,))


def test_what_is_saved_says_all_and_is_not_replaced_unasked(tiny_model, tiny_tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    found = analyzed(tiny_model, tiny_tokenizer, [SlidingWindow(11), SlidingWindow(5), Strided(7)])
    written = found.save(tmp_path / "new")
    assert [path.name for path in written] == ["analysis.json", "mass.csv", "heatmap.png"]
    saved = json.loads(written[0].read_text())
    assert saved["patterns"][0]["pattern"] == {"name": "sliding_window", "options": {"window": 11}}
    assert [one["name"] for one in saved["patterns"]] == [
        "sliding_window(window=11)",
        "sliding_window(window=5)",
        "strided",
    ]
    np.testing.assert_array_equal([one["mass"] for one in saved["patterns"]], found.mass)
    assert saved["wanted"] == found.wanted.tolist() and saved["config"]["samples"] == 2
    lines = written[1].read_text().splitlines()
    assert lines[0] == "pattern,density,layer,head,mass,wanted" and len(lines) == 1 + 3 * 2 * 4
    row = lines[1 + 2 * 8 + 1 * 4 + 3].split(",")
    assert row[0] == "strided(stride=7)" and row[2:4] == ["1", "3"] and float(row[4]) == found.mass[2, 1, 3]
    wanted = [line.endswith("True") for line in lines[1:]]
    assert wanted == [found.wanted[row, head] == n for n in range(3) for row in range(2) for head in range(4)]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"analysis\.json exists; name another folder"):
        found.save(tmp_path / "new")
    assert found.save(tmp_path / "new", overwrite=True) == written
