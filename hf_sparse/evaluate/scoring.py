"""Negative log-likelihoods of tokens: windows in, one number per scored token out, never N x V logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..hf import make_cache, settings
from .head import ChunkedHead
from .variants import base_of
from .windows import Window

LONG, CHUNK = 32_768, 8_192  # tokens: above LONG a patched model is fed CHUNK at a time
CHECKED = 64  # tokens that chunks are tried on
ROWS = 128  # positions whose logits are copied to float32 at a time


class Scorer(Protocol):
    """Gives the nats of the scored tokens of windows."""

    def nats(self, jobs: Sequence[tuple[np.ndarray, Window]]) -> list[np.ndarray]: ...


class CausalScorer:
    """Scores each token from those before it.

    Args:
        device: where the inputs go.
        batch_size: windows in one forward pass, padded on the right.
        prefill_chunk: tokens fed at a time, the earlier ones in a cache; None as `fed_at_once` says.
        prefix: what stands for the first token of a prefixed window.
    """

    def __init__(
        self,
        head: ChunkedHead,
        device: torch.device,
        *,
        batch_size: int = 1,
        prefill_chunk: int | None = None,
        prefix: int | None = None,
    ) -> None:
        self.head, self.device = head, device
        self.batch_size, self.prefill_chunk, self.prefix = batch_size, prefill_chunk, prefix

    def nats(self, jobs: Sequence[tuple[np.ndarray, Window]]) -> list[np.ndarray]:
        """Return for each (ids of a document, window) the nats of its scored tokens, float64 [stop - first]."""
        found: list[np.ndarray] = []
        for begin in range(0, len(jobs), self.batch_size):
            found += self._batch(jobs[begin : begin + self.batch_size])
        return found

    def check_chunks(self, ids: np.ndarray, most: int, is_patched: bool) -> None:
        """Raise ValueError where windows will be fed in chunks and do not score then as they do when fed at once.

        Models with recurrent layers may begin anew with every chunk, whatever the cache holds.

        Args:
            ids: of the longest text.
            most: tokens of the longest window.
            is_patched: whether some variant is.
        """
        if chunk_of(most, self.prefill_chunk, is_patched) >= most:
            return
        ids = ids[:CHECKED]
        window = Window(0, len(ids), 1)
        whole, parts = (
            CausalScorer(self.head, self.device, prefill_chunk=chunk).nats([(ids, window)])[0]
            for chunk in (len(ids), len(ids) // 2)
        )
        is_coarse = self.head.model.dtype in (torch.float16, torch.bfloat16)
        # In float32, layers that join the chunks differ by up to 1e-4 (Qwen3-Next), others by 3e-3 and more.
        if not abs(parts - whole).max() <= (2e-2 if is_coarse else 1e-3) * whole.max():
            raise ValueError(
                f"{self.head.name} scores tokens otherwise when they are fed in chunks, as its layers do not take up "
                "what the cache holds; leave prefill_chunk out, and use a max_length of at most "
                f"{LONG}."
            )

    def _batch(self, jobs: Sequence[tuple[np.ndarray, Window]]) -> list[np.ndarray]:
        lengths = [window.fed for _, window in jobs]
        fed = torch.zeros(len(jobs), max(lengths), dtype=torch.long)
        targets = torch.zeros_like(fed)
        for row, (ids, window) in enumerate(jobs):
            taken = torch.from_numpy(ids[window.begin : window.stop].astype(np.int64))
            fed[row, : window.fed], targets[row, : window.fed] = taken[:-1], taken[1:]
            if window.prefixed:
                assert self.prefix is not None
                fed[row, 0] = self.prefix
        inputs: dict[str, Any] = {}
        if len(set(lengths)) > 1:
            reach = torch.arange(fed.shape[1])[None] < torch.tensor(lengths)[:, None]
            inputs["attention_mask"] = reach.long().to(self.device)
        starts = [window.first - 1 - window.begin for _, window in jobs]
        nats = self._nats(fed.to(self.device), targets.to(self.device), min(starts), inputs)
        return [
            nats[row, start - min(starts) : length - min(starts)]
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]

    def _nats(self, ids: Tensor, targets: Tensor, first: int, inputs: dict[str, Any]) -> np.ndarray:
        """Return float64 [B, N - first] of ids [B, N] and the tokens [B, N] that follow them."""
        parts: list[Tensor] = []
        for position, logits in self._logits(ids, first, inputs):
            wanted = targets[:, position : position + logits.shape[1]]
            parts.append(self.measure(logits, wanted.to(logits.device)))
            del logits  # or it would lie beside the next chunk's
        return torch.cat(parts, dim=1).double().cpu().numpy()

    def measure(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Return what is kept of logits [B, C, V] and the tokens [B, C] that follow: their nats [B, C]."""
        return token_nats(logits, wanted)

    def _logits(self, ids: Tensor, first: int, inputs: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        n = ids.shape[1]
        step = fed_at_once(self.head.model, n, self.prefill_chunk if len(ids) == 1 else n)
        if n <= step:
            yield from self.head.chunks(ids, first, **inputs)
            return
        cache = empty_cache(self.head.model)
        for begin in range(0, n, step):
            part = ids[:, begin : begin + step]
            skipped = min(max(first - begin, 0), part.shape[1])
            for position, logits in self.head.chunks(
                part, skipped, past_key_values=cache, use_cache=True, **inputs
            ):
                yield begin + position, logits


class MaskedScorer:
    """Scores each token of an encoder from all others, masked (pseudo-log-likelihood, Salazar et al. 2020).

    Every token is masked exactly once: a random partition into 1/`mask_share` parts, each masked in a pass of its own.
    A part of one token is the published form; larger ones take fewer passes and see a little less.

    Args:
        batch_size: passes in one forward.
        around: the special tokens before and after a window's tokens.
    """

    def __init__(
        self,
        head: ChunkedHead,
        device: torch.device,
        *,
        batch_size: int,
        mask_token: int,
        mask_share: float,
        around: tuple[Sequence[int], Sequence[int]],
        seed: int,
    ) -> None:
        self.head, self.device, self.batch_size = head, device, batch_size
        self.mask_token, self.parts, self.around, self.seed = (
            mask_token,
            math.ceil(1 / mask_share),
            around,
            seed,
        )

    @property
    def special_tokens(self) -> int:
        """Special tokens around every window."""
        return len(self.around[0]) + len(self.around[1])

    def nats(self, jobs: Sequence[tuple[np.ndarray, Window]]) -> list[np.ndarray]:
        """Return for each (ids of a document, window) the nats of its scored tokens, float64 [stop - first]."""
        return [self._window(ids[window.begin : window.stop], window) for ids, window in jobs]

    def _window(self, ids: np.ndarray, window: Window) -> np.ndarray:
        before, after = self.around
        n, shift = len(ids), len(before)
        draw = np.random.default_rng([self.seed, n, int(ids.sum())])  # of the text: equal for all variants
        order, parts = draw.permutation(n), min(self.parts, n)
        groups = [np.sort(order[part::parts]) for part in range(parts)]
        whole = torch.tensor([*before, *ids.tolist(), *after], device=self.device)
        nats = np.empty(n)
        for begin in range(0, parts, self.batch_size):
            passes = groups[begin : begin + self.batch_size]
            rows = torch.tensor([row for row, group in enumerate(passes) for _ in group], device=self.device)
            places = np.concatenate(passes)
            columns = torch.from_numpy(places).to(self.device) + shift
            fed = whole.repeat(len(passes), 1)
            fed[rows, columns] = self.mask_token
            nats[places] = self._nats(fed, rows, columns, whole[columns])
        return nats[window.first - window.begin :]

    def _nats(self, fed: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> np.ndarray:
        states = self.head.states(fed)
        hidden = states.hidden[rows, columns][None]  # [1, masked, d]
        parts = []
        for begin in range(0, len(rows), self.head.chunk):
            chunk = slice(begin, begin + self.head.chunk)
            logits = self.head.logits(states, hidden[:, chunk])
            parts.append(token_nats(logits, targets[None, chunk].to(logits.device))[0])
        return torch.cat(parts).double().cpu().numpy()


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [B, C] of logits [B, C, V] and targets [B, C], computed in float32."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        nn.functional.cross_entropy(few.float(), ids_of_few, reduction="none")
        for few, ids_of_few in zip(flat.split(ROWS), wanted.split(ROWS), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


def fed_at_once(model: Any, tokens: int, prefill_chunk: int | None) -> int:
    """Return how many of `tokens` a causal model is fed at a time: `prefill_chunk`, if given.

    Else all of them; but a patched model gets windows above LONG tokens in chunks, as most patterns need little of what
    went before. (A dense one would need a mask over all of it.)
    """
    return chunk_of(tokens, prefill_chunk, is_patched=settings(base_of(model)) is not None)


def chunk_of(tokens: int, prefill_chunk: int | None, is_patched: bool) -> int:
    """Return the same, for a model that is patched or not."""
    if prefill_chunk is not None:
        return prefill_chunk
    return CHUNK if tokens > LONG and is_patched else tokens


def empty_cache(model: Any) -> Any:
    """Return the cache that `generate` makes: the pattern's on a patched model, transformers' own on a dense one."""
    base = base_of(model)
    return make_cache(base) if settings(base) is not None else DynamicCache(config=base.config)
