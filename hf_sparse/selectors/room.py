"""Memory that grows with a text: room for coming entries is made for many at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def appended(held: Tensor | None, count: int, new: Tensor) -> Tensor:
    """Return a tensor [R, H, room, ...] whose first entries are the `count` of `held` and then those of `new`.

    It is `held` itself where there is room and it may be written to: what was made in inference mode may not outside of
    it. The first time no more is made than is needed.
    """
    total = count + new.shape[2]
    frozen = held is not None and held.is_inference() and not torch.is_inference_mode_enabled()
    if held is None or frozen or total > held.shape[2]:
        room = new.new_empty((*new.shape[:2], total if not count else total + total // 2, *new.shape[3:]))
        if held is not None:
            room[:, :, :count] = held[:, :, :count]
        held = room
    held[:, :, count:total] = new
    return held
