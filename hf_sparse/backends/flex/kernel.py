"""The compiled FlexAttention call, and what is done so that it is compiled rarely and never left silently."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .orders import BLOCK

# Kernels that one process may compile. Beyond it the call fails: FlexAttention's own way out would be an unfused n x n.
MOST_KERNELS = 128
LARGEST_HEAD = 256  # of CUDA kernels: beyond it PyTorch has no tiles that are known to fit into shared memory
SMALLEST_HEAD = 16  # head sizes below it are padded: the matrix units take no fewer columns


def padded_length(tokens: int) -> int:
    """Return the length to which `tokens` rows or keys are padded: BLOCK times a power of two, or 1.5 times that.

    Lengths between two such steps share one kernel. Padded rows read no blocks, so they cost their copy only.
    """
    blocks = max(1, -(-tokens // BLOCK))
    power = 1 << (blocks - 1).bit_length()
    return BLOCK * (3 * power // 4 if power >= 4 and blocks <= 3 * power // 4 else power)


def run_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scale: float,
    softcap: float | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return output [B, H, Q, Dv] and, where it is wanted, the log-sum-exp [B, H, Q] in float32, -inf for empty rows.

    Args:
        query: [B, H, Q, D]; key: [B, H_kv, K, D]; value: [B, H_kv, K, Dv]; Q and K padded.
        block_mask: a `BlockMask` for Q and K.
    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: more than MOST_KERNELS kernels would be compiled.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale}
    if softcap is not None:
        options["score_mod"] = _softcap(softcap)
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    if want_lse:
        options["return_aux"] = AuxRequest(lse=True)
    with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
        result = _compiled()(query, key, value, **options)
    return (result[0], result[1].lse) if want_lse else (result, None)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: at the limit of recompilations an error, not the unfused path.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@lru_cache(maxsize=16)
def _softcap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
