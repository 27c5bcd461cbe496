"""The `torch` backend: pieces computed by PyTorch operators and merged by log-sum-exp, forward and backward."""

from .function import torch_attention
from .view import View
from .walk import operator

__all__ = ["View", "operator", "torch_attention"]
