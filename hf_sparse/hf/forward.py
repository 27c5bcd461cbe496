"""What happens around every forward pass of a patched model: its arguments are checked, its cache and masks prepared.

A hook before the model that makes the masks notes what one call brings along (global tokens, the keys of its cache,
places of its tokens) for `make_mask`, which runs within that model's forward and puts it into the `SparseMask`. Nothing
after that depends on where or when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from .cache import SparseCache
from .call_arguments import GLOBALS
from .far import new_tokens
from .global_cache import remember
from .global_tokens import global_flags, refuse_globals
from .hooks import add_hook, argument, mask_owner, with_argument
from .mask import Forward, SparseMask, running_forwards
from .placing import place_ids, positions_of
from .stored_settings import PREFIX, SparseSettings, settings_for

_MADE_BY = (
    "_hf_sparse_settings"  # attribute of transformers' own caches: under which settings they were filled
)


@torch.compiler.disable
def begin_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: check the call, and note what its attention has to know."""
    cache = _self_attention(argument(module, args, kwargs, "past_key_values"))
    config: Any = module.config
    implementation = str(getattr(config, "_attn_implementation", ""))
    if not implementation.startswith(PREFIX):  # set_attn_implementation has put another one in our place
        _refuse_left_over(kwargs.get(GLOBALS), cache, implementation)
        return None
    settings = settings_for(config)
    _settle_interrupted(module, cache)
    new = argument(module, args, kwargs, "input_ids")
    new = argument(module, args, kwargs, "inputs_embeds") if new is None else new
    if new is None:  # the model will say so itself
        return None
    batch, q_len = new.shape[:2]
    given = argument(module, args, kwargs, "attention_mask")
    mask = (
        next(iter(given.values()), None) if isinstance(given, dict) else given
    )  # kinds of layers agree on the tokens
    seen = 0 if cache is None else int(cache.get_seq_length())
    _check_cache(cache, settings, config, batch, seen, q_len)
    position_ids = argument(module, args, kwargs, "position_ids")
    _check_mask(mask, cache, batch, seen, q_len)
    if isinstance(cache, SparseCache) and seen:
        _check_seen(mask, position_ids, cache, seen, q_len)
    _check_table(module, position_ids, seen + q_len)
    if not settings.pattern.takes_globals:
        refuse_globals(module, args, kwargs)
    flags = global_flags(settings.pattern, module, args, kwargs) if settings.pattern.takes_globals else None
    kwargs = {name: value for name, value in kwargs.items() if name != GLOBALS}

    call = None
    if isinstance(cache, SparseCache):
        call = cache.begin(batch, q_len, _real(mask, seen, q_len), None if flags is None else flags[:, seen:])
    forward = Forward(module, flags, call, positions_of(module), cache)
    running_forwards().append(forward)
    if forward.positions is not None and forward.positions.placed:
        args, kwargs = _place(forward, args, kwargs, mask, seen, new)
    if isinstance(given, SparseMask):  # made before the forward: static caches, models around the text model
        args, kwargs = with_argument(module, args, kwargs, "attention_mask", given.of(forward))
    elif isinstance(given, dict):
        made = {kind: m.of(forward) if isinstance(m, SparseMask) else m for kind, m in given.items()}
        args, kwargs = with_argument(module, args, kwargs, "attention_mask", made)
    return args, kwargs


