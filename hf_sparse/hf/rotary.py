"""Turning rotated queries and keys to other positions (rotary embeddings, Su et al., 2021, arXiv:2104.09864).

Rotations add up, R(a) R(b) = R(a + b), so a key can be seen at another place without its unrotated form. That a model's
queries and keys do turn like this is not concluded from its name but tried, in `hf_sparse.hf.positions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cosines and sines, each [B or 1, 1, L, R/2]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one or more attention layers rotate the first R channels of each head; the other channels stay.

    frequencies: [R/2] fp32, radians per token, on the device of the layer.
    interleaved: whether channels 2i and 2i + 1 turn together, as in Cohere; otherwise i and i + R/2, as in Llama.
    """

    frequencies: Tensor
    interleaved: bool

    def angles(self, shift: Tensor, like: Tensor, position: Tensor | None = None) -> Angles:
        """Return the angles that turn what stands at any position by `shift` positions.

        Args:
            shift: int64 [B or 1, L], tokens; negative ones turn back.
            like: a tensor on the device, and of the precision, that is to be turned.
            position: int64 [B or 1, L], where it stands. With it the result is what the model itself computes at
                ``position + shift``, rounding of its fp32 angles included: at 100,000 tokens up to 0.004 radians.
        Returns:
            cosines and sines, fp32, or fp64 where `like` is.
        """
        device = like.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        frequencies = self.frequencies.to(device)
        if position is None:
            angle = shift.to(device, exact)[..., None] * frequencies.to(exact)
        else:
            before, after = (p.to(device, torch.float32)[..., None] for p in (position, position + shift))
            angle = (after * frequencies).to(exact) - (before * frequencies).to(exact)
        wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
        return angle.cos().to(wanted)[:, None], angle.sin().to(wanted)[:, None]

    def turn(self, x: Tensor, angles: Angles) -> Tensor:
        """Return queries or keys [B, H, L, D], turned by `angles`; computed in fp32 at least, returned in x's dtype."""
        cos, sin = angles
        size = 2 * cos.shape[-1]
        head, rest = x[..., :size], x[..., size:]
        if self.interleaved:
            a, b = head[..., 0::2], head[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = head.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(x.dtype)
