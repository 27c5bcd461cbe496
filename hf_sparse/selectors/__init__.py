"""The content-based patterns: which keys a query reads is decided by looking at queries and keys.

Every module of this folder is imported, so a new file is enough.
"""

import importlib
import pkgutil

from .base import Selector
from .block_index import BlockIndex
from .buckets import BucketSelection
from .index import Index
from .selection import AnySelection, Selection
from .split import Division, divided, refuse_looking_ahead

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AnySelection",
    "BlockIndex",
    "BucketSelection",
    "Division",
    "Index",
    "Selection",
    "Selector",
    "divided",
    "refuse_looking_ahead",
]
