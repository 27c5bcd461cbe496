"""What represents a block of keys, and how a query scores it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Representation(NamedTuple):
    """summarise and score as `Selector` has them, the score [R, H, J, n] for each query head."""

    summarise: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def _mean(key: Tensor, query: Tensor) -> Tensor:
    return key.mean(3)


def _first(key: Tensor, query: Tensor) -> Tensor:
    return key[:, :, :, 0]


def _weighted(key: Tensor, query: Tensor) -> Tensor:
    """The mean with the weights that the block's last query gives its keys, over the query heads of the key head."""
    own = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)  # [R, H_kv, n, G, D]
    weights = (own @ key.mT * key.shape[-1] ** -0.5).softmax(-1).mean(3, keepdim=True)
    return (weights @ key).squeeze(3)


def _min_max(key: Tensor, query: Tensor) -> Tensor:
    return torch.cat((key.amin(3), key.amax(3)), -1)


def _signs(key: Tensor, query: Tensor) -> Tensor:
    """The signs of the mean key, as numbers 1 and -1."""
    return torch.where(key.mean(3) < 0, -1.0, 1.0).to(key.dtype)


def products(query: Tensor, blocks: Tensor) -> Tensor:
    """Return query [R, H, J, D] times blocks [R, H_kv, n, D], [R, H, J, n]."""
    own = query.unflatten(1, (blocks.shape[1], -1))
    return (own @ blocks[:, :, None].mT).flatten(1, 2)


def _bounds(query: Tensor, blocks: Tensor) -> Tensor:
    """The most that any key between least and greatest could score (Quest, arXiv:2406.10774)."""
    return products(torch.cat((query.clamp(max=0), query.clamp(min=0)), -1), blocks)


def _agreement(query: Tensor, blocks: Tensor) -> Tensor:
    """How many signs agree, less how many do not."""
    return products(torch.where(query < 0, -1.0, 1.0).to(query.dtype), blocks)


REPRESENTATIONS = {
    "mean": Representation(_mean, products),
    "first": Representation(_first, products),
    "weighted": Representation(_weighted, products),
    "minmax": Representation(_min_max, _bounds),
    "hash": Representation(_signs, _agreement),
}


def over_groups(scores: Tensor, kv_heads: int) -> Tensor:
    """Return the mean of scores [R, H, J, n] over the query heads of each key head, [R, H_kv, J, n]."""
    return scores.unflatten(1, (kv_heads, -1)).mean(2)
