"""Context extension: a model that reads more tokens than it was trained for."""

from .extend import extend_positions, restore_extension
from .learned import position_tables
from .record import METHODS, Extension, extension_of, readable_tokens

__all__ = [
    "METHODS",
    "Extension",
    "extend_positions",
    "extension_of",
    "position_tables",
    "readable_tokens",
    "restore_extension",
]
