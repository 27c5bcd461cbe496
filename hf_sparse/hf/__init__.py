"""The glue to transformers: patch a model, describe it, save it and load it again."""

from .active import settings
from .adapters import load_adapter
from .describe import describe
from .extension import extend_positions, position_tables
from .generation import make_cache
from .held_mass import hold_mass
from .kept_mass import monitored
from .loading import read_sidecar
from .mask import SparseMask
from .patch import patch_model, patched, unpatch_model, unpatched
from .pattern_file import load_pattern, save_pattern
from .persist import load, save_adapter
from .register import register_names
from .shared_heads import hold_heads
from .stored_settings import SparseSettings, attention_name, settings_from_json, settings_to_json

register_names()

__all__ = [
    "SparseMask",
    "SparseSettings",
    "attention_name",
    "describe",
    "extend_positions",
    "hold_heads",
    "hold_mass",
    "load",
    "load_adapter",
    "load_pattern",
    "make_cache",
    "monitored",
    "patch_model",
    "patched",
    "position_tables",
    "read_sidecar",
    "save_adapter",
    "save_pattern",
    "settings",
    "settings_from_json",
    "settings_to_json",
    "unpatch_model",
    "unpatched",
]
