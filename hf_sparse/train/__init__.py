"""Adapting a patched model: LoRA through the transformers Trainer, on documents that are never joined."""

from .adapt import prepare, run
from .arguments import ConfigParser
from .checkpoints import last_complete_checkpoint
from .config import AdaptationArguments, SparseTrainingArguments
from .data import make_samples
from .export import merge
from .lora import add_lora

__all__ = [
    "AdaptationArguments",
    "ConfigParser",
    "SparseTrainingArguments",
    "add_lora",
    "last_complete_checkpoint",
    "make_samples",
    "merge",
    "prepare",
    "run",
]