@torch.compiler.disable
def end_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: leave with the cache what it has to remember."""
    stack = running_forwards()
    if not stack or stack[-1].module is not module:
        return
    forward = stack.pop()
    cache = forward.cache
    if isinstance(cache, SparseCache):
        cache.end(finished=output is not None)
    if output is None:
        return
    if cache is None:
        members = (
            output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
        )
        cache = _self_attention(next((member for member in members if isinstance(member, Cache)), None))
    if isinstance(cache, Cache):
        if forward.flags is not None:
            remember(cache, forward.flags)
        if not isinstance(cache, SparseCache):
            config: Any = module.config
            vars(cache)[_MADE_BY] = settings_for(config)


FORWARD_HOOKS = (begin_forward, end_forward)


def add_forward_hooks(model: PreTrainedModel) -> None:
    owner = mask_owner(model)
    add_hook(owner, begin_forward)
    add_hook(owner, end_forward, after=True)


def _settle_interrupted(module: nn.Module, cache: Any) -> None:
    """End a forward pass that Ctrl-C has stopped: PyTorch then skips the hook after it."""
    stack = running_forwards()
    stack[:] = [forward for forward in stack if forward.module is not module]
    if isinstance(cache, SparseCache):
        cache.end()


def _self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _refuse_left_over(flags: Any, cache: Any, implementation: str) -> None:
    if flags is not None:
        raise ValueError(
            f"{GLOBALS} was given but {implementation!r} attention is set, which has no use for it; call "
            f"hf_sparse.patch_model again, or leave it out"
        )
    if isinstance(cache, SparseCache):
        raise ValueError(
            f"this cache was made for {cache.settings.pattern} but {implementation!r} attention is set, which may need "
            f"keys that are gone; use transformers' DynamicCache"
        )


def _check_cache(
    cache: Any, settings: SparseSettings, config: Any, batch: int, seen: int, q_len: int
) -> None:
    if isinstance(cache, SparseCache):
        cache.check(settings, config, batch)
        return
    if cache is None:
        return
    if settings.pattern.content_based:
        raise ValueError(
            f"{settings.pattern} selects by summaries of earlier tokens, which a {type(cache).__name__} does not keep; "
            f"use hf_sparse.make_cache(model), or leave past_key_values out"
        )
    before = getattr(cache, _MADE_BY, None)
    if seen and before is not None and before != settings:
        raise ValueError(
            f"the cache was filled under {before.pattern} and the model now runs {settings.pattern}: what it holds "
            f"would belong to neither; fill a new cache"
        )
    for layer in getattr(cache, "layers", ()):
        most = layer.get_max_length()
        if 0 < most < seen + q_len and not getattr(layer, "is_sliding", False):
            raise ValueError(
                f"the static cache has {most} slots but {seen + q_len} tokens have to go in; make it longer "
                f"(max_cache_len), or use hf_sparse.make_cache, which grows"
            )


def _check_mask(mask: Any, cache: Any, batch: int, seen: int, q_len: int) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    static = getattr(cache, "is_compileable", False) and mask.shape[1] == cache.get_max_length()
    if mask.shape[0] != batch or (mask.shape[1] != seen + q_len and not static):
        cached = f", {seen} cached ones included" if seen else ""
        raise ValueError(
            f"attention_mask is {list(mask.shape)} but the call has {batch} rows of {seen + q_len} tokens{cached}: "
            f"give 0 or 1 for each of them"
        )


def _check_seen(mask: Any, position_ids: Any, cache: SparseCache, seen: int, q_len: int) -> None:
    """Raise ValueError where the call contradicts what the cache has seen: its padding, or how many tokens it was.

    A decoding step is asked for neither where that would mean to look at a mask of all tokens seen, or at a device.
    """
    if q_len == 0:
        raise ValueError(
            f"the call has no new token: a text that goes on from a cache of {seen} tokens has to be longer than that; "
            f"give the whole text, or an empty cache"
        )
    starts = mask is None and q_len > 1 and isinstance(position_ids, Tensor) and position_ids.ndim == 2
    if starts and (first := int(position_ids[0, 0])) < seen:
        raise ValueError(
            f"position_ids begin at {first} but the cache has seen {seen} tokens, so that these would be read twice; "
            f"give a text that is longer than that, or an empty cache, as assisted decoding in transformers needs in "
            f"any case"
        )
    held = cache.text_lengths()
    if mask is None:
        given = [seen] * len(held)
    elif isinstance(mask, Tensor) and mask.ndim == 2 and q_len > 1:
        given = (mask[:, :seen] != 0).sum(-1).tolist()
    else:
        return
    for row, (now, before) in enumerate(zip(given, held, strict=True)):
        if now != before:
            raise ValueError(
                f"of the {seen} tokens seen in row {row}, {before} were real by the masks of earlier calls but {now} "
                f"are by this call's attention_mask (all, where there is none); pass those masks, and 0 or 1 for each "
                f"new token behind them"
            )


def _real(mask: Any, seen: int, q_len: int) -> Tensor | None:
    """Return which of the new tokens are no padding, [B, Q] bool; None where all are."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, seen : seen + q_len] != 0
    if not isinstance(mask, SparseMask) or mask.segments.is_whole:
        return None
    real = torch.zeros((mask.segments.batch, q_len), dtype=torch.bool)
    for segment in mask.segments.entries:
        real[segment.rows, segment.queries(q_len, mask.k_len)] = True
    return real


def _is_padded(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 0).any())


def _check_table(module: nn.Module, position_ids: Any, total: int) -> None:
    """Raise ValueError where a token lies past the last learned position."""
    own = positions_of(module)
    size = None if own is None else own.table
    if size is None or (own is not None and own.learned is not None):
        return
    needed = total if not isinstance(position_ids, Tensor) else int(position_ids.max()) + 1
    if needed > size:
        raise ValueError(
            f"the text has {needed} tokens but {type(module).__name__} has learned {size} positions; shorten it, or, "
            f"where the model takes position_ids, use streaming_llm with positions='cache', which stays within them"
        )


def _place(
    forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any, seen: int, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the call the position ids of its tokens' places."""
    module, call, positions = forward.module, forward.call, forward.positions
    assert positions is not None
    given, q_len, base = argument(module, args, kwargs, "position_ids"), new.shape[1], 0
    if call is not None:
        tokens, base = new_tokens(call.tokens, q_len), call.base
        tokens = tokens[:1] if call.tokens.is_whole else tokens
    elif isinstance(mask, SparseMask):
        tokens = new_tokens(mask.segments, q_len)
    elif given is not None and seen == 0 and not _is_padded(mask):  # packed samples restart
        tokens = given
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen : seen + q_len]
    else:
        tokens = torch.arange(seen, seen + q_len)[None]
    forward.tokens = tokens if given is None else given  # which a cache has to refuse where they restart
    ids = place_ids(positions, tokens, base).to(new.device, non_blocking=True)
    return with_argument(module, args, kwargs, "position_ids", ids)
