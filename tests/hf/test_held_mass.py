"""Budgets that hold a share of the attention mass: the rule, the trained model, and what lies around them."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from caching import CLOSE
from tiny_models import logits, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import (
    Full,
    GatherScatterAttention,
    Layered,
    PerLayer,
    Quest,
    SlidingWindow,
    Threshold,
    TopKBlocks,
    get_pattern,
    recording,
)
from hf_sparse.documents import standard_library
from hf_sparse.hf import held_mass
from hf_sparse.hf.budget_rule import Range, changed, range_of
from hf_sparse.hf.budgets import budgets_over
from hf_sparse.hf.computed import AttentionCall, computed_by
from hf_sparse.hf.kept_mass import LayerMass

SELECTOR = TopKBlocks(keep=4, block=4, local=0, query_block=2)
BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def hold(model, ids, passes, **options):
    with hf_sparse.hold_mass(model, **options) as held, torch.no_grad():
        for _ in range(passes):
            model(ids, use_cache=False)
    return held


def selections(model, *args, **kwargs):
    """Return what the first layer selects in a call of `model`."""
    found = []

    def compute(asked: AttentionCall):
        found.append(asked.selections)
        return asked.attend()

    with computed_by(model, compute), torch.no_grad():
        model(*args, **kwargs)
    return found[0][0]


# the rule


@pytest.mark.parametrize("blocks", [7.3, 40.0, 99.0])
def test_no_change_at_the_goal_and_else_against_the_loss(blocks):
    limits = Range(5, 100, 100)
    assert changed(blocks, 0.05, 0.05, limits, 0) == pytest.approx(blocks)
    steps = [changed(blocks, lost, 0.05, limits, 0) for lost in (0.0, 0.03, 0.05, 0.06, 0.1, 1.0)]
    assert steps == sorted(steps) and steps[0] >= blocks / 2 and steps[-1] <= blocks * 2
    small = changed(blocks, 0.06, 0.05, limits, 4)
    assert blocks < small < steps[3]
    assert (small - blocks) == pytest.approx((steps[3] - blocks) / 5, rel=0.1)
    assert changed(blocks, 0.06, 0.05, limits, 1000) == changed(blocks, 0.06, 0.05, limits, 9)


def test_the_whole_range_is_reached_and_not_left():
    limits = Range(5, 100, 100)
    blocks = 30.0
    for _ in range(12):
        blocks = changed(blocks, 0.5, 0.05, limits, 0)
    assert blocks == 100
    assert 99 < changed(blocks, 0.0499, 0.05, limits, 9) < 100
    for _ in range(12):
        blocks = changed(blocks, 0.0, 0.05, limits, 0)
    assert blocks == 5
    assert changed(1.0, 0.0, 0.05, limits, 0) == 5  # no less than is read in any case
    assert changed(7.0, 0.2, 0.05, Range(7, 7, 7), 0) == 7
    assert changed(200.0, 0.2, 0.05, limits, 0) == 200  # of longer texts
    assert changed(200.0, 0.0, 0.05, limits, 0) == pytest.approx(100)
    assert changed(50.0, 0.1, 0.0, limits, 0) > 50 and changed(50.0, 0.0, 0.0, limits, 0) == pytest.approx(50)


def test_what_a_budget_can_say():
    own = TopKBlocks(keep=0.5, block=4, sinks=1, local=2)
    assert range_of(own, 20) == Range(4, 20, 20) and range_of(own, 3) == Range(3, 3, 3)
    assert range_of(TopKBlocks(keep=8, block=4, local=0), 20) == Range(2, 20, 20)
    # a query may see two blocks of its own, so that one block more is kept
    assert range_of(TopKBlocks(keep=8, block=8, query_block=5, local=0), 20) == Range(3, 20, 20)
    assert range_of(Quest(keep=8, least=9, dense_layers=0), 20) == Range(9, 20, 20)
    assert range_of(GatherScatterAttention(keep=0.5, least=6, most=11), 20) == Range(6, 11, 20)
    assert range_of(GatherScatterAttention(keep=7, least=6, most=11), 20) == Range(4, 20, 20)


@pytest.mark.parametrize("power", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_it_settles_for_any_usual_curve(power, noise):
    limits, random = Range(4, 256, 256), np.random.default_rng(0)
    blocks, turns, rising, late = 30.0, 0, None, []
    for number in range(80):
        exact = (1 - blocks / 256) * (4 / blocks) ** power
        lost = exact * random.lognormal(-noise * noise / 2, noise)
        turns += rising is not None and rising != (lost > 0.05)
        rising = lost > 0.05
        blocks = changed(blocks, lost, 0.05, limits, turns)
        late += [exact] if number >= 40 else []
    assert np.mean(late) == pytest.approx(0.05, abs=0.005 if noise else 0.0005)
    assert np.std(late) < (0.01 if noise else 0.0005)


def test_turns_are_counted_and_the_limits_told():
    own = TopKBlocks(keep=4, block=4, local=0)
    budget = held_mass._Budget((0,), own, 4, seen=20)
    for mass, turns in ((0.8, 0), (0.9, 0), (0.99, 1), (0.98, 1), (0.7, 2)):
        budget.change({0: LayerMass((mass,), 64)}, 0.95)
        assert (budget.turns, budget.seen) == (turns, 1) and budget.limits.seen == (20 if mass == 0.8 else 1)
    for keep, mass, limit in (
        (2, 0.96, "the least budget keeps more"),
        (2, 0.94, ""),
        (3, 0.96, ""),
        (20, 0.94, "the whole budget keeps less"),
        (20, 0.96, ""),
        (19, 0.94, ""),
        (0.1, 0.96, "the least budget keeps more"),
        (0.11, 0.96, ""),
        (0.96, 0.94, "the whole budget keeps less"),
        (0.94, 0.94, ""),
    ):
        budget = held_mass._Budget((0,), own, keep, seen=20)
        budget.change({0: LayerMass((mass,), 64)}, 0.95)
        assert budget.limit == limit, (keep, mass)


def test_a_share_beyond_what_a_selector_takes_is_lowered():
    own = GatherScatterAttention(keep=0.9, block=4, local=0, least=2, most=6)
    budget = held_mass._Budget((0,), own, 0.9, seen=16)
    budget.change({0: LayerMass((0.96,), 64)}, 0.95)
    assert 0.3 < budget.keep < 6 / 16 and budget.limit == ""


# a trained model


def texts(tokenizer, split, count, length=256):
    found = []
    for document in standard_library(split):
        ids = tokenizer(document.text[: 8 * length], verbose=False)["input_ids"]
        found += [ids[:length]] if len(ids) >= length else []
        if len(found) == count:
            return torch.tensor(found)
    raise AssertionError("too few documents")


@pytest.fixture(scope="module")
def trained():
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    return model.eval(), texts(tokenizer, "validation", 24), texts(tokenizer, "test", 12)


@pytest.mark.parametrize(
    "pattern",
    [
        TopKBlocks(keep=0.12, block=4, query_block=4, local=4),
        Quest(keep=10, block=4, query_block=1, local=4, dense_layers=0),
    ],
    ids=["topk_blocks share", "quest number"],
)
@torch.no_grad()
def test_held_out_text_keeps_the_target(trained, pattern):
    model, given, held_out = trained
    with hf_sparse.patched(model, pattern):
        with hf_sparse.monitored(model, queries=64) as mass:
            model.model(held_out[:4], use_cache=False)
        assert min(found.mean for found in mass.layers.values()) < 0.7
        with hf_sparse.hold_mass(model, target=0.95, queries=32) as held:
            for number in range(12):
                model.model(given[torch.arange(4 * number, 4 * number + 4) % 24], use_cache=False)
    assert len({own.keep for own in held.layers.values()}) == 6
    assert all(type(own.keep) is type(pattern.keep) for own in held.layers.values())
    with hf_sparse.patched(model, held.pattern), hf_sparse.monitored(model, queries=64, seed=1) as mass:
        for part in held_out.split(4):
            model.model(part, use_cache=False)
    for layer, found in mass.layers.items():
        assert found.mean == pytest.approx(0.95, abs=0.02), (layer, mass.layers)


# around a model


def test_budgets_lie_over_the_pattern_inside_the_block_alone():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(4, 80)
    config, before, hooks = model.config.to_dict(), logits(model, ids), len(model.model._forward_hooks)
    with hf_sparse.hold_mass(model, target=0.9) as held, torch.no_grad():
        assert torch.equal(logits(model, ids), before)  # the first call runs what was patched
        for _ in range(5):
            model(ids, use_cache=False)
        found = {layer: own.keep for layer, own in held.layers.items()}
        assert min(found.values()) > 4 and held.pattern.keep == tuple(found.values())
        now = logits(model, ids)
        assert model.config.to_dict() == config
    assert len(model.model._forward_hooks) == hooks
    assert torch.equal(logits(model, ids), before)
    hf_sparse.patch_model(model, TopKBlocks(keep=list(found.values()), block=4, local=0, query_block=2))
    torch.testing.assert_close(logits(model, ids), now, **CLOSE)


def test_a_change_is_for_what_was_measured():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 80)
    with hf_sparse.monitored(model, queries=80) as mass:
        logits(model, ids, use_cache=False)
    held = hold(model, ids, 1, queries=80)
    for layer, own in held.layers.items():
        assert own.mass.mean == pytest.approx(mass.layers[layer].mean) and own.mass.queries == 80
        assert own.keep == round(changed(4, 1 - own.mass.mean, 0.05, Range(2, 20, 20), 0))


def test_enough_is_measured_before_a_change():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(1, 40)
    with hf_sparse.hold_mass(model) as held:
        for number in range(3):
            logits(model, ids)
            assert all(own.mass is None and own.keep == 4 for own in held.layers.values()), number
        logits(model, ids)
        assert all(own.mass.queries == 64 and own.keep > 4 for own in held.layers.values())


def test_layers_that_share_a_selection_share_a_budget():
    ids = tokens(4, 80)
    model = hf_sparse.patch_model(tiny("llama"), TopKBlocks(keep=0.2, block=4, local=0, reuse=2))
    held = hold(model, ids, 6)
    assert held.layers[0].keep == held.layers[1].keep > 0.2
    assert held.layers[0].mass.mean != held.layers[1].mass.mean
    model = hf_sparse.patch_model(
        tiny("llama"), TopKBlocks(keep=0.2, block=4, local=0, dense_layers=1, reuse=2)
    )
    held = hold(model, ids, 3)
    assert list(held.layers) == [1] and held.pattern.keep == (0.2, held.layers[1].keep)


@pytest.mark.parametrize(
    "pattern",
    [
        SELECTOR | SlidingWindow(7),
        TopKBlocks(keep=[0.3, 5], block=4, local=0),
        PerLayer((SlidingWindow(9), SELECTOR)),
        PerLayer((SELECTOR, TopKBlocks(keep=0.3, block=2) | SlidingWindow(5))),
        Layered({1: TopKBlocks(keep=0.2, block=4, local=0)}),
        Layered(pattern=SELECTOR, dense_every=2),
        Threshold(keep=6, p=0.99, block=4, local=0),
    ],
    ids=str,
)
def test_the_pattern_found_runs_as_it_was_held_and_is_saved(pattern, tmp_path):
    model, ids = hf_sparse.patch_model(tiny("llama"), pattern), tokens(4, 80)
    with hf_sparse.hold_mass(model, target=0.9) as held, torch.no_grad():
        for _ in range(3):
            model(ids, use_cache=False)
        found, text = held.settings, hf_sparse.describe(model)
        now = logits(model, ids, use_cache=False)
    assert found.pattern != pattern and type(found.pattern) is type(pattern)
    assert f"pattern   {found.pattern}" in text
    path = hf_sparse.save_pattern(found, tmp_path / "held.json")
    torch.testing.assert_close(logits(hf_sparse.patch_model(model, path), ids, use_cache=False), now, **CLOSE)


def test_layers_of_a_list_have_one_budget_each():
    model = hf_sparse.patch_model(tiny("llama"), PerLayer((SELECTOR, SELECTOR | SlidingWindow(5))))
    held = hold(model, tokens(4, 80), 3)
    first, second = held.pattern.patterns
    assert first.keep == held.layers[0].keep and second.members[0].keep == held.layers[1].keep


def test_blocks_behind_the_models_own_window_are_not_counted():
    """A window of 9 keys lies in 3 blocks of 4 at most, of which it sees 2 whole and the query's own."""
    model = hf_sparse.patch_model(tiny("gemma2"), TopKBlocks(keep=1.0, block=4, local=0))
    held = hold(model, tokens(4, 80), 1)
    assert [held._of[layer].limits.seen for layer in (0, 1)] == [3, 20]


