"""Padding and packed samples change nothing for the tokens that are really there."""

import pytest
import torch
from tiny_models import ALL, DECODERS, logits, tiny, tokens
from transformers.masking_utils import create_causal_mask

import hf_sparse
from hf_sparse import Longformer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.plan import Constraint

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
PATTERNS = [
    SlidingWindow(window=4),
    StreamingLLM(sinks=2, window=3),
    Longformer(window=3, global_tokens=(0, 5)) | Strided(stride=4, anchor="absolute"),
]
LENGTHS = (29, 13, 22)


def _rows():
    return [tokens(1, length, seed=length) for length in LENGTHS]


def _padded(rows, side):
    width = max(LENGTHS)
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def _positions(name, mask):
    """RoBERTa counts its own positions from the pad tokens, and from 2."""
    return {} if name == "roberta" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_equals_each_row_alone(name, pattern, side):
    model = hf_sparse.patch_model(tiny(name), pattern)
    rows = _rows()
    ids, mask = _padded(rows, side)
    batch = logits(model, ids, attention_mask=mask, **_positions(name, mask))
    for i, row in enumerate(rows):
        torch.testing.assert_close(batch[i, mask[i] == 1], logits(model, row)[0], **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_without_position_ids_equals_the_models_own_attention(name):
    ids, mask = _padded(_rows(), "left")
    sparse = logits(hf_sparse.patch_model(tiny(name), "full"), ids, attention_mask=mask)
    eager = logits(tiny(name, "eager"), ids, attention_mask=mask)
    torch.testing.assert_close(sparse[mask == 1], eager[mask == 1], **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("name", "cache"), [(n, {}) for n in ALL] + [(n, {"use_cache": False}) for n in DECODERS]
)
def test_packed_samples_equal_separate_rows(name, pattern, cache):
    model = hf_sparse.patch_model(tiny(name), pattern)
    rows = _rows()
    first = 2 if name == "roberta" else 0
    positions = torch.cat([torch.arange(first, first + row.shape[1]) for row in rows])[None]
    packed = logits(model, torch.cat(rows, dim=1), position_ids=positions, **cache)
    alone = [logits(model, row, **cache) for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_rows_of_a_batch_and_an_all_ones_mask(name):
    model = hf_sparse.patch_model(tiny(name), "streaming_llm", sinks=1, window=4)
    a, b = tokens(1, 10, seed=1), tokens(1, 14, seed=2)
    ids = torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)])
    positions = torch.stack(
        [torch.cat([torch.arange(10), torch.arange(14)]), torch.cat([torch.arange(14), torch.arange(10)])]
    )
    packed = logits(model, ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    alone_a, alone_b = logits(model, a)[0], logits(model, b)[0]
    torch.testing.assert_close(packed[0], torch.cat([alone_a, alone_b]), **CLOSE)
    torch.testing.assert_close(packed[1], torch.cat([alone_b, alone_a]), **CLOSE)


def test_samples_given_by_cumulative_lengths():
    model = hf_sparse.patch_model(tiny("llama"), "streaming_llm", sinks=1, window=4)
    rows = _rows()
    starts = torch.tensor([0, 29, 42, 64], dtype=torch.int32)
    packed = logits(model, torch.cat(rows, dim=1), cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    torch.testing.assert_close(
        packed, torch.cat([logits(model, row) for row in rows], 1), atol=1e-5, rtol=1e-4
    )


def test_position_ids_of_a_cached_step_divide_nothing():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=6)
    ids = tokens(1, 12)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :8])
        rest = model(
            ids[:, 8:], past_key_values=first.past_key_values, position_ids=torch.arange(8, 12)[None]
        )
    torch.testing.assert_close(rest.logits, whole[:, 8:], **CLOSE)


def test_position_ids_that_restart_within_a_cached_step_divide_nothing():
    ids, positions = tokens(1, 12), torch.tensor([[8, 9, 0, 1]])
    out = []
    for model in (hf_sparse.patch_model(tiny("llama"), "full"), tiny("llama", "eager")):
        with torch.no_grad():
            cache = model(ids[:, :8]).past_key_values
            out.append(model(ids[:, 8:], past_key_values=cache, position_ids=positions).logits)
    torch.testing.assert_close(*out, **CLOSE)


def test_samples_are_looked_for_once_per_forward(monkeypatch):
    from hf_sparse.hf import mask as module

    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    calls = []
    found = module._sample_labels
    monkeypatch.setattr(module, "_sample_labels", lambda *args: calls.append(1) or found(*args))
    logits(model, tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert len(calls) == 1


def test_samples_that_transformers_found_are_in_the_mask():
    model = hf_sparse.patch_model(tiny("llama"), "full")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    mask = create_causal_mask(model.config, torch.zeros(1, 5, 8), None, None, position_ids=positions)
    assert [entry.slots for entry in mask.segments.entries] == [slice(0, 3), slice(3, 5)]
    assert mask.constraint == Constraint(causal=True)


def test_a_row_of_padding_only_gives_finite_logits_and_gradients():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    out = model(tokens(2, 9), attention_mask=mask).logits
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_mask_shorter_than_the_cache_is_refused():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=4)
    ids = tokens(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        with pytest.raises(
            ValueError, match=r"attention_mask is \[1, 1\] but the call has 1 rows of 9 tokens"
        ):
            model(ids[:, 8:], past_key_values=cache, attention_mask=torch.tensor([[0]]))
