"""Global tokens of one call: ``model(input_ids, global_attention_mask=mask)``, and the tokens of `token_ids`.

With a cache the flags of the tokens seen are kept on the cache, which reorders and crops them together with its keys.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, GenerationMixin, PreTrainedModel

from ..patterns import Pattern
from .call_arguments import GLOBALS
from .hooks import add_hook, argument, mask_owner, remove_hooks
from .routing import verify_routing
from .stored_settings import settings_for

_PREPARE = "prepare_inputs_for_generation"


def refuse_globals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse `global_attention_mask` under a pattern that has no use for it."""
    if kwargs.get(GLOBALS) is not None:
        config: Any = module.config
        pattern = settings_for(config.get_text_config()).pattern
        raise ValueError(
            f"{GLOBALS} was given but {pattern} takes no globals from a call; patch with 'longformer' or "
            f"'global_tokens', or leave it out"
        )


def refuse_lost_globals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse `global_attention_mask` where a model would not hand it on."""
    if kwargs.get(GLOBALS) is not None:
        raise ValueError(
            f"{type(module).__name__} does not hand {GLOBALS} on to its layers; make tokens global by their positions "
            f"or by token_ids, as options of the pattern"
        )


GLOBAL_HOOKS = (refuse_globals, refuse_lost_globals)


def add_global_hooks(model: PreTrainedModel, pattern: Pattern) -> None:
    """Let the model's forward and generate() take `global_attention_mask`, or refuse it, as the pattern wants."""
    if not pattern.takes_globals:
        add_hook(model, refuse_globals)  # the model that makes the masks refuses by itself
        return
    let_generate_take_globals(model)


def let_generate_take_globals(model: PreTrainedModel) -> None:
    """Let generate() accept `global_attention_mask` and hand it to every forward."""
    if isinstance(model, GenerationMixin) and _PREPARE not in vars(model):
        setattr(model, _PREPARE, PrepareWithGlobals(model))


def check_globals_arrive(model: PreTrainedModel) -> None:
    """Try whether the model hands `global_attention_mask` on to the one that makes the masks; if not, refuse it."""
    seen: list[bool] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get(GLOBALS) is not None)

    handle = mask_owner(model).register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        verify_routing(model, None, **{GLOBALS: torch.tensor([[1, 0, 0, 0]], device=model.device)})
    except ValueError:
        seen.clear()
    finally:
        handle.remove()
    if not any(seen):
        add_hook(model, refuse_lost_globals)


def remove_global_hooks(model: nn.Module) -> None:
    """Undo `add_global_hooks`, also on a copy of the model."""
    remove_hooks(model, GLOBAL_HOOKS)
    if isinstance(vars(model).get(_PREPARE), PrepareWithGlobals):
        delattr(model, _PREPARE)


class PrepareWithGlobals:
    """What a model runs before each step of generate(): its class's own, then `global_attention_mask`.

    An object and no bound method, which a pickled model would look for in its class. It shows the signature of what it
    runs, in which generate() looks for the arguments that a model can take.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(getattr(type(self.model), _PREPARE))
        parameters = list(own.parameters.values())[1:]  # without self
        mask = inspect.Parameter(GLOBALS, inspect.Parameter.KEYWORD_ONLY, default=None)
        place = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
        return own.replace(parameters=[*parameters[:place], mask, *parameters[place:]])

    def __call__(
        self, input_ids: Tensor, *args: Any, global_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of a step, the mask made as long as the tokens seen.

        Tokens past the end of the mask are not global. transformers repeats the mask for beams as it does the inputs.
        """
        inputs = getattr(type(self.model), _PREPARE)(self.model, input_ids, *args, **kwargs)
        if global_attention_mask is not None:
            cache, embeds = inputs.get("past_key_values"), inputs.get("inputs_embeds")
            new = inputs["input_ids"] if embeds is None else embeds
            total = new.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
            width = global_attention_mask.shape[-1]
            if width < total and kwargs.get("is_first_iteration"):
                raise ValueError(
                    f"{GLOBALS} covers {width} tokens but the prompt has {total}: give 0 or 1 for each of its tokens"
                )
            inputs[GLOBALS] = nn.functional.pad(global_attention_mask, (0, total - width))
        return inputs


