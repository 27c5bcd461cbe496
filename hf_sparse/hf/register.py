"""The names under which transformers finds the patterns: ``attn_implementation="sparse_<pattern>"``."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ..patterns import on_register
from .attention import sparse_attention
from .dense import sparse_or_dense_mask
from .stored_settings import CUSTOM, PREFIX

# Plans and masks are Python over a few numbers: torch.compile takes the model around them, tracing them gains nothing.
_attention = torch.compiler.disable(sparse_attention)
_mask = torch.compiler.disable(sparse_or_dense_mask)


def register_name(name: str) -> None:
    """Register the attention and the mask function together: without its mask, padding would be ignored silently."""
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def register_names() -> None:
    """Register a name for every pattern known so far and from now on, and the one for unions."""
    register_name(CUSTOM)
    on_register(lambda pattern: register_name(PREFIX + pattern))
