"""hf_sparse: sparse attention patterns for pretrained Hugging Face models."""

from .backends import recording
from .hf import describe, load, patch_model, patched, save_adapter, unpatch_model
from .patterns import Pattern, available_patterns, get_pattern, register_pattern
from .patterns.full import Full
from .patterns.longformer import Longformer
from .patterns.sliding_window import SlidingWindow
from .patterns.streaming_llm import StreamingLLM
from .patterns.strided import Strided

__version__ = "0.1.0"

__all__ = [
    "Full",
    "Longformer",
    "Pattern",
    "SlidingWindow",
    "StreamingLLM",
    "Strided",
    "available_patterns",
    "describe",
    "get_pattern",
    "load",
    "patch_model",
    "patched",
    "recording",
    "register_pattern",
    "save_adapter",
    "unpatch_model",
]
