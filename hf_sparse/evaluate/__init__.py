"""Evaluation: perplexity on long documents, dense and sparse on the same tokens."""

from .bootstrap import GapClosed, Interval, difference, gap_closed
from .figures import adapter_gaps
from .html_report import Section
from .perplexity import perplexity
from .pictures import plot_loss_by_position, plot_perplexity_by_context, plot_quality_against_speed
from .report import save_results
from .results import Result, Run
from .table import table
from .tokens import ScoredDocument, ScoredText, tokenize

__all__ = [
    "GapClosed",
    "Interval",
    "Result",
    "Run",
    "ScoredDocument",
    "ScoredText",
    "Section",
    "adapter_gaps",
    "difference",
    "gap_closed",
    "perplexity",
    "plot_loss_by_position",
    "plot_perplexity_by_context",
    "plot_quality_against_speed",
    "save_results",
    "table",
    "tokenize",
]
