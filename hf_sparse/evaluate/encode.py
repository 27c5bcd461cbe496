"""Embeddings of documents of any length: one vector each, from the states of a model's last layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..documents import Document, named, refuse_empty
from ..hf.extension import readable_tokens
from ..hf.routing import is_causal
from .preparation import check_length
from .tokens import check_unicode, check_vocabulary
from .variants import base_of, measured_in_eval_mode

POOLING = ("mean", "cls", "last")


@dataclass(frozen=True, eq=False)
class _Window:
    """Tokens fed at once, special ones included, and which document they are of."""

    document: int
    ids: list[int]


def encode(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document | str],
    *,
    pooling: str = "mean",
    max_length: int | None = None,
    batch_size: int = 8,
    normalize: bool = False,
    progress: bool = False,
) -> Tensor:
    """Return an embedding of each document, float32 [documents, d] on the CPU.

    `model` is an encoder or a decoder, bare or with a head, dense or patched, with an adapter or without. A document
    with more tokens than it reads at once is read in as few disjoint windows as possible, of equal length give or take
    a token, each with the special tokens that the tokenizer puts around a text. These count like any other token, as
    they do in sentence-transformers.

    Args:
        pooling: of the last layer's states. "mean": over all tokens of all windows; "cls": of the first token of each
            window, their mean; "last": of the last token that is read, with as much before it as one window takes.
        max_length: tokens of a window, special ones included; default: what the model was trained, or extended, to
            read, everything at once where its config does not say. Rotary models may be asked to go beyond it.
        batch_size: windows read together, padded on the right whatever the tokenizer's side; for speed alone.
        normalize: divide each embedding by its length.
    Raises:
        ValueError: a document without text, a model or setting with which this has no meaning, a tokenizer of another
            model.
    """
    base = base_of(model)
    texts = list(named(documents))
    _check(model, base, texts, pooling, max_length, batch_size)
    room = max_length or readable_tokens(base)
    around = _special_tokens(tokenizer)
    windows = [
        _Window(place, ids)
        for place, document in enumerate(texts)
        for ids in _windows(tokenizer, document, around, room, pooling)
    ]
    check_vocabulary(max(max(window.ids) for window in windows), base)
    windows.sort(
        key=lambda window: len(window.ids), reverse=True
    )  # what does not fit into memory fails first
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked: any token does
    sums: list[Any] = [0.0] * len(texts)
    counts = [0] * len(texts)
    with (
        measured_in_eval_mode(model),
        torch.inference_mode(),
        tqdm(total=len(windows), desc="encode", unit="window", disable=not progress) as bar,
    ):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            states = _states(base, [window.ids for window in batch], padding)
            for window, own in zip(batch, states, strict=True):
                pooled = own[: len(window.ids)]
                pooled = {"mean": pooled, "cls": pooled[:1], "last": pooled[-1:]}[pooling]
                sums[window.document] += pooled.sum(0, dtype=torch.float32).cpu().double()
                counts[window.document] += len(pooled)
            bar.update(len(batch))
    embeddings = torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).float()
    return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


def _states(base: Any, rows: list[list[int]], padding: int) -> Tensor:
    """Return the last layer's states [B, N, d] of rows of token ids, of which only the last layer's are ever held."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    body = base.base_model
    takes = inspect.signature(type(body).forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    device = base.get_input_embeddings().weight.device
    output = body(input_ids=ids.to(device), attention_mask=mask.to(device), return_dict=True, **extra)
    states: Tensor = output.last_hidden_state
    return states


def _windows(
    tokenizer: Any, document: Document, around: tuple[list[int], list[int]], room: int | None, pooling: str
) -> list[list[int]]:
    """Return the token ids of a document's windows, each with the special tokens `around` it."""
    before, after = around
    check_unicode(document)
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"{document.name} holds no tokens for this tokenizer; leave it out.")
    size = len(ids) if room is None else room - len(before) - len(after)
    if size < 1:
        raise ValueError(
            f"max_length={room} leaves no room beside the {len(before) + len(after)} special tokens; give more."
        )
    if pooling == "last":
        return [[*before, *ids[-size:], *after]]
    return [[*before, *part.tolist(), *after] for part in np.array_split(ids, -(-len(ids) // size))]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(
        "this tokenizer changes a text where it adds special tokens to it; use one that only puts them around it."
    )


def _check(
    model: Any, base: Any, texts: list[Document], pooling: str, max_length: int | None, batch_size: int
) -> None:
    """Raise ValueError where there is nothing to encode, or no way to."""
    name = type(base).__name__
    if pooling not in POOLING:
        raise ValueError(f"pooling must be one of {', '.join(POOLING)}, got {pooling!r}.")
    for setting, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{setting} must be a whole number >= 1, got {value!r}.")
    if not texts:
        raise ValueError("there are no documents to encode; give at least one.")
    refuse_empty(texts, "leave it out")
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; give model.get_encoder() alone.")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            f"{name} has an adapter of virtual tokens, which only its head sees; merge or remove it."
        )
    if pooling == "cls" and is_causal(base):
        raise ValueError(
            f"pooling='cls' takes the first token's state, which in {name}, a causal model, has seen no other token; "
            "use 'last' or 'mean'."
        )
    if max_length is not None:
        check_length(base, max_length, "max_length")
    parameters = str(getattr(base.config.get_text_config(), "rope_parameters", None))
    if "'dynamic'" in parameters:
        raise ValueError(
            f"the rotary frequencies of {name} stay those of the longest text so far (dynamic), so an embedding would "
            "depend on other documents; extend its positions by linear, ntk or yarn."
        )
    if "'longrope'" in parameters and batch_size > 1:
        raise ValueError(
            f"the rotary frequencies of {name} are those of the longest text in a batch (longrope); use batch_size=1."
        )
