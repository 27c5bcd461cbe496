"""What stays dense in a model with an encoder: attention within the encoder, and from the decoder across to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .mask import SparseMask, make_mask
from .overlays import has_causal_part
from .stand_in import StandIn


class DenseMask(StandIn):
    """The host's own mask of a call that stays dense, told apart from masks that callers pass.

    allowed: bool [B, 1, Q, K], True = may attend; None where everything may be seen.
    """

    __slots__ = ("allowed",)

    def __init__(
        self, allowed: Tensor | None, shape: tuple[int, int, int, int], device: torch.device
    ) -> None:
        super().__init__(shape, device)
        self.allowed = allowed

    def to(self, *args: Any, **kwargs: Any) -> DenseMask:
        copy: DenseMask = super().to(*args, **kwargs)
        copy.allowed = None if self.allowed is None else self.allowed.to(copy.device)
        return copy

    def dense(self) -> Tensor:
        if self.allowed is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return self.allowed


def has_cross_attention(config: Any) -> bool:
    """True where a decoder may attend to an encoder: the calls of its own self-attention are not the only ones."""
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))


def sparse_or_dense_mask(**host: Any) -> SparseMask | DenseMask:
    """The mask function registered with transformers under every ``sparse_`` name.

    In a model with an encoder only the causal mask, the decoder's, is sparse; any other is what transformers makes for
    its SDPA attention. Arguments as `make_mask`.
    """
    given = host["attention_mask"]
    if isinstance(given, (SparseMask, DenseMask)):
        return given
    if has_cross_attention(host["config"]) and not has_causal_part(host["mask_function"]):
        shape = (host["batch_size"], 1, host["q_length"], host["kv_length"])
        return DenseMask(sdpa_mask(**host), shape, host["device"])
    return make_mask(**host)


def stays_dense(module: nn.Module, mask: Any, is_causal: bool | None) -> bool:
    """True for attention within an encoder and across to it.

    A model with an encoder made a `DenseMask` for these, or, as Whisper, none at all; then the module must say.

    Raises:
        ValueError: there is no mask, and nothing says whether the call is causal, or no text for it to be causal in.
    """
    config: Any = module.config
    if isinstance(mask, DenseMask):
        return True
    if mask is not None or not has_cross_attention(config):
        return False
    if not getattr(config, "vocab_size", None):
        raise ValueError(
            f"{type(module).__name__} belongs to a {config.model_type} model, which decodes no text; use its dense "
            f"attention"
        )
    causal = getattr(module, "is_causal", is_causal)
    if causal is None:
        raise ValueError(
            f"{type(module).__name__} attends without a mask and does not say whether it is causal, so it could be the "
            f"encoder's; use the dense attention for this model"
        )
    return not causal


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the unpatched model does with PyTorch's attention, bit for bit; soft-capped scores by hand.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D] and [B, H_kv, K, Dv].
        allowed: bool [B, 1, Q, K], True = may attend; None for all.
    Returns:
        [B, Q, H, Dv], contiguous, and with `with_weights` the weights [B, H, Q, K] without dropout.
    """
    weights = None
    if with_weights or softcap is not None:
        weights = _weights(query, key, allowed, scaling, softcap)
    if softcap is None:
        out = sdpa_attention_forward(
            module, query, key, value, allowed, dropout=dropout, scaling=scaling, is_causal=False
        )[0]
    else:
        assert weights is not None
        values = repeat_kv(value, query.shape[1] // value.shape[1])
        out = (nn.functional.dropout(weights, dropout) @ values).transpose(1, 2).contiguous()
    return out, weights if with_weights else None


def _weights(
    query: Tensor, key: Tensor, allowed: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return the softmax of the scores [B, H, Q, K], 0 where nothing may be seen."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ repeat_kv(key, query.shape[1] // key.shape[1]).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if allowed is None:
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).masked_fill(~allowed, 0.0).to(query.dtype)
