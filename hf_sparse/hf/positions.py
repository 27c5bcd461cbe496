"""How a model knows where its tokens are, found out by running it: the same tokens at other position ids."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .attention import observed_inputs
from .hooks import mask_owner
from .rotary import Rotation
from .routing import untouched

_TOKENS = 6
_FIRST, *_LATER = (1, 2, 1001)  # positions of the first token in each run
# The frequencies of these depend on the length of the text: a key keeps those of the length that it was computed at.
_CHANGING = ("dynamic", "longrope")


class _Run(NamedTuple):
    inputs: list[tuple[int, Tensor, Tensor]]  # layer, query and key of each attention call
    lookups: list[tuple[Tensor, int]]  # indices, and rows of the table, of each look-up of an embedding


def position_kind(model: PreTrainedModel) -> str:
    """Return "rotary", "learned" (a table of position embeddings, as in GPT-2 and OPT) or "none".

    Raises:
        ValueError: as `find_rotations`, but for models with learned positions.
    """
    if not _takes_positions(model):
        raise _cannot(model, "its forward takes no position_ids")
    if learned_positions(model) is not None:
        return "learned"
    return "rotary" if any(rotation is not None for rotation in find_rotations(model).values()) else "none"


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return for how many positions, 0 included, a model has a table of embeddings; None where it adds none."""
    if _takes_positions(model):
        return _rows(_run(model, _FIRST))
    try:
        return _rows(_run(model, None), first=0)  # BART counts by itself
    except (TypeError, ValueError, AttributeError):  # a decoder that does not run without its encoder
        return None


def find_rotations(model: PreTrainedModel) -> dict[int, Rotation | None]:
    """Return how each attention layer of a patched model rotates queries and keys; None where a layer does not.

    Layers that rotate alike on one device share one object. The model is left as it was.

    Raises:
        ValueError: what a layer computes at other positions is not what it computes at the first ones, turned.
    """
    if not _takes_positions(model):
        raise _cannot(model, "its forward takes no position_ids")
    frequencies = list(_frequencies(model))
    first = _run(model, _FIRST)
    if not first.inputs:
        raise _cannot(model, "it runs no pattern, so its queries and keys are not seen, patch it first")
    if _rows(first) is not None:
        raise _cannot(model, "it adds learned positions to its embeddings")
    later = [_run(model, start).inputs for start in _LATER]
    shared: dict[Any, Rotation] = {}
    found: dict[int, Rotation | None] = {}
    for (layer, *before), *moved in zip(first.inputs, *later, strict=True):
        after = [[query, key] for _, query, key in moved]
        if all(torch.equal(a, b) for pair in after for a, b in zip(before, pair, strict=True)):
            found[layer] = None
            continue
        for number, interleaved in ((n, i) for n in range(len(frequencies)) for i in (False, True)):
            own = frequencies[number].to(before[0].device)
            rotation = shared.setdefault((number, interleaved, own.device), Rotation(own, interleaved))
            if all(_turns(rotation, before, pair, start) for pair, start in zip(after, _LATER, strict=True)):
                found[layer] = rotation
                break
        else:
            raise _cannot(
                model, f"queries or keys of its layer {layer} are not rotated by their position alone"
            )
    return found


def _turns(rotation: Rotation, before: list[Tensor], after: list[Tensor], start: int) -> bool:
    """True where query and key of the first run and of the one from `start` on differ by the rotation."""
    position = torch.arange(_FIRST, _FIRST + _TOKENS)[None]
    shift = torch.full_like(position, start - _FIRST)
    # Twice, the model rounds cosines, sines, products and their sum to its precision; 1e-4 is for angles, in fp32.
    tolerance = 1e-4 + 8 * torch.finfo(before[0].dtype).eps
    for one, other in zip(before, after, strict=True):
        if 2 * len(rotation.frequencies) > one.shape[-1]:
            return False
        error = (rotation.turn(one, rotation.angles(shift, one, position)) - other).abs()
        if bool((error > tolerance * one.norm(dim=-1, keepdim=True)).any()):
            return False
    return True


def _frequencies(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the frequencies of the rotary modules; raise ValueError where they do not settle the angles."""
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise _cannot(model, "it caches latents (MLA), of whose keys only the last channels are rotated")
    modules = list(mask_owner(model).modules())
    sections = "mrope_section" in str(getattr(config, "rope_parameters", None))
    if sections or any(hasattr(module, "mrope_section") for module in modules):
        raise _cannot(model, "its tokens have three positions each (mrope)")
    for module in modules:
        kinds = getattr(module, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _CHANGING:
                raise _cannot(model, f"its rotary frequencies change with the length of the text ({kind})")
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                yield buffer.detach().float().clone()


def _rows(run: _Run, first: int = _FIRST) -> int | None:
    """Return how many rows, from that of position 0 on, the table has that was looked up at the positions."""
    for indices, rows in run.lookups:
        # Token ids went down: only positions go up by 1. OPT puts position 0 in row 2.
        offset = int(indices.flatten()[0]) - first
        if indices.numel() == _TOKENS and offset >= 0 and bool((indices.flatten().diff() == 1).all()):
            return rows - offset
    return None


class _Lookups(TorchFunctionMode):
    """Notes every look-up in a table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            self.seen.append((args[0], len(args[1])))
        return func(*args, **(kwargs or {}))


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(mask_owner(model).forward).parameters


def _run(model: PreTrainedModel, start: int | None) -> _Run:
    """Run the same tokens at positions start, start + 1, ..., None for the model's own, without attention.

    Attention returns zeros: through it a layer would tell the next ones of the positions, or of its rounding errors.
    """
    owner = mask_owner(model)
    if owner.device.type == "meta":
        raise _cannot(model, "it has no weights yet to try it with")
    places = torch.arange(_TOKENS, device=owner.device)[None]
    extra: dict[str, Any] = {}
    if "use_cache" in inspect.signature(owner.forward).parameters:
        extra["use_cache"] = False
    if start is not None:
        extra["position_ids"] = places + start
    with untouched(model), observed_inputs() as calls, _Lookups() as lookups:
        owner(input_ids=places.flip(-1), **extra)
    return _Run([(_layer(module), query, key) for module, query, key in calls], lookups.seen)


def _layer(module: Any) -> int:
    return int(getattr(module, "layer_idx", -1))


def _cannot(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot see far keys at other places: {reason}; choose a pattern that leaves them "
        f"where they are, as streaming_llm does with positions='absolute'"
    )
