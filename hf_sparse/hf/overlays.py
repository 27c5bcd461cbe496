"""What a transformers mask function says, read from its structure instead of from an n x n mask.

Transformers builds its masks from small functions (`transformers.masking_utils`): causal, bidirectional, a sliding
window, chunks, packed samples, and unions and intersections of these. Anything else is refused by name: it would be
wrong to drop it, and the patterns cannot honour what they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import masking_utils

from ..plan import Constraint


@dataclass(frozen=True)
class HostMask:
    """A mask function in our words.

    constraint: causality, native window and native chunks.
    labels: [B, L] int64, equal numbers are one packed sample; None where nothing is packed.
    """

    constraint: Constraint
    labels: Tensor | None = None


def read_mask_function(function: Callable[..., Any]) -> HostMask:
    """Return what `function` demands; raise ValueError where it holds a part that no pattern can be combined with."""
    return _add(HostMask(Constraint(causal=False)), function)


def has_causal_part(function: Callable[..., Any]) -> bool:
    """True where causality is among what `function` demands; a mask of an encoder, or of keys from it, has none."""
    if function is masking_utils.causal_mask_function:
        return True
    held = _closure(function)
    match _maker(function):
        case "and_masks" | "or_masks":
            return any(has_causal_part(member) for member in held["mask_functions"])
        case "remap_positions_for_packed_sequence":
            return has_causal_part(held["mask_function"])
    return False


def _add(seen: HostMask, function: Callable[..., Any]) -> HostMask:
    constraint = seen.constraint
    if function is masking_utils.causal_mask_function:
        return replace(seen, constraint=replace(constraint, causal=True))
    if function is masking_utils.bidirectional_mask_function:
        return seen
    held = _closure(function)
    match _maker(function):
        case "and_masks":
            for member in held["mask_functions"]:
                seen = _add(seen, member)
            return seen
        case "or_masks":
            members = [member for member in held["mask_functions"] if not _allows_nothing(member)]
            if len(members) == 1:
                return _add(seen, members[0])
        case "sliding_window_overlay":
            return replace(seen, constraint=_narrow(constraint, held["sliding_window"]))
        case "sliding_window_bidirectional_overlay":  # |q - k| <= w; ours counts the query itself
            return replace(seen, constraint=_narrow(constraint, held["sliding_window"] + 1))
        case "chunked_overlay":
            return replace(seen, constraint=replace(constraint, chunk=int(held["chunk_size"])))
        case "packed_sequence_mask_function":
            return replace(seen, labels=held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # segments restart positions as this does
            return _add(seen, held["mask_function"])
    raise ValueError(
        f"the model combines its mask with {_describe(function)}, which a sparse pattern cannot honour; use the dense "
        f"attention (hf_sparse.unpatch_model) for this input"
    )


def _narrow(constraint: Constraint, window: Any) -> Constraint:
    width = int(window)
    return replace(constraint, window=width if constraint.window is None else min(width, constraint.window))


def _maker(function: Callable[..., Any]) -> str:
    """Return the name of the transformers function that made this one, "" for a function made elsewhere."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return ""
    return getattr(function, "__qualname__", "").split(".<locals>")[0]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return (
        {}
        if code is None or not cells
        else dict(zip(code.co_freevars, (c.cell_contents for c in cells), strict=True))
    )


def _allows_nothing(function: Callable[..., Any]) -> bool:
    """True for a block overlay without a block, e.g. a prompt without images."""
    return _maker(function) == "blockwise_overlay" and not bool(
        (_closure(function)["block_sequence_ids"] >= 0).any()
    )


def _describe(function: Callable[..., Any]) -> str:
    if _maker(function) == "or_masks":
        return " or ".join(_describe(member) for member in _closure(function)["mask_functions"])
    name = _maker(function) or getattr(function, "__qualname__", repr(function))
    return f"{name} (bidirectional blocks such as images)" if name == "blockwise_overlay" else name