def test_layers_that_are_not_patched_are_left_alone():
    model = hf_sparse.patch_model(tiny("llama"), SELECTOR, layers=[1])
    held = hold(model, tokens(4, 80), 2)
    assert list(held.layers) == [1] and held.settings.layers == (1,) and held.pattern.keep[0] == 4


@pytest.mark.parametrize("budgets", [(3, 9), (9, 3)], ids=str)
def test_a_cache_goes_on_under_another_budget(budgets):
    """A block of queries that has begun reads on what it selected, and later ones select with the new budget."""
    pattern, ids = TopKBlocks(keep=budgets[0], block=4, local=0, query_block=8, sinks=0), tokens(2, 64)
    outputs = {}
    for backend in ("reference", "torch"):
        model = hf_sparse.patch_model(tiny("llama"), pattern, backend=backend)
        cache, now = hf_sparse.make_cache(model), dict.fromkeys((0, 1), budgets[0])
        with budgets_over(model, now), recording() as seen:
            parts = [logits(model, ids[:, :43], past_key_values=cache)]
            now.update(dict.fromkeys((0, 1), budgets[1]))
            parts.append(logits(model, ids[:, 43:45], past_key_values=cache))
            middle = selections(model, ids[:, 45:51], past_key_values=cache)
            parts.append(logits(model, ids[:, 51:], past_key_values=cache))
        outputs[backend] = torch.cat(parts, 1)
        counts = (middle.lists >= 0).sum(-1)
        assert middle.counts.tolist() == [budgets[0] - 1, budgets[1] - 1]
        assert torch.equal(counts, torch.tensor(middle.counts).expand_as(counts))
        last = logits(hf_sparse.patch_model(model, pattern), ids[:, :43])
        torch.testing.assert_close(parts[0], last, **CLOSE)
    torch.testing.assert_close(outputs["torch"], outputs["reference"], **CLOSE)
    assert len(seen.calls) == 8


