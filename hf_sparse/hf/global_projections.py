"""Separate projections for global queries, as in Longformer (Beltagy et al., 2020, section 3.1, arXiv:2004.05150).

Under ``longformer(global_projections=True)`` each attention module has `query_global`, `key_global` and `value_global`
beside its own three. The rows of global queries are dense attention of ``query_global(x)`` over ``key_global(x)`` and
``value_global(x)`` of all tokens of their sequence; every other row is as without.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..backends import Call
from ..patterns import Context, Pattern, Union
from ..patterns.algebra import PerLayer, Spelled
from ..patterns.parts import Listed
from ..plan import Segment, Segments
from .hooks import add_hook, mask_owner, remove_hooks
from .stored_settings import SparseSettings, pattern_of_layer, query_heads

NAMES = ("query_global", "key_global", "value_global")
_OWN = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))

_running = threading.local()


def _stack() -> list[tuple[nn.Module, Tensor]]:
    return _running.__dict__.setdefault("calls", [])


@torch.compiler.disable
def hold_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: keep its input [B, N, C] for `replace_global_rows`."""
    _stack().append((module, args[0] if args else kwargs["hidden_states"]))


@torch.compiler.disable
def drop_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: let go of what `hold_hidden_states` kept."""
    if _stack() and _stack()[-1][0] is module:
        _stack().pop()


_HOOKS = (hold_hidden_states, drop_hidden_states)


def projecting(pattern: Pattern, layer: int, heads: int) -> Pattern | None:
    """Return the part of a layer's pattern whose global queries have projections of their own; None where none has.

    Raises:
        ValueError: it speaks of some of the `heads` query heads only.
    """
    if getattr(pattern, "global_projections", False) or not projects(pattern):
        return pattern if projects(pattern) else None
    if isinstance(pattern, PerLayer):
        return projecting(pattern.patterns[layer], layer, heads)
    if isinstance(pattern, Spelled):
        return projecting(pattern.spelled(Context(False, layer, heads)), layer, heads)
    if isinstance(pattern, Union):
        return next(found for m in pattern.members if (found := projecting(m, layer, heads)) is not None)
    raise ValueError(
        f"global_projections=True gives projections to all heads of a layer, got it for some of them in {pattern}; use "
        f"that longformer for the whole layer"
    )


def projects(pattern: Pattern) -> bool:
    """True where `pattern`, or one it is made of, has projections of its own for global queries."""
    return getattr(pattern, "global_projections", False) or any(map(projects, pattern.members))


def set_projections(model: PreTrainedModel, settings: SparseSettings, causal: bool) -> None:
    """Give the attention modules the projections that the settings ask for, copies of their own unless they have some.

    Raises:
        ValueError: a model whose global queries cannot be projected apart, with the reason.
    """
    modules = attention_modules(model)
    if projects(settings.pattern):
        _refuse_projections(model, modules, causal)
    heads = query_heads(model.config.get_text_config())
    for module, own in modules:
        layer = getattr(module, "layer_idx", None)
        pattern = pattern_of_layer(settings, layer, type(module).__name__)
        wanted = projecting(pattern, layer or 0, heads) is not None
        if wanted and not has_projections(module):
            for new, old in zip(NAMES, own, strict=True):
                module.add_module(new, copy.deepcopy(_plain_linear(module, old)).requires_grad_(True))
            _add_hooks(module)
        elif has_projections(module) and not wanted:
            _remove(module)


def _refuse_projections(model: PreTrainedModel, modules: list[Any], causal: bool) -> None:
    name = type(model).__name__
    if causal:
        raise ValueError(
            f"global_projections=True is for bidirectional models, in which global queries see everything; {name} is "
            f"causal, leave it out"
        )
    if not modules:
        raise ValueError(
            f"global_projections=True needs attention with separate query, key and value layers, which {name} has not; "
            f"leave it out"
        )


def remove_projections(model: nn.Module) -> None:
    """Take the projections away, also from a copy of the model they were added to."""
    for module in model.modules():
        if has_projections(module):
            _remove(module)


def projections(model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module]]]:
    """Return the attention modules that have projections, with these by name."""
    return [
        (module, {name: getattr(module, name) for name in NAMES})
        for module in model.modules()
        if has_projections(module)
    ]


def put_projections(model: nn.Module, kept: list[tuple[nn.Module, dict[str, nn.Module]]]) -> None:
    """Make `kept` (see `projections`) the only ones that the model has."""
    remove_projections(model)
    for module, members in kept:
        for name, member in members.items():
            module.add_module(name, member)
        _add_hooks(module)


def has_projections(module: nn.Module) -> bool:
    return any(hook is hold_hidden_states for hook in module._forward_pre_hooks.values())


def attention_modules(model: PreTrainedModel) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Return the modules of the text model with three linear layers for query, key and value, and their names."""
    return [
        (module, names)
        for module in mask_owner(model).modules()
        for names in _OWN
        if all(plain_layer(getattr(module, name, None)) is not None for name in names)
    ]


