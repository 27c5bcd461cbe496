"""A language model whose vocabulary-sized logits come a chunk of positions at a time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_masked(base: Any) -> bool:
    """True for models that predict masked tokens from both sides, such as BertForMaskedLM."""
    return type(base).__name__ in set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) and not getattr(
        base.config, "is_encoder_decoder", False
    )


@dataclass
class States:
    """What the model's body gives its head: hidden [B, N, d], and the output object it came in."""

    hidden: Tensor
    output: Any


class ChunkedHead:
    """The model's own forward pass with its body's output held back, so that the head runs on chunks.

    Two kinds of call go through the whole model: in the first its body runs as always, but hands only its last
    position on to the head; in the following ones the body does not run and hands on the next chunk of what it gave
    before. So whatever the model does behind its body (soft-capping, logit scales, biases) is applied by the model.

    Args:
        model: a causal language model, a masked one, or a PeftModel of either, in eval mode.
        chunk: positions whose logits are held at a time.
    Raises:
        ValueError: no language-model head; the first use of `check` finds the rest.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"head_chunk must be a whole number >= 1 (positions per chunk), got {chunk!r}")
        self.model, self.chunk = model, chunk
        base: Any = (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )  # out of a PeftModel
        self.name = type(base).__name__
        if not hasattr(base, "config"):
            raise ValueError(
                f"{self.name} is no model of transformers; give that itself, out of whatever it is wrapped in."
            )
        self.masked = is_masked(base)
        if getattr(base.config, "is_encoder_decoder", False) or base.get_output_embeddings() is None:
            raise ValueError(
                f"{self.name} has no causal language-model head, so it has no perplexity; "
                "load a decoder with AutoModelForCausalLM, or an encoder with AutoModelForMaskedLM."
            )
        takes = inspect.signature(type(base).forward).parameters
        self.cached = not self.masked and "past_key_values" in takes  # keys and values of earlier tokens
        body = base.base_model if self.masked else base.get_decoder()
        self.body: nn.Module = base.model if body is base else body  # Llama 4 text gives itself

    def states(self, input_ids: Tensor, *, through: Any = None, **inputs: Any) -> States:
        """Return what the body gives the head for input_ids [B, N]; `inputs` are the model's further arguments.

        through: what is called in place of the model, such as the DistributedDataParallel around it.
        """
        ids = input_ids
        held: list[Tensor] = []
        forward = self.body.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None or held or hidden.shape[:2] != ids.shape:
                raise ValueError(
                    f"the decoder of {self.name} ({type(self.body).__name__}) does not give one state per token, so "
                    "its perplexity cannot be computed in chunks; use a decoder-only causal language model."
                )
            held.append(hidden)
            output.last_hidden_state = hidden[:, -1:]
            return output

        with _forward_of(self.body, keep) as outputs:
            self._run(ids, through, **inputs)
        if not outputs:
            raise ValueError(
                f"{self.name} does not call its decoder ({type(self.body).__name__}) in its forward pass, so its "
                "perplexity cannot be computed in chunks; use a decoder-only causal language model."
            )
        return States(held[0], outputs[0])

    def logits(self, states: States, hidden: Tensor) -> Tensor:
        """Return the head's logits [B, C, V] of hidden [B, C, d], a part of ``states.hidden``."""

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            states.output.last_hidden_state = hidden
            return states.output

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)  # unread
        with _forward_of(self.body, stand_in):
            return self._run(ids).logits

    def chunks(self, ids: Tensor, first: int = 0, **inputs: Any) -> Iterator[tuple[int, Tensor]]:
        """Yield (position, logits [B, C, V]) for ids [B, N] from position `first` on, at most `chunk` rows in each."""
        states = self.states(ids, **inputs)
        step = max(1, self.chunk // len(ids))
        for position in range(first, ids.shape[1], step):
            yield position, self.logits(states, states.hidden[:, position : position + step])

    def check(self, ids: Sequence[int], device: torch.device) -> None:
        """Raise ValueError unless the chunks are the model's own logits, and no token sees a later one.

        Args:
            ids: a few tokens of the text, at least 3.
        """
        probe = torch.tensor([list(map(int, ids))], device=device)
        whole = self._run(probe).logits[0]
        if not whole.isfinite().all():
            raise ValueError(
                f"{self.name} gives logits that are not finite; check its weights, or use another dtype."
            )
        tolerance = (
            2e-2 if whole.dtype in (torch.float16, torch.bfloat16) else 1e-4
        ) * whole.abs().max().item()
        chunk, self.chunk = self.chunk, min(self.chunk, max(1, len(ids) // 2))
        try:
            parts = torch.cat([logits[0] for _, logits in self.chunks(probe)])
        finally:
            self.chunk = chunk
        if parts.shape != whole.shape or not (parts - whole).abs().max().item() <= tolerance:
            raise ValueError(
                f"the output head of {self.name} cannot be run in chunks: a few tokens gave other logits than "
                "the model itself; use a language model whose head sees one position at a time."
            )
        if self.masked:
            return
        changed = probe.clone()
        changed[0, -1] = 1 if probe[0, -1] == 0 else 0
        leak = (self._run(changed).logits[0, :-1] - whole[:-1]).abs().max().item()
        if leak > tolerance:
            raise ValueError(
                f"{self.name} lets a token see the ones after it, so its perplexity means nothing; "
                "load a causal decoder with AutoModelForCausalLM, or an encoder with AutoModelForMaskedLM."
            )

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient and that the head reads, those it shares with the body too."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        within = set(self.body.parameters()) - set(base.get_output_embeddings().parameters())
        return [p for p in base.parameters() if p.requires_grad and p not in within]

    def _run(self, ids: Tensor, through: Any = None, **inputs: Any) -> Any:
        if not self.masked:
            inputs.setdefault("use_cache", False)
        return (through or self.model)(input_ids=ids, return_dict=True, **inputs)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[list[Any]]:
    """Let `module` run `forward` inside the block; gives the list of what it returned."""
    returned: list[Any] = []

    @functools.wraps(module.forward)  # hooks look up in the signature what was passed by place (GPT-2's ids)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        returned.append(forward(*args, **kwargs))
        return returned[-1]

    own = module.__dict__.get("forward")  # accelerate's hooks put one there
    module.forward = replaced
    try:
        yield returned
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
