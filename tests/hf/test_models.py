"""Every supported architecture computes what the written mask says."""

import pytest
import torch
from tiny_models import ALL, DECODERS, logits, oracle_logits, tiny, tokens

import hf_sparse
from hf_sparse import Full, Longformer, SlidingWindow, StreamingLLM, Strided

N = 37
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SPARSE = [
    SlidingWindow(window=4),
    Longformer(window=3, global_tokens=(0, 6)),
    StreamingLLM(sinks=2, window=4),
    Strided(stride=5),
    Strided(stride=5, anchor="absolute") | SlidingWindow(window=2),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(window=N), Longformer(window=N + 3)], ids=str)
def test_pattern_that_covers_everything_gives_the_unpatched_logits(name, pattern):
    ids = tokens(2, N)
    dense = logits(tiny(name, "eager"), ids)
    torch.testing.assert_close(logits(hf_sparse.patch_model(tiny(name), pattern), ids), dense, **CLOSE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pattern", SPARSE, ids=str)
def test_pattern_equals_eager_attention_under_the_written_mask(name, pattern):
    ids = tokens(2, N)
    sparse = logits(hf_sparse.patch_model(tiny(name), pattern), ids)
    torch.testing.assert_close(sparse, oracle_logits(name, pattern, ids), **CLOSE)
    assert (sparse - logits(tiny(name, "eager"), ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_unpatching_restores_logits_and_config(name):
    ids = tokens(2, N)
    model = tiny(name)
    dense, config, implementation = (
        logits(model, ids),
        model.config.to_dict(),
        model.config._attn_implementation,
    )
    hf_sparse.patch_model(model, "sliding_window", window=3)
    assert not torch.equal(logits(model, ids), dense)
    hf_sparse.unpatch_model(model)
    assert torch.equal(logits(model, ids), dense)
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pattern", SPARSE, ids=str)
def test_no_token_sees_the_future(name, pattern):
    model = hf_sparse.patch_model(tiny(name), pattern)
    ids = tokens(1, N)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 7) % 60 + 4
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("name", ALL)
def test_only_the_layers_asked_for_are_sparse(name):
    ids = tokens(1, N)
    model = hf_sparse.patch_model(tiny(name), "sliding_window", window=2, layers=[1])
    partly = logits(model, ids)
    every = logits(hf_sparse.patch_model(model, "sliding_window", window=2), ids)
    dense = logits(tiny(name, "eager"), ids)
    assert (partly - every).abs().max() > 1e-3 and (partly - dense).abs().max() > 1e-3
    both = logits(hf_sparse.patch_model(model, "sliding_window", window=2, layers=(0, 1)), ids)
    assert torch.equal(both, every)


@pytest.mark.parametrize("name", ALL)
def test_float64_and_bfloat16(name):
    ids = tokens(2, N)
    pattern = SlidingWindow(window=4)
    double = logits(hf_sparse.patch_model(tiny(name).double(), pattern), ids)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), oracle_logits(name, pattern, ids), **CLOSE)
    half = logits(hf_sparse.patch_model(tiny(name).to(torch.bfloat16), pattern), ids)
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


def test_a_compiled_model_gives_the_same_logits():
    model = hf_sparse.patch_model(tiny("llama"), StreamingLLM(sinks=2, window=4))
    ids, mask = tokens(2, N), torch.ones(2, N, dtype=torch.long)
    mask[1, :6] = 0
    expected = logits(model, ids, attention_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(
        logits(compiled, ids, attention_mask=mask)[mask == 1], expected[mask == 1], **CLOSE
    )