def own_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of an attention module's own query, key and value layers."""
    return next(names for names in _OWN if hasattr(module, names[0]))


def plain_layer(module: Any) -> nn.Linear | None:
    """Return the linear layer that `module` is, or that an adapter is wrapped around; None for anything else."""
    if not isinstance(module, nn.Linear) and hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    return module if isinstance(module, nn.Linear) else None


def _plain_linear(module: nn.Module, name: str) -> nn.Module:
    member = getattr(module, name)
    if not isinstance(member, nn.Linear):
        raise ValueError(
            f"the layer {name!r} of {type(module).__name__} has an adapter already, so its copy for global_projections "
            f"is not defined; patch the model before adding adapters"
        )
    return member


def _add_hooks(module: nn.Module) -> None:
    add_hook(module, hold_hidden_states)
    add_hook(module, drop_hidden_states, after=True)


def _remove(module: nn.Module) -> None:
    for name in NAMES:
        delattr(module, name)
    remove_hooks(module, _HOOKS)


def replace_global_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    call: Call,
    segments: Segments,
    trial: bool,
) -> Tensor:
    """Return `out` [B, Q, H, Dv] with the rows of global queries computed from their own projections.

    Args:
        query, key, value: [B, H or H_kv, N, D], what the module projects for every token.
        trial: this is the patch's trial forward: check that these are what the module's own linear layers give.
    Raises:
        ValueError: a module without projections, or (in the trial) one that does more than project.
    """
    member = projecting(call.pattern, call.layer, query.shape[1])
    if member is None:
        return out
    if not has_projections(module):
        raise ValueError(
            f"{type(module).__name__} has no {', '.join(NAMES)}, which {member} needs; load the model with "
            f"hf_sparse.load, or prepare it with hf_sparse.patch_model"
        )
    hidden = next(hidden for held, hidden in reversed(_stack()) if held is module)
    if trial:
        _check_plain(module, hidden, (query, key, value), call)
    groups = [
        (s, places) for s in segments.entries if (places := _global_places(member, s, call, query)).numel()
    ]
    if not groups:
        return out
    new_key, new_value = (
        getattr(module, name)(hidden).unflatten(-1, (key.shape[1], -1)).transpose(1, 2) for name in NAMES[1:]
    )
    batch: list[Tensor] = []
    slots: list[Tensor] = []
    rows: list[Tensor] = []
    for segment, places in groups:
        at = segment.rows
        asked = module.get_submodule(NAMES[0])(hidden[at, places])  # [rows, globals, C]
        asked = asked.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
        given = scaled_dot_product_attention(
            asked,
            new_key[at, :, segment.slots],
            new_value[at, :, segment.slots],
            dropout_p=call.dropout,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        count = at.stop - at.start
        rows.append(given.transpose(1, 2).flatten(0, 1))  # [rows * globals, H, Dv]
        slots.append(places.repeat(count))
        batch.append(torch.arange(at.start, at.stop, device=places.device).repeat_interleave(len(places)))
    return out.index_put((torch.cat(batch), torch.cat(slots)), torch.cat(rows).to(out.dtype))


def _global_places(member: Pattern, segment: Segment, call: Call, query: Tensor) -> Tensor:
    """Return the key slots of the segment's global queries, int64 [g]."""
    context = call.constraint.context(
        member,
        layer=call.layer,
        heads=query.shape[1],
        length=segment.first + segment.length,
        chosen=segment.chosen,
    )
    listed = {
        position
        for part in member.parts(context) or ()
        if isinstance(part.queries, Listed)
        for position in part.queries.positions
    }
    places = sorted(p - segment.first for p in listed if 0 <= p - segment.first < segment.length)
    index = torch.tensor(places, dtype=torch.long)
    slots = segment.slots
    return (index + slots.start if isinstance(slots, slice) else slots[index]).to(query.device)


def _check_plain(module: nn.Module, hidden: Tensor, given: tuple[Tensor, ...], call: Call) -> None:
    names = own_layers(module)
    plain = call.softcap is None and call.constraint.window is None and call.constraint.chunk is None
    for name, tensor in zip(names, given, strict=True):
        expected = getattr(module, name)(hidden).unflatten(-1, (tensor.shape[1], -1)).transpose(1, 2)
        plain = (
            plain
            and expected.shape == tensor.shape
            and torch.allclose(expected, tensor, rtol=1e-3, atol=1e-5)
        )
    if not plain:
        raise ValueError(
            f"global_projections=True needs attention that takes query, key and value straight from its linear layers; "
            f"{type(module).__name__} rotates, scales, normalises or bounds them"
        )
