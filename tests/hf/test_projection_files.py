"""Global projections in checkpoints and adapters: they come back as they were trained, or are refused."""

import pytest
import torch
import transformers
from tiny_models import logits, tiny, tokens

import hf_sparse
from hf_sparse import Longformer
from hf_sparse.hf import settings

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

NAMES = ["query_global", "key_global", "value_global"]
APART = Longformer(window=3, global_tokens=(0, 5), global_projections=True)


def _train(model, ids):
    """Two steps on the projections alone."""
    parameters = [
        p for k, p in model.named_parameters() if any(name in k for name in NAMES) and p.requires_grad
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_model_comes_back_with_them(shards, tmp_path):
    ids = tokens(1, 20)
    model = _train(hf_sparse.patch_model(tiny("roberta"), APART), ids)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    loaded = hf_sparse.load(tmp_path)
    assert settings(loaded).pattern == APART
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_checkpoint_without_them_or_a_name_alone_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = hf_sparse.patch_model(tiny("bert"), APART)
    model.save_pretrained(tmp_path)
    named = transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="sparse_longformer")
    with pytest.raises(ValueError, match=r"BertSelfAttention has no query_global, .* hf_sparse\.load"):
        logits(named, tokens(1, 9))
    weights = load_file(tmp_path / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "layer.1.attention.self.key_global" not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 2 weights that its pattern adds, such as .*key_global\.bias"
    ):
        hf_sparse.load(tmp_path)


@pytest.fixture
def lora(tmp_path):
    """Return a function that puts LoRA on a patched model read from a folder, with further arguments."""
    from peft import LoraConfig, get_peft_model

    tiny("bert").save_pretrained(tmp_path / "base")

    def make(base=tmp_path / "base", **arguments):
        model = transformers.BertForMaskedLM.from_pretrained(base)
        hf_sparse.patch_model(model, APART)
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], **arguments))

    return make


def test_trained_with_an_adapter_they_are_saved_in_it(lora, tmp_path):
    ids = tokens(1, 20)
    model = _train(lora(modules_to_save=NAMES).train(), ids).eval()
    hf_sparse.save_adapter(model, tmp_path / "adapter")
    loaded = hf_sparse.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-6, rtol=1e-5)
    assert (logits(loaded, ids) - logits(lora().eval(), ids)).abs().max() > 1e-3


def test_an_adapter_that_would_lose_them_is_refused(lora, tmp_path):
    ids = tokens(1, 20)
    model = lora().eval()
    hf_sparse.save_adapter(model, tmp_path / "copies")  # nothing to lose
    assert torch.equal(logits(hf_sparse.load(tmp_path / "copies"), ids), logits(model, ids))
    with torch.no_grad():
        attention = model.base_model.model.bert.encoder.layer[0].attention.self
        attention.query_global.weight.add_(0.1)
    with pytest.raises(
        ValueError, match=r"query_global was trained but is .* modules_to_save=\['query_global'"
    ):
        hf_sparse.save_adapter(model, tmp_path / "adapter")


def test_a_base_saved_with_them_gives_them_to_its_adapters(lora, tmp_path):
    from peft import LoraConfig, get_peft_model

    ids = tokens(1, 20)
    _train(hf_sparse.patch_model(tiny("bert"), APART), ids).save_pretrained(tmp_path / "trained")
    model = get_peft_model(
        hf_sparse.load(tmp_path / "trained"), LoraConfig(r=2, target_modules=["query"])
    ).eval()
    hf_sparse.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(hf_sparse.load(tmp_path / "adapter"), ids), logits(model, ids))


def test_an_adapter_already_there_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("bert"), LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="the layer 'query' of BertSelfAttention has an adapter already"):
        hf_sparse.patch_model(model, APART)
