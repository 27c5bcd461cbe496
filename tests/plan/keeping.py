"""What a cache must hold for the queries that come, found by asking the pattern's mask for every pair."""

import numpy as np
import torch

from hf_sparse.patterns.parts import Drawn, Residue
from hf_sparse.plan import Columns, Constraint

CAUSAL = Constraint()
LATER = 40  # queries after the call for which is kept


def seen_later(pattern, constraint, n, q_len, heads=1, layer=0, chosen=()) -> np.ndarray:
    """Return which of n positions the last q_len of them, or any of the next queries, may see; bool [n]."""
    query = torch.arange(n - q_len, n + LATER)[None, :, None]
    context = constraint.context(pattern, layer=layer, heads=heads, length=n, chosen=chosen)
    head, key = torch.arange(heads)[:, None, None], torch.arange(n)[None, None, :]
    seen = constraint.allowed(pattern, context, head, query, key).flatten(0, 1).any(0).numpy()
    seen[n - q_len :] = True
    return seen


def tail_start(pattern, constraint, n, q_len, seen, heads=1, layer=0, chosen=()) -> int:
    """Return where the tail without gaps begins: it has all that a stride relative to the query reaches."""
    start = int(np.flatnonzero(~seen)[-1]) + 1 if not seen.all() else 0
    context = constraint.context(pattern, layer=layer, heads=heads, length=n, chosen=chosen)
    first_query = np.array(n - q_len)
    for part in pattern.parts(context) or ():
        if isinstance(part.keys, Drawn):
            return 0
        if isinstance(part.keys, Residue):
            starts = [bound for bound in (part.start, *constraint.bounds()[0]) if bound is not None]
            start = min(start, max([0, *(int(bound.at(first_query)) for bound in starts)]))
    return start


def held(pattern, n, q_len, constraint=CAUSAL, lazy=0, **options) -> tuple[int, Columns | None]:
    """Return `first` and the columns of a cache that holds what is seen later, and `lazy` keys before the tail."""
    seen = seen_later(pattern, constraint, n, q_len, **options)
    first = max(0, tail_start(pattern, constraint, n, q_len, seen, **options) - lazy)
    columns = np.flatnonzero(seen[:first])
    return first, Columns(columns) if len(columns) else None
