"""A causal language model whose vocabulary-sized logits come a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ChunkedHead:
    """The model's own forward pass with its decoder's output held back, so that the head runs on chunks.

    Two kinds of call go through the whole model: in the first its decoder runs as always, but hands only its last
    position on to the head; in the following ones the decoder does not run and hands on the next chunk of what it gave
    before. So whatever the model does behind its decoder (soft-capping, logit scales, biases) is applied by the model.

    Args:
        model: a causal language model, or a PeftModel of one, in eval mode.
        chunk: positions whose logits are held at a time.
    Raises:
        ValueError: no causal language-model head; the first use of `check` finds the rest.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"head_chunk must be a whole number >= 1 (positions per chunk), got {chunk!r}")
        self.model, self.chunk = model, chunk
        base: Any = (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )  # out of a PeftModel
        self.name = type(base).__name__
        config = base.config
        if getattr(config, "is_encoder_decoder", False) or base.get_output_embeddings() is None:
            raise ValueError(
                f"{self.name} has no causal language-model head, so it has no perplexity; "
                "load a decoder with AutoModelForCausalLM."
            )
        self.body: nn.Module = base.get_decoder()

    def chunks(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first, logits [C, V]) for the positions of ids [1, N] in order, at most `chunk` of them at a time."""
        hidden, output = self._hidden(ids)
        for first in range(0, hidden.shape[1], self.chunk):
            part = hidden[:, first : first + self.chunk]

            def stand_in(*args: Any, part: Tensor = part, **kwargs: Any) -> Any:
                output.last_hidden_state = part
                return output

            with _forward_of(self.body, stand_in):
                yield first, self._run(ids[:, first : first + self.chunk]).logits[0]

    def check(self, ids: Sequence[int], device: torch.device) -> None:
        """Raise ValueError unless the chunks are the model's own logits, and no token sees a later one.

        Args:
            ids: a few tokens of the text, at least 3.
        """
        probe = torch.tensor([list(ids)], device=device)
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
            parts = torch.cat([logits for _, logits in self.chunks(probe)])
        finally:
            self.chunk = chunk
        if parts.shape != whole.shape or not (parts - whole).abs().max().item() <= tolerance:
            raise ValueError(
                f"the output head of {self.name} cannot be run in chunks: a few tokens gave other logits than "
                "the model itself; use a causal language model whose head sees one position at a time."
            )
        changed = probe.clone()
        changed[0, -1] = 1 if probe[0, -1] == 0 else 0
        leak = (self._run(changed).logits[0, :-1] - whole[:-1]).abs().max().item()
        if leak > tolerance:
            raise ValueError(
                f"{self.name} lets a token see the ones after it, so its perplexity means nothing; "
                "load a causal decoder with AutoModelForCausalLM."
            )

    def _hidden(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Return what the decoder gives the head [1, N, d], and the output object it gave it in."""
        held: list[Any] = []
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

        with _forward_of(self.body, keep) as calls:
            self._run(ids)
        if not calls:
            raise ValueError(
                f"{self.name} does not call its decoder ({type(self.body).__name__}) in its forward pass, so its "
                "perplexity cannot be computed in chunks; use a decoder-only causal language model."
            )
        return held[0], calls[0]

    def _run(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, use_cache=False, return_dict=True)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[list[Any]]:
    """Let `module` run `forward` inside the block; gives the list of what it returned."""
    returned: list[Any] = []

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
