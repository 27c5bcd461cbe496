"""Analysis: how much attention mass each pattern keeps in every layer and head, and which pattern each head wants."""

from .result import Analysis
from .run import analyze
from .sizes import SIZES, Scaled, Size

__all__ = ["SIZES", "Analysis", "Scaled", "Size", "analyze"]
