"""GSA on the device, of the Unified Cache Manager (github.com/ModelEngine-Group/unified-cache-management).

Every key is known by the signs of its products with random directions, one bit for each: eight to a byte, so that 128
bits take a sixteenth of a half-precision key. A query head's score of a block is minus the least number of bits in
which one of the block's keys differs from the query; the query heads of a key head agree by the mean.

The directions are drawn from the standard normal distribution, the same for all heads and layers, and depend on `seed`
and the head size alone. (The publication makes them orthogonal, or learns them.) The lowest layers read everything;
`reuse` lets layers share what the lowest of them selects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..patterns.checks import LARGEST_SEED, check_count
from ..patterns.registry import register_pattern
from .block_selector import BlockSelector
from .representations import over_groups

_UNPACKED = 2**24  # bits of keys unpacked at a time


@register_pattern("gsa_on_device")
@dataclass(frozen=True)
class GsaOnDevice(BlockSelector):
    """The blocks with the keys that differ from the queries in the fewest bits."""

    keep: int | float | tuple[int | float, ...] = (
        0.3  # a share of the blocks, or a number; one, or one per layer
    )
    dense_layers: int = 2  # layers at the bottom that read everything
    bits: int | None = None  # per key; None is the head size
    seed: int = 0  # of the random directions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None:
            check_count("bits", self.bits, 1)
        check_count("seed", self.seed, 0, LARGEST_SEED)

    @property
    def scores_per_block(self) -> int:
        return self.block

    def summarise(self, key: Tensor, query: Tensor) -> Tensor:
        return _packed(self._is_negative(key))

    def score(self, query: Tensor, blocks: Tensor) -> Tensor:
        rows, kv_heads, _, size, _ = blocks.shape
        asked = 1 - 2 * self._is_negative(query[:, :, :, -1]).to(query.dtype)
        bits = asked.shape[3]
        own = asked.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [R, H_kv, G * J, bits]
        found = []
        for part in blocks.split(max(1, _UNPACKED // (rows * kv_heads * size * bits)), 2):
            keys = 1 - 2 * _unpacked(part, bits).to(query.dtype)
            agreed = own @ keys.flatten(2, 3).mT  # bits that are alike, less those that differ
            found.append(agreed.unflatten(3, (-1, size)).amax(-1))
        most = torch.cat(found, 3).unflatten(2, (-1, query.shape[2])).flatten(1, 2)  # [R, H, J, n]
        return over_groups((most - bits) / 2, kv_heads)

    def _is_negative(self, x: Tensor) -> Tensor:
        """Return the bits of x [..., D], bool [..., bits]."""
        size = x.shape[-1]
        return x @ _directions(size, self.bits or size, self.seed, x.dtype, x.device) < 0


@lru_cache(maxsize=16)
def _directions(size: int, bits: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random directions [size, bits], drawn where every machine draws the same."""
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, bits, generator=made, dtype=torch.float32, device="cpu").to(device, dtype)


def _packed(bits: Tensor) -> Tensor:
    """Return bool [..., bits] as uint8 [..., ceil(bits / 8)]."""
    eights = pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the first `bits` of uint8 [..., bytes], as uint8 [..., bits]."""
    eights = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (eights & 1).flatten(-2)[..., :bits]
