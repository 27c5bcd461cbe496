"""Arguments that change what attention computes are honoured or refused, never dropped."""

import pytest
import torch
from tiny_models import ALL, logits, oracle_logits, tiny, tokens
from transformers.masking_utils import and_masks, causal_mask_function, create_causal_mask, or_masks

import hf_sparse
from hf_sparse import SlidingWindow
from hf_sparse.hf import SparseMask
from hf_sparse.hf.attention import sparse_attention
from hf_sparse.hf.mask import make_mask
from hf_sparse.hf.overlays import read_mask_function
from hf_sparse.plan import Constraint


def _call(model, **kwargs):
    """Call the attention function as a layer of the patched model would."""
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    return sparse_attention(module, query, key, key, **{"attention_mask": None, **kwargs})


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "sinks", "head_mask", "cache"])
def test_an_argument_that_is_part_of_the_scores_is_refused_by_name(name):
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=3)
    with pytest.raises(ValueError, match=f"LlamaAttention passes '{name}' to attention"):
        _call(model, **{name: torch.zeros(4)})
    _call(model, **{name: None})


def test_an_unknown_tensor_is_refused_and_known_harmless_ones_are_not():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=3)
    with pytest.raises(ValueError, match="passes the tensor 'relative_scores'"):
        model(tokens(1, 5), relative_scores=torch.zeros(5))
    ids = tokens(1, 5)
    out = model(ids, labels=ids, num_items_in_batch=torch.tensor(4), some_flag=True)
    assert torch.equal(out.logits, logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_four_dimensional_mask_is_refused(dtype):
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=3)
    with pytest.raises(ValueError, match="pass a 2-D padding mask"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5).to(dtype))


@pytest.mark.parametrize("mask_kwarg", [True, False, None])
def test_without_a_mask_causality_comes_from_the_call_then_the_module(mask_kwarg):
    model = hf_sparse.patch_model(tiny("llama"), "full")
    torch.manual_seed(0)
    out, _ = _call(model, is_causal=mask_kwarg)
    torch.manual_seed(0)
    causal, _ = _call(model, is_causal=True)
    assert torch.equal(out, causal) == (mask_kwarg is not False)


def test_a_decoder_declared_bidirectional_is_bidirectional():
    model, dense = tiny("llama"), tiny("llama", "eager")
    model.config.is_causal = dense.config.is_causal = False
    ids = tokens(2, 9)
    torch.testing.assert_close(
        logits(hf_sparse.patch_model(model, "full"), ids, use_cache=False),
        logits(dense, ids, use_cache=False),
    )
    changed = ids.clone()
    changed[:, -1] = 9
    hf_sparse.patch_model(model, "sliding_window", window=9)
    assert not torch.equal(logits(model, ids)[:, 0], logits(model, changed)[:, 0])


@pytest.mark.parametrize("name", ALL)
def test_output_attentions_are_the_weights_of_the_pattern(name):
    pattern = SlidingWindow(window=4)
    ids = tokens(2, 12)
    model = hf_sparse.patch_model(tiny(name), pattern)
    out = model(ids, output_attentions=True)
    assert len(out.attentions) == 2
    allowed = pattern.mask(12, causal=name not in ("bert", "roberta", "modernbert"))
    for weights in out.attentions:
        assert weights.shape == (2, 4, 12, 12) and not weights[:, :, ~allowed[0]].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
    assert torch.equal(out.logits, logits(model, ids))


def test_output_attentions_in_training_are_those_before_dropout():
    model = hf_sparse.patch_model(tiny("gpt2"), "sliding_window", window=4).train()
    for weights in model(tokens(2, 12), output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))


def test_output_attentions_of_long_inputs_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("hf_sparse.hf.weights.LONGEST_WEIGHTS", 10)
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=3)
    model(tokens(1, 10), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions=True needs the 11 x 11 weights"):
        model(tokens(1, 11), output_attentions=True)


def test_soft_capping_is_applied():
    ids = tokens(1, 20)
    model = tiny("gemma2")
    capped = logits(hf_sparse.patch_model(model, "sliding_window", window=5), ids)
    torch.testing.assert_close(capped, oracle_logits("gemma2", SlidingWindow(5), ids), atol=1e-5, rtol=1e-4)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (logits(model, ids) - capped).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_autocast_computes_in_the_autocast_dtype(name):
    model = hf_sparse.patch_model(tiny(name), "sliding_window", window=4)
    ids = tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, use_cache=False) if name not in ("bert", "roberta", "modernbert") else model(ids)
        out.logits.float().sum().backward()
    scale = logits(model, ids).abs().max()
    assert (out.logits.float() - logits(model, ids)).abs().max() < 0.1 * scale
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_mixed_dtypes_meet_in_the_widest():
    model = hf_sparse.patch_model(tiny("llama"), "full")
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    out, _ = sparse_attention(module, query, key, key, None)
    assert out.dtype == torch.float32 and out.shape == (1, 6, 4, 8) and out.is_contiguous()


def test_an_unknown_overlay_is_refused_by_name():
    def shifted_overlay(batch, head, query, key):
        return key < query + 2

    for function in (
        or_masks(causal_mask_function, shifted_overlay),
        and_masks(causal_mask_function, shifted_overlay),
    ):
        with pytest.raises(ValueError, match=r"combines its mask with .*shifted_overlay"):
            read_mask_function(function)
    model = hf_sparse.patch_model(tiny("llama"), "full")
    with pytest.raises(ValueError, match="shifted_overlay"):
        create_causal_mask(model.config, torch.zeros(1, 4, 8), None, None, or_mask_function=shifted_overlay)


def test_image_blocks_are_refused_and_their_absence_is_not():
    model = hf_sparse.patch_model(tiny("llama"), "full")
    blocks = torch.tensor([[-1, -1, -1, -1]])
    mask = create_causal_mask(model.config, torch.zeros(1, 4, 8), None, None, block_sequence_ids=blocks)
    assert mask.constraint == Constraint(causal=True)
    blocks[0, 1:3] = 0
    with pytest.raises(ValueError, match="blockwise_overlay"):
        create_causal_mask(model.config, torch.zeros(1, 4, 8), None, None, block_sequence_ids=blocks)


def test_the_mask_object_behaves_like_a_mask_tensor():
    model = hf_sparse.patch_model(tiny("llama"), "sliding_window", window=2)
    padding = torch.tensor([[0, 1, 1, 1]])
    mask = create_causal_mask(model.config, torch.zeros(1, 4, 8), padding, None)
    assert isinstance(mask, SparseMask)
    assert mask.ndim == mask.dim() == 4 and mask.shape == mask.size() == (1, 1, 4, 4) and mask.size(-1) == 4
    assert mask.dtype == torch.bool and mask.contiguous() is mask and mask.device == torch.device("cpu")
    moved = mask.to("meta", non_blocking=True)
    assert moved is not mask and moved.device.type == "meta" and mask.device.type == "cpu"
    assert mask.clone() is not mask and mask.clone().segments is mask.segments
    expected = torch.tensor(
        [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    ).bool()  # the host's, no pattern
    assert torch.equal(mask[0, 0], expected) and mask[:, 0, :, :].shape == (1, 4, 4)
    again = make_mask(
        batch_size=1,
        q_length=4,
        kv_length=4,
        q_offset=0,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=mask,
        config=model.config,
        device="cpu",
    )
    assert again is mask


def test_chunked_attention_of_the_model_is_kept():
    from transformers.masking_utils import chunked_causal_mask_function

    host = read_mask_function(chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)))
    assert host.constraint == Constraint(causal=True, chunk=4)
