"""The mask of one forward pass: a small object instead of an n x n tensor, shared by all layers of a kind."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Call
from ..backends.reference import allowed_pairs
from ..patterns import get_pattern
from ..plan import Constraint, Segments
from .overlays import read_mask_function
from .stored_settings import PREFIX, SparseSettings, settings_for


class SparseMask:
    """What the attention calls of one forward pass share: sequences, their global tokens, and the host's constraint.

    Transformers hands it from the mask function to the attention function untouched; on the way it is asked for the
    attributes of a [B, 1, Q, K] bool tensor. A plain class on purpose: FSDP rebuilds dataclasses. It holds no reference
    to a cache, no tensor on a device and nothing that grows with n x n.
    """

    __slots__ = (
        "_chosen",
        "_recovered",
        "constraint",
        "device",
        "first_slot",
        "flags",
        "globals_known",
        "k_len",
        "may_be_packed",
        "q_len",
        "segments",
        "settings",
        "shape",
    )
    ndim = 4
    dtype = torch.bool

    def __init__(
        self,
        settings: SparseSettings,
        constraint: Constraint,
        segments: Segments,
        q_len: int,
        buffer: int,
        device: torch.device,
        may_be_packed: bool = False,
        first_slot: int = 0,
    ) -> None:
        """Describe a call of the last `q_len` of the ``segments.k_len`` keys, held in `buffer` >= that many slots.

        may_be_packed: position ids that restart may still divide the rows: nothing is padded, packed or cached.
        first_slot: place of key slot 0 among all tokens seen.
        """
        self.settings = settings
        self.constraint = constraint
        self.segments = segments
        self.q_len = q_len
        self.k_len = segments.k_len
        self.shape = torch.Size((segments.batch, 1, q_len, buffer))
        self.device = torch.device(device)
        self.may_be_packed = may_be_packed
        self.first_slot = first_slot
        self.globals_known = False
        self.flags: Tensor | None = None
        self._recovered: tuple[Tensor, Segments] | None = None
        self._chosen: tuple[Segments, Segments] | None = None

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, *args: Any, **kwargs: Any) -> SparseMask:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> SparseMask:
        return self.to()

    def to(self, *args: Any, **kwargs: Any) -> SparseMask:
        """Return a copy for the device among the arguments; the others mean nothing here."""
        device = next(
            (a for a in (*args, kwargs.get("device")) if isinstance(a, (str, int, torch.device))), self.device
        )
        copy = object.__new__(SparseMask)
        for name in self.__slots__:
            setattr(copy, name, getattr(self, name))
        copy.device = torch.device(device)
        return copy

    def with_globals(self, flags: Tensor | None) -> SparseMask:
        """Return a copy that knows the global tokens of the call.

        Args:
            flags: [B, tokens seen and new] bool, on the CPU; None for none.
        """
        copy = self.to()
        copy.globals_known, copy._chosen = True, None
        stop = self.first_slot + self.k_len
        copy.flags = None if flags is None or not bool(flags.any()) else flags[:, self.first_slot : stop]
        return copy

    def dense(self) -> Tensor:
        """Return the host's own mask [B, 1, Q, K], without the pattern; quadratic, for code that needs a tensor."""
        allowed = allowed_pairs(Call(get_pattern("full"), self.constraint), self.segments, 1, self.q_len)
        return torch.nn.functional.pad(allowed, (0, self.shape[-1] - self.k_len)).to(self.device)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def sequences(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Segments:
        """Return the segments with their global tokens, divided where the call's own arguments show packed samples.

        Transformers looks for packed samples only where there is no cache and no mask, yet makes a cache by default.

        Args:
            position_ids: [B or 1, Q] int64; a sample begins wherever they do not go up by 1.
            cu_seq_lens: [samples + 1] int32, first slots of the samples of the only row.
        Raises:
            ValueError: the pattern looks for tokens in the input and nothing has looked.
        """
        if not self.globals_known and (wanted := self.settings.pattern.global_token_ids):
            raise ValueError(
                f"token_ids={wanted} are found by a model that hf_sparse.patch_model or hf_sparse.load has prepared; "
                f"attn_implementation={PREFIX + self.settings.pattern.name!r} alone does not look for them"
            )
        segments = self._divided(position_ids, cu_seq_lens)
        if self.flags is None:
            return segments
        if self._chosen is None or self._chosen[0] is not segments:
            self._chosen = (segments, segments.choose(self.flags))
        return self._chosen[1]

    def _divided(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Segments:
        source = cu_seq_lens if cu_seq_lens is not None and self.segments.batch == 1 else position_ids
        if source is None or not self.may_be_packed:
            return self.segments
        if self._recovered is None or self._recovered[0] is not source:
            labels = _sample_labels(source, source is cu_seq_lens, self.segments.batch, self.q_len)
            self._recovered = (source, self.segments if labels is None else Segments.from_labels(labels))
        return self._recovered[1]


@dataclass
class Forward:
    """A forward in progress of a model that makes masks; flags: [B, tokens seen and new] bool, its global tokens."""

    module: nn.Module
    flags: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.module.config


_running = threading.local()


def running_forwards() -> list[Forward]:
    """Return the forwards in progress in this thread whose global tokens are known, the innermost last."""
    return _running.__dict__.setdefault("forwards", [])


def _sample_labels(source: Tensor, cumulative: bool, batch: int, q_len: int) -> Tensor | None:
    """Return the sample number of each slot [B, Q], None where there is one sample per row."""
    if cumulative:
        inner = source[1:-1].to(torch.int64)
        labels = torch.bucketize(torch.arange(q_len, device=source.device), inner, right=True)[None]
    elif source.ndim == 2 and source.shape[1] == q_len and source.shape[0] in (1, batch):
        restart = torch.nn.functional.pad(source.diff(dim=-1) != 1, (1, 0))
        labels = restart.cumsum(-1)
    else:  # [3, B, Q] positions repeat for image tokens and restart nothing
        return None
    return labels.expand(batch, q_len) if bool(labels.any()) else None


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Any,
    config: Any,
    device: Any,
    **host: Any,
) -> SparseMask:
    """The mask function registered with transformers under every ``sparse_`` name.

    Args:
        attention_mask: [B, tokens seen] bool, True = a real token; None; or a mask made here before.
        q_offset, kv_offset: places of the first query and of key slot 0 among all tokens seen.
        kv_length: key slots, those not yet filled by a static cache included.
    Raises:
        ValueError: a mask function that no pattern can be combined with, or an `attention_mask` shorter than the keys.
    """
    if isinstance(attention_mask, SparseMask):
        return attention_mask
    settings = settings_for(config)
    host_mask = read_mask_function(mask_function)
    # A static cache's offset is its live counter, which update() moves before attention runs.
    seen = int(q_offset) + q_length
    k_len = seen - kv_offset
    if k_len > kv_length or (k_len < kv_length and not host_mask.constraint.causal and int(q_offset) == 0):
        raise ValueError(
            f"the queries end at token {seen} but the keys hold tokens {kv_offset} to {kv_offset + kv_length}: "
            f"cross-attention and prefix tuning cannot run under a sparse pattern; use the dense attention"
        )
    segments, padded = _segments(attention_mask, host_mask.labels, batch_size, kv_offset, k_len)
    mask = SparseMask(
        settings,
        host_mask.constraint,
        segments,
        q_length,
        kv_length,
        device,
        may_be_packed=not padded and host_mask.labels is None and q_length == k_len,
        first_slot=kv_offset,
    )
    forwards = running_forwards()
    return mask.with_globals(forwards[-1].flags) if forwards and forwards[-1].config is config else mask


def _segments(
    attention_mask: Tensor | None, labels: Tensor | None, batch: int, first: int, k_len: int
) -> tuple[Segments, bool]:
    """Return the sequences of the batch, and whether there is padding."""
    if labels is not None:
        return Segments.from_labels(labels), False
    if attention_mask is None:
        return Segments.whole(batch, k_len, first), False
    if attention_mask.shape[-1] < first + k_len:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens but {first + k_len} have been seen: pass the "
            f"mask of all of them, cached tokens included"
        )
    mask = attention_mask.to(torch.bool)
    if bool(mask[:, : first + k_len].all()):
        return Segments.whole(batch, k_len, first), False
    dropped = mask[:, :first].sum(-1) if first else None
    return Segments.from_mask(mask[:, first : first + k_len], dropped), True
