"""The `torch` backend: pieces computed by PyTorch operators and merged by log-sum-exp, forward and backward."""

from .function import torch_attention
from .walk import operator

__all__ = ["operator", "torch_attention"]
