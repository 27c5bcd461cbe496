"""The peers: each computes causal attention over a window of `window` keys, or dense attention, on [B, H, N, D]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse import SlidingWindow
from hf_sparse.backends import Call, attend

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """An attention function for one window and length.

    backward: it can be differentiated on this device.
    exact: it sees exactly the window; local-attention sees one key more.
    """

    name: str
    make: Callable[[int, int, torch.device], Attention]
    backward: bool = True
    exact: bool = True


def _ours(window: int, n: int, device: torch.device) -> Attention:
    call = Call(SlidingWindow(window=window))
    return lambda q, k, v: attend(q, k, v, call)


def _dense(window: int, n: int, device: torch.device) -> Attention:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)


def _band_mask(window: int, n: int, device: torch.device) -> Attention:
    """What transformers does for a sliding-window model under SDPA: a full n x n mask."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    mask = (distance >= 0) & (distance < window)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _local_attention(window: int, n: int, device: torch.device) -> Attention:
    from local_attention import LocalAttention

    # Its window is a block; exact_windowsize cuts the keys of the block before to a distance of at most `window`.
    layer = LocalAttention(
        window_size=window, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    return lambda q, k, v: layer(q, k, v)


def _flex(window: int, n: int, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window)

    block_mask = create_block_mask(allowed, None, None, n, n, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def peers(device: torch.device) -> list[Peer]:
    """Return the peers in the order of the table; the first is dense, the second ours."""
    return [
        Peer("dense SDPA, causal", _dense, exact=False),
        Peer("hf_sparse", _ours),
        Peer("SDPA with a band mask", _band_mask),
        Peer("local-attention", _local_attention, exact=False),
        Peer("FlexAttention, compiled", _flex, backward=device.type == "cuda"),
    ]


def dense_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Name the backend that scaled_dot_product_attention takes for causal attention on these tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            scaled_dot_product_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], is_causal=True)
            return backend.name.lower()
    return "math"
