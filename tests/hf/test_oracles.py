"""Patched models against the independent implementations in transformers, with the same weights."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tokens
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.bigbird import BigBird

EXACT = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
ENCODER = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1}
DECODER = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 1}


def _build(name, **options):
    """Return a model whose weights are large enough that what a token may see changes its output much."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _padded(lengths):
    ids, mask = (
        torch.full((len(lengths), max(lengths)), 1),
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = tokens(1, length, seed=row)[0], 1
    return ids, mask


def _assert_same(ours, theirs, inputs, mask):
    """Compare hidden states or logits of the real tokens, and every gradient of a scalar loss of them."""
    outputs, gradients = [], []
    for model, extra in ((ours, inputs), (theirs, inputs)):
        model.zero_grad(set_to_none=True)
        out = model(**extra)[0][mask == 1]
        (out * torch.linspace(-1, 1, out.shape[-1])).square().mean().backward()
        outputs.append(out)
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0], outputs[1], **EXACT)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], **EXACT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("lengths", [(32, 24, 17), (45, 3, 38), (61,)], ids=str)
@pytest.mark.parametrize("attention_window", [4, 8])
@pytest.mark.parametrize("some_global", [True, False])
def test_longformer_with_its_projections(lengths, attention_window, some_global):
    theirs = _build("LongformerModel", **ENCODER, attention_window=[attention_window] * 2)
    ours = transformers.RobertaModel(transformers.RobertaConfig(**ENCODER)).eval()
    hf_sparse.patch_model(
        ours, "longformer", window=attention_window // 2 + 1, global_tokens=(), global_projections=True
    )
    ours.load_state_dict(theirs.state_dict())  # the same names, to the last
    ids, mask = _padded(lengths)
    chosen = torch.zeros_like(mask)
    if some_global:
        chosen[0, [0, 13, 14]] = 1
        chosen[-1, 1] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": chosen}
    _assert_same(ours, theirs, inputs, mask)


def test_longformer_with_its_projections_depends_on_them():
    theirs = _build("LongformerModel", **ENCODER, attention_window=[4] * 2)
    ours = transformers.RobertaModel(transformers.RobertaConfig(**ENCODER)).eval()
    hf_sparse.patch_model(ours, "longformer", window=3, global_tokens=())
    assert not ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    ids, _ = _padded((24,))
    inputs = {"input_ids": ids, "global_attention_mask": torch.isin(torch.arange(24), 5)[None].long()}
    with torch.no_grad():
        assert (ours(**inputs)[0] - theirs(**inputs)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("window", [1, 7, 40])
def test_native_sliding_window(name, window):
    theirs = _build(name, **DECODER, sliding_window=window, attn_implementation="eager")
    ours = _build(name, **DECODER, sliding_window=None)
    if name == "Qwen2ForCausalLM":
        theirs = _build(
            name, **DECODER, sliding_window=window, use_sliding_window=True, max_window_layers=0,
            attn_implementation="eager",
        )  # fmt: skip
        ours = _build(name, **DECODER, use_sliding_window=False)
    hf_sparse.patch_model(ours, "sliding_window", window=window)
    ids, mask = _padded((37, 20))
    _assert_same(ours, theirs, {"input_ids": ids, "attention_mask": mask}, mask)


def test_native_sliding_window_of_gemma2():
    options = {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    kinds = ["sliding_attention", "full_attention"]
    theirs = _build(
        "Gemma2ForCausalLM", **options, sliding_window=9, layer_types=kinds, attn_implementation="eager"
    )
    ours = _build("Gemma2ForCausalLM", **options, layer_types=["full_attention"] * 2)
    hf_sparse.patch_model(ours, "sliding_window", window=9, layers=[0])
    ids, mask = _padded((37, 20))
    _assert_same(ours, theirs, {"input_ids": ids, "attention_mask": mask}, mask)


@pytest.mark.parametrize("no_rope_layers", [[1, 1], [1, 0]], ids=["chunked", "one-nope-layer"])
def test_llama4_chunks(no_rope_layers):
    """Its layers without rotary embedding are never chunked: there the pattern leaves dense attention."""
    options = {
        **DECODER,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 1,
        "moe_layers": [],
        "no_rope_layers": no_rope_layers,
    }
    theirs = _build("Llama4ForCausalLM", **options, attention_chunk_size=8, attn_implementation="eager")
    assert theirs.config.layer_types.count("chunked_attention") == sum(no_rope_layers)
    ours = _build("Llama4ForCausalLM", **options, layer_types=["full_attention"] * 2)
    layers = [i for i, rope in enumerate(no_rope_layers) if rope]
    hf_sparse.patch_model(ours, "block_local", block=8, neighbours=0, layers=layers)
    ids, mask = _padded((37, 37))
    _assert_same(ours, theirs, {"input_ids": ids}, mask)


# (layer, random blocks) -> [H, blocks - 2, random blocks], as transformers drew them
_DRAWN: dict[tuple[int, int], np.ndarray] = {}


@dataclass(frozen=True)
class _Captured:
    """The draw of transformers' BigBird: for all query blocks but the first and the last."""

    layer: int
    random_blocks: int

    def __call__(self, head: Tensor, block: Tensor) -> Tensor:
        table = torch.nn.functional.pad(
            torch.from_numpy(_DRAWN[self.layer, self.random_blocks]).long(), (0, 0, 1, 1), value=-1
        )
        known = block < table.shape[1]
        drawn = table[head][:, block.clamp(max=table.shape[1] - 1)]
        return torch.where(known[None, :, None], drawn, -1)


@pytest.mark.parametrize("random_blocks", [1, 2, 3])
def test_bigbird_in_training_with_its_own_random_draw(random_blocks, monkeypatch):
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    block = 4
    theirs = _build(
        "BigBirdModel", **ENCODER, block_size=block, num_random_blocks=random_blocks, hidden_act="gelu",
        attention_type="block_sparse",
    ).train()  # fmt: skip
    ours = transformers.BertModel(transformers.BertConfig(**ENCODER, layer_norm_eps=1e-12)).train()
    renamed = {k: v for k, v in theirs.state_dict().items() if not k.startswith("pooler")}
    renamed |= {f"pooler.dense.{k}": v for k, v in theirs.pooler.state_dict().items()}
    ours.load_state_dict(renamed)

    draw = BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head

    def captured(self, *args, **kwargs):
        drawn = draw(self, *args, **kwargs)
        _DRAWN[self.seed, random_blocks] = np.stack(drawn)
        return drawn

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", captured)
    monkeypatch.setattr(BigBird, "draw", lambda self, context: _Captured(context.layer, random_blocks))
    ids, mask = _padded((25 * block - 12,) * 2)
    with torch.no_grad():
        theirs(input_ids=ids)
    assert not np.array_equal(_DRAWN[0, random_blocks], _DRAWN[1, random_blocks])
    hf_sparse.patch_model(ours, "bigbird", block=block, random_blocks=random_blocks)
    for model in (ours, theirs):
        model.pooler = None
    _assert_same(ours, theirs, {"input_ids": ids}, mask)