def global_flags(
    pattern: Pattern, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return which tokens are global, [B, tokens seen and new] bool on the CPU; None where no call has said any."""
    given = kwargs.get(GLOBALS)
    ids = argument(module, args, kwargs, "input_ids")
    cache = argument(module, args, kwargs, "past_key_values")
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    wanted = pattern.global_token_ids
    before = getattr(cache, "global_flags", None)
    if given is None and not wanted and before is None:
        return None
    if wanted and ids is None:
        raise ValueError(
            f"token_ids={wanted} cannot be found in inputs_embeds; pass input_ids, or name the tokens with {GLOBALS}"
        )
    new = ids if ids is not None else argument(module, args, kwargs, "inputs_embeds")
    batch, length = new.shape[:2]
    seen = int(cache.get_seq_length()) if cache is not None else 0
    if before is None:
        if seen and wanted:
            raise ValueError(
                f"the cache holds {seen} tokens of which it is not known whether they are among token_ids={wanted}; "
                f"fill it with the patched model"
            )
        before = torch.zeros(batch, seen, dtype=torch.bool)
    if before.shape != (batch, seen):
        raise ValueError(
            f"the cache remembers the globals of {before.shape[0]} x {before.shape[1]} tokens but holds {batch} x "
            f"{seen}: change a cache through its own methods only"
        )
    flags = torch.cat([before, torch.zeros(batch, length, dtype=torch.bool)], dim=1)
    padding = _padding(argument(module, args, kwargs, "attention_mask"), seen + length)
    if given is not None:
        flags = flags | _checked(given, batch, seen, length, before, padding)
    if wanted:
        found = torch.isin(ids, torch.tensor(wanted, device=ids.device)).cpu()
        flags[:, seen:] |= found
    return flags  # those of padding included, which belongs to no sequence


def _padding(attention_mask: Any, total: int) -> Tensor | None:
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] < total:
        return None
    return (attention_mask[:, :total] == 0).cpu()


def _checked(
    given: Any, batch: int, seen: int, length: int, before: Tensor, padding: Tensor | None
) -> Tensor:
    """Return a `global_attention_mask` as flags of all tokens seen; raise ValueError for one that cannot be meant."""
    if (
        not isinstance(given, Tensor)
        or given.ndim != 2
        or given.shape
        not in (
            (batch, seen + length),
            (batch, length),
        )
    ):
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        cached = f", or [{batch}, {length}] for the new ones alone" if seen else ""
        raise ValueError(
            f"{GLOBALS} must hold 0 or 1 for each token seen, [{batch}, {seen + length}]{cached}, got {got}"
        )
    flags = given.cpu() != 0
    if bool(((given.cpu() != 1) & flags).any()):
        raise ValueError(
            f"{GLOBALS} must be 0 (local) or 1 (global) for each token, got {given[given != 0].max().item()}"
        )
    if given.shape[1] == length:
        flags = torch.cat([torch.zeros_like(before), flags], dim=1)
    elif bool((flags[:, :seen] & ~before).any()):
        row, place = (flags[:, :seen] & ~before).nonzero()[0].tolist()
        raise ValueError(
            f"{GLOBALS} makes token {place} of row {row} global, which is in the cache as a local one; give the mask "
            f"from the first call on"
        )
    if padding is not None and bool((flags & padding).any()):
        row, place = (flags & padding).nonzero()[0].tolist()
        raise ValueError(
            f"{GLOBALS} makes token {place} of row {row} global, which attention_mask says is padding; set it to 0"
        )
    return flags
