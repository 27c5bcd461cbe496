import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import SlidingWindow
from hf_sparse.evaluate import speed
from hf_sparse.evaluate.speed import measure_prefill
from hf_sparse.hf import patch_model, settings


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config)


def test_each_configuration_is_timed_and_the_model_left_unpatched(model, monkeypatch):
    ran = []
    forward = speed._forward

    def watched(model, ids):
        ran.append((settings(model).pattern if settings(model) else None, ids.shape[1]))
        return forward(model, ids)

    monkeypatch.setattr(speed, "_forward", watched)
    patch_model(model, "strided")
    found = measure_prefill(model, (None, SlidingWindow(16)), (32, 64), repeats=2)
    assert [(p.pattern, p.length) for p in found] == [
        (pattern, length) for length in (32, 64) for pattern in (None, "sliding_window(window=16)")
    ]
    assert all(p.seconds > 0 and p.tokens_per_second == p.length / p.seconds for p in found)
    assert ran.count((None, 64)) == ran.count((SlidingWindow(16), 64)) >= 3
    assert not any(pattern not in (None, SlidingWindow(16)) for pattern, _ in ran)
    assert settings(model) is None and not model.training


def test_workspace_sees_the_memory_a_forward_pass_holds(model, monkeypatch):
    size = 64 * 2**20

    def hungry(model, ids):
        torch.ones(size // 4)
        return 0.1

    monkeypatch.setattr(speed, "_forward", hungry)
    (found,) = measure_prefill(model, (None,), (8,), repeats=1)
    if found.workspace is None:
        pytest.skip("this system has no resettable memory mark")
    assert 0.8 * size <= found.workspace <= 1.5 * size


@pytest.mark.parametrize(
    ("lengths", "repeats", "message"),
    [
        ((2000,), 1, "a prompt of 2000 tokens does not fit the model's 1024 positions"),
        ((0,), 1, "a prompt of 0 tokens"),
        ((8,), 0, "repeats must be >= 1, got 0"),
    ],
)
def test_impossible_measurements_are_refused(model, lengths, repeats, message):
    with pytest.raises(ValueError, match=message):
        measure_prefill(model, (None,), lengths, repeats=repeats)
