"""What is trained beside LoRA under a base of a smaller type: every step counts, and the model computes as before."""

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
)

import hf_sparse
from hf_sparse.train import AdaptationArguments, add_lora

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 33)[None]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_step_moves_every_weight_that_is_trained(dtype, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    adapted = add_lora(model, AdaptationArguments(lora_r=2, train_embeddings=True))
    got = adapted(input_ids=IDS)
    assert torch.equal(got.logits, want) and got.logits.dtype == dtype
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.dtype == dtype for p in adapted.parameters() if not p.requires_grad)
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is tokens.weight) == tied
    before = {name: p.detach().clone() for name, p in trained.items()}
    got.logits.float().logsumexp(-1).sum().backward()
    torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.0).step()
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert all("lora_A" in name for name in still)  # B is 0 at first


def test_a_float32_base_and_norms_without_weights_are_left_alone():
    model = AutoModelForMaskedLM.from_config(ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2))
    for dtype, hooks in ((torch.float32, False), (torch.bfloat16, True)):
        adapted = add_lora(model.to(dtype), AdaptationArguments(lora_r=2))
        copies = [m for name, m in adapted.named_modules() if name.endswith("modules_to_save.default")]
        assert {bool(m._forward_hooks) for m in copies if list(m.parameters())} == {hooks}
        adapted.unload()


def test_global_projections_are_trained_in_float32():
    model = BertForMaskedLM(BertConfig(**SMALL)).to(torch.bfloat16)
    hf_sparse.patch_model(model, "longformer", window=4, global_projections=True)
    adapted = add_lora(model, AdaptationArguments(lora_r=2))
    adapted(input_ids=IDS).logits.float().sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if "query_global" in name}
    found = [grad for grad in grads.values() if grad is not None]
    assert found and all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in found)
