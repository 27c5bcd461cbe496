"""The `cuda_flash` backend: windows, sinks and strides through PyTorch's own FlashAttention operators."""

from .attention import flash_attention, unsupported

__all__ = ["flash_attention", "unsupported"]
