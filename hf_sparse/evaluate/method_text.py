"""How an evaluation was made, in a few sentences."""

from __future__ import annotations

from .bootstrap import BLOCK_TOKENS, LEAST_DOCUMENTS, RESAMPLES
from .results import Result

_READ = {
    "full": "in one pass, cut to {max_length:,} tokens",
    "strided": "in windows of {max_length:,} tokens, {stride:,} apart, each scoring what the one before did not",
    "rolling": "in disjoint windows of {max_length:,} tokens",
}
_PREFIX = {
    "bos": "after the BOS token",
    "eos": "after the EOS token",
    "none": "from its second token on",
    "special tokens": "between its special tokens",
}


def method_sentences(result: Result) -> list[str]:
    """Return what was read and scored, what the runs share, and, where runs are compared, where intervals come from."""
    config = result.config
    how = _READ[config["mode"]].format(**config)
    measure = (
        f"every token's loss is taken with {config['mask_share']:.0%} of the tokens masked at once"
        if config["measure"] == "pseudo-log-likelihood"
        else "every token is predicted once from those before it"
    )
    few = len(result.text.documents) < LEAST_DOCUMENTS
    drawn = f"blocks of {BLOCK_TOKENS:,} tokens" if few else "whole documents"
    compared = any(run is not result.dense_of(run) for run in result.runs)
    who = (
        "Dense attention and every pattern" if any(not run.sparse for run in result.runs) else "All patterns"
    )
    told = [
        f"Each document is read by itself, {_PREFIX[config['prefix']]}, {how}; {measure}, and perplexity is exp of the "
        "summed loss over all tokens.",
        f"{who} score the same tokens, and what a pattern computed is counted in the attention "
        "calls as they run.",
    ]
    if compared:
        told.append(
            f"Differences are paired, token by token; their 95 % intervals come from {RESAMPLES:,} bootstrap draws of "
            f"{drawn}."
        )
    return told
