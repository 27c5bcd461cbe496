"""The recommended patterns are the table's, and fit the model they are for."""

import pytest
import torch
from tiny_models import tiny
from torch import nn

from hf_sparse import (
    Full,
    GroupedHeads,
    Longformer,
    SlidingWindow,
    SparseTransformerFixed,
    StreamingLLM,
    patch_model,
    recommended,
)
from hf_sparse.hf import recommend
from hf_sparse.hf.recommend import LONG, SCENARIOS, SHORT


@pytest.mark.parametrize(
    ("seq_len", "scenario", "pattern"),
    [
        (4096, "documents", Longformer(window=512)),
        (1000, "documents", Longformer(window=250)),
        (SHORT + 1, "documents", Longformer(window=128)),
        (SHORT, "documents", Full()),
        (4096, "code", SlidingWindow(512)),
        (16, "code", Full()),
        (LONG, "documents", SparseTransformerFixed(block=256, summary=16)),
        (LONG, "code", SparseTransformerFixed(block=256, summary=16)),
        (2**20, "documents", SparseTransformerFixed(block=1024, summary=64)),
        (1024, "long", SparseTransformerFixed(block=128, summary=8)),
        (8192, "dialogue", StreamingLLM(sinks=4, window=512)),
        (2**20, "dialogue", StreamingLLM(sinks=4, window=512)),
        (1, "dialogue", StreamingLLM(sinks=4, window=1)),
        (2**20, "exact", Full()),
        (511, "grouped", GroupedHeads(4, 2, window=64, adaptive_window=False)),
        (512, "grouped", GroupedHeads(8, 4, window=128, adaptive_window=False)),
        (2048, "grouped", GroupedHeads(8, 4, window=128, adaptive_window=False)),
        (2049, "grouped", GroupedHeads(12, 4, window=512, adaptive_window=False)),
    ],
)
def test_the_table(seq_len, scenario, pattern):
    assert recommended(seq_len, scenario=scenario) == pattern


def test_the_window_follows_the_size_of_the_model(monkeypatch):
    model = tiny("llama")
    windows = []
    for small, medium in [(10**9, 10**10), (1, 10**10), (1, 2)]:
        monkeypatch.setattr(recommend, "SMALL", small)
        monkeypatch.setattr(recommend, "MEDIUM", medium)
        windows.append(recommended(8192, model).window)
        assert recommended(800, model).window == min(windows[-1], 200)
    assert windows == [128, 256, 512]
    assert recommended(8192, model, "grouped").window == 512
    monkeypatch.undo()
    assert recommended(8192, model, "grouped").window == 256  # a small model's 128 is raised


@pytest.mark.parametrize(("seq_len", "local"), [(100, 3), (1000, 3), (5000, 3)])
def test_grouped_heads_are_scaled_to_the_model(seq_len, local):
    pattern = recommended(seq_len, tiny("llama"), "grouped")  # 4 query heads
    assert (pattern.local_heads, pattern.global_heads) == (local, 4 - local)


@pytest.mark.parametrize("heads", [1, 2, 3, 12, 40])
@pytest.mark.parametrize("seq_len", [100, 1000, 5000])
def test_both_groups_keep_a_head_where_there_are_two(heads, seq_len):
    model = tiny("llama")
    model.config.num_attention_heads = heads
    pattern = recommended(seq_len, model, "grouped")
    assert pattern.local_heads + pattern.global_heads == heads
    assert pattern.local_heads >= 1 and (pattern.global_heads >= 1 or heads == 1)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_what_is_recommended_runs(name, scenario):
    model = tiny(name)
    patch_model(model, recommended(40, model, scenario))
    with torch.no_grad():
        logits = model(torch.arange(40)[None] % 60).logits
    assert torch.isfinite(logits).all()


def test_mistakes_get_one_sentence():
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        recommended(0)
    with pytest.raises(ValueError, match=r"scenario must be 'documents' or 'dialogue' or .*, got 'chat'"):
        recommended(100, scenario="chat")
    with pytest.raises(ValueError, match=r"needs a transformers model whose config tells .*, got Linear"):
        recommended(1000, nn.Linear(2, 2))
