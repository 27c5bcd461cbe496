"""The `flex` backend: FlexAttention with block masks built from plans."""

from .attention import flex_attention, unsupported

__all__ = ["flex_attention", "unsupported"]
