"""The patterns: what each query may attend to. Every module of this folder is imported, so a new file is enough."""

import importlib
import pkgutil

from .algebra import PerHead, PerLayer, Union
from .base import Context, Pattern
from .plugin import load_plugin
from .probe import check_predicate
from .registry import (
    available_patterns,
    get_pattern,
    on_register,
    pattern_class,
    register_pattern,
    static_patterns,
)
from .written import pattern_from_json, pattern_to_json

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Context",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Union",
    "available_patterns",
    "check_predicate",
    "get_pattern",
    "load_plugin",
    "on_register",
    "pattern_class",
    "pattern_from_json",
    "pattern_to_json",
    "register_pattern",
    "static_patterns",
]
