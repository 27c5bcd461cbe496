"""Checkpoints of safetensors and JSON that are whole or not there, and the Trainer that writes and reads them."""

from .manifest import MANIFEST, find_flaw
from .resume import checkpoint_to_resume, last_complete_checkpoint
from .trainer import CheckpointTrainer

__all__ = [
    "MANIFEST",
    "CheckpointTrainer",
    "checkpoint_to_resume",
    "find_flaw",
    "last_complete_checkpoint",
]
