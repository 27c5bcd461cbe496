"""Tiny random models of more architectures, for the ways in which models rotate queries and keys."""

from __future__ import annotations

import torch
import transformers
from tiny_models import _ROPE

import hf_sparse

_MHA = {k: v for k, v in _ROPE.items() if k != "num_key_value_heads"}
_SHORT, _LONG = {"short_factor": [1.0] * 4}, {"long_factor": [2.0] * 4}


def _scaled(rope_type, **options):
    return {**_ROPE, "rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **options}}


ROTATED = {
    "linear": ("LlamaForCausalLM", _scaled("linear", factor=4.0)),
    "yarn": ("LlamaForCausalLM", _scaled("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama3": (
        "LlamaForCausalLM",
        _scaled(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "stablelm": ("StableLmForCausalLM", {**_ROPE, "partial_rotary_factor": 0.5}),
    "phi": ("PhiForCausalLM", {**_ROPE, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereForCausalLM", _ROPE),
    "glm": ("GlmForCausalLM", {**_ROPE, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "ernie": ("Ernie4_5ForCausalLM", {**_ROPE, "head_dim": 8}),
    "smollm3": ("SmolLM3ForCausalLM", {**_ROPE, "no_rope_layers": [1, 0], "use_sliding_window": False}),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            **_ROPE,
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **_ROPE,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "no_rope_layers": [1, 0],
            "moe_layers": [],
        },
    ),
}
REFUSED = {
    "dynamic": ("LlamaForCausalLM", _scaled("dynamic", factor=4.0)),
    "longrope": (
        "Phi3ForCausalLM",
        {
            **_scaled("longrope", **_SHORT, **_LONG, original_max_position_embeddings=64),
            "sliding_window": None,
        },
    ),
    "mrope": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **_scaled("default", mrope_section=[2, 1, 1]),
            },
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **_MHA,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 16,
            "n_routed_experts": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {**_ROPE, "head_dim": 8}),  # normalizes what it has rotated
}


def build(class_name: str, options: dict) -> torch.nn.Module:
    """Return a fresh random model, patched with dense attention, in evaluation mode."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms too: with equal weights they hide what they do to a rotation
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return hf_sparse.patch_model(model, "full", backend="reference")
