"""The patterns: what each query may attend to. Every module of this folder is imported, so a new file is enough."""

import importlib
import pkgutil

from .algebra import Union
from .base import Context, Pattern
from .registry import available_patterns, get_pattern, on_register, pattern_class, register_pattern

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Context",
    "Pattern",
    "Union",
    "available_patterns",
    "get_pattern",
    "on_register",
    "pattern_class",
    "register_pattern",
]
