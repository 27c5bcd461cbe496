"""How an evaluation was made, in three sentences."""

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
    """Return what was read and scored, what the runs share, and where the intervals come from."""
    config = result.config
    how = _READ[config["mode"]].format(**config)
    measure = (
        f"every token's loss is taken with {config['mask_share']:.0%} of the tokens masked at once"
        if config["measure"] == "pseudo-log-likelihood"
        else "every token is predicted once from those before it"
    )
    few = len(result.text.documents) < LEAST_DOCUMENTS
    drawn = f"blocks of {BLOCK_TOKENS:,} tokens" if few else "whole documents"
    return [
        f"Each document is read by itself, {_PREFIX[config['prefix']]}, {how}; {measure}, and perplexity is exp of the "
        "summed loss over all tokens.",
        "Dense attention and every pattern score the same tokens with the same weights, and what a pattern computed is "
        "counted in the attention calls as they run.",
        f"Differences are paired, token by token; their 95 % intervals come from {RESAMPLES:,} bootstrap draws of "
        f"{drawn}.",
    ]
