"""Evaluation: perplexity on long documents, dense and sparse on the same tokens."""

from .bootstrap import GapClosed, Interval, difference, gap_closed
from .perplexity import perplexity
from .plot import plot_loss_by_position
from .report import adapter_gaps, save_results, table
from .results import Result, Run
from .tokens import ScoredDocument, ScoredText, tokenize

__all__ = [
    "GapClosed",
    "Interval",
    "Result",
    "Run",
    "ScoredDocument",
    "ScoredText",
    "adapter_gaps",
    "difference",
    "gap_closed",
    "perplexity",
    "plot_loss_by_position",
    "save_results",
    "table",
    "tokenize",
]