def test_generation_is_held_and_goes_on_afterwards():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(4, 60)
    cache = hf_sparse.make_cache(model)
    with hf_sparse.hold_mass(model, target=0.9) as held:
        model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache)
        assert min(own.keep for own in held.layers.values()) > 4
        assert held.layers[0].mass.queries == 64
    assert logits(model, ids[:, :1], past_key_values=cache).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_a_layer_again_with_the_budget_it_had(reentrant):
    ids, grads = tokens(4, 60), []
    for checkpointing in (False, True):
        model = hf_sparse.patch_model(tiny("llama"), TopKBlocks(keep=3, block=4, local=0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with hf_sparse.hold_mass(model) as held:
            loss = model(ids, labels=ids, use_cache=False).loss
            assert held.layers[0].keep > 3  # changed when the forward pass ended
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_every_change_is_logged(tmp_path, caplog):
    model, ids, path = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(4, 80), tmp_path / "mass.jsonl"
    path.write_text("earlier\n")
    with (
        caplog.at_level(logging.INFO, held_mass.__name__),
        hf_sparse.hold_mass(model, target=0.9, queries=8, log=path) as held,
    ):
        for _ in range(4):
            logits(model, ids)
        lines = path.read_text().splitlines()  # while it runs
    assert lines.pop(0) == "earlier" and len(lines) == 4 == len(caplog.messages)
    entries = [json.loads(line) for line in lines]
    assert [(e["step"], e["layer"], e["queries"]) for e in entries] == [
        (s, n, 64) for s in (2, 4) for n in (0, 1)
    ]
    for first, second in zip(entries[:2], entries[2:], strict=True):
        own = held.layers[first["layer"]]
        assert (
            first["keep_before"] == 4
            and second["keep_before"] == first["keep"]
            and second["keep"] == own.keep
        )
        assert second["mass"] == pytest.approx(own.mass.mean, abs=1e-6)
    assert "layer 1 kept " in caplog.messages[1] and "of 64 queries: keep 4 -> " in caplog.messages[1]
    with pytest.raises(OSError, match="nowhere"):
        hf_sparse.hold_mass(model, log=tmp_path / "nowhere" / "mass.jsonl").__enter__()
    hold(model, ids, 1)  # nothing was left behind


def test_describe_says_what_is_held_and_what_is_out_of_reach():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(4, 80)
    before = hf_sparse.describe(model)
    with hf_sparse.hold_mass(model, target=0.9) as held:
        text = hf_sparse.describe(model)
        assert "mass      held at 0.9 of the dense attention in 2 layers, by their budgets\n" in text
        assert "layer 0: keep=4, nothing is measured yet" in text
        logits(model, ids)
        own, text = held.layers[1], hf_sparse.describe(model)
        assert f"layer 1: keep={own.keep}, kept {own.mass.mean:.3f} of 64 queries" in text
        assert "out of reach" not in text and text.endswith(str(held))
    assert hf_sparse.describe(model) == before
    low = hf_sparse.patch_model(tiny("llama"), TopKBlocks(keep=0.5, block=16))
    assert str(hold(low, ids, 4, target=0.3)).count("; out of reach: the least budget keeps more") == 2
    high = hf_sparse.patch_model(tiny("llama"), GatherScatterAttention(block=4, least=3, most=8))
    held = hold(high, ids, 4, target=1.0)
    assert (
        str(held).count("keep=1.0, kept 0.")
        == 2
        == str(held).count("; out of reach: the whole budget keeps less")
    )


def test_the_target_of_one_reads_everything():
    model, ids = hf_sparse.patch_model(tiny("llama"), SELECTOR), tokens(4, 80)
    with hf_sparse.hold_mass(model, target=1.0, queries=80) as held:
        for _ in range(8):
            logits(model, ids)
            assert "out of reach" not in str(held)  # also where the whole budget comes next
        torch.testing.assert_close(logits(model, ids), logits(tiny("llama"), ids), **CLOSE)
    assert min(own.keep for own in held.layers.values()) > 17 and "out of reach" not in str(held)
    assert all(math.isclose(own.mass.mean, 1, abs_tol=1e-6) for own in held.layers.values())


@pytest.mark.parametrize("target", [0, -0.1, 1.01, True, "0.9", float("nan")], ids=str)
def test_targets_out_of_range_are_refused(target):
    model = hf_sparse.patch_model(tiny("llama"), SELECTOR)
    with pytest.raises(ValueError, match=r"target must be a share of the mass above 0 and up to 1, got"):
        hf_sparse.hold_mass(model, target=target).__enter__()


def test_models_without_budgets_are_refused():
    def refused(model, match, **options):
        with pytest.raises(ValueError, match=match):
            hf_sparse.hold_mass(model, **options).__enter__()

    refused(tiny("llama"), r"call hf_sparse\.patch_model before hf_sparse\.hold_mass")
    for pattern in (SlidingWindow(5), PerLayer((Full(), SELECTOR | Full()))):
        refused(hf_sparse.patch_model(tiny("llama"), pattern), "selects by content, so there are no budgets")
    model = hf_sparse.patch_model(tiny("llama"), SELECTOR)
    refused(model, "queries must be a whole number", queries=0)
    with hf_sparse.hold_mass(model):
        refused(model, "is held already; leave the outer")
        other = hf_sparse.patch_model(tiny("llama"), SELECTOR)
        with hf_sparse.hold_mass(other):
            pass
        with pytest.raises(ValueError, match=r"another pattern inside hf_sparse\.hold_mass"):
            hf_sparse.patch_model(model, SlidingWindow(5))
    for name in ("vertical_slash", "lsh"):
        model = hf_sparse.patch_model(
            tiny("llama"), PerLayer((SELECTOR, get_pattern(name) | SlidingWindow(3)))
        )
        refused(model, rf"layer 1 runs {name}\(.*\), which has no budget \(keep\)")
