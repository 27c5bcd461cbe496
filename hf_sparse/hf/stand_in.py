"""What transformers hands from a mask function to an attention function in place of a mask tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StandIn:
    """Goes through transformers untouched; on the way it is asked for the attributes of a [B, 1, Q, K] bool tensor.

    A plain class on purpose: FSDP rebuilds dataclasses.
    """

    __slots__ = ("device", "shape")
    ndim = 4
    dtype = torch.bool

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.shape = torch.Size(shape)
        self.device = torch.device(device)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return self.to()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy for the device among the arguments; the others mean nothing here."""
        device = next(
            (a for a in (*args, kwargs.get("device")) if isinstance(a, (str, int, torch.device))), self.device
        )
        copy = object.__new__(type(self))
        for name in (*StandIn.__slots__, *self.__slots__):
            setattr(copy, name, getattr(self, name))
        copy.device = torch.device(device)
        return copy

    def dense(self) -> Tensor:
        """Return what the tensor would hold, [B, 1, Q, K] bool, True = may attend; quadratic."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]
