"""What people use today, beside ours: dense attention, a written mask, FlexAttention, local-attention."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .encoders import bigbird, longformer
from .task import Attention, Task, Unavailable

GIB = 2**30


class Peer(NamedTuple):
    """Somebody else's way to the same attention.

    make: returns the attention of a task; raises Unavailable, or ImportError where a package is missing.
    applies: tells whether it computes a task's pattern at all.
    exact: it sees the same pairs as ours; `note` says what it sees where it does not.
    backward: the kinds of device on which it can be differentiated.
    most: tokens from which on it is left out, since one call takes seconds or gigabytes.
    """

    name: str
    make: Callable[[Task], Attention]
    applies: Callable[[Task], bool]
    exact: bool = True
    note: str = ""
    backward: tuple[str, ...] = ("cpu", "cuda")
    most: Mapping[str, int] = MappingProxyType({"cpu": 32768, "cuda": 131072})


def dense(task: Task, q_len: int) -> dict[str, Attention]:
    """Return dense attention by the operator's own choice first, then (CUDA) by each backend it could choose."""
    causal = task.case.causal and q_len > 1
    default = partial(scaled_dot_product_attention, is_causal=causal, enable_gqa=task.shape.gqa)
    found: dict[str, Attention] = {"dense SDPA": default}
    if task.shape.device.type == "cuda":
        for backend in (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            found[f"dense SDPA, {_short(backend)}"] = partial(_by_backend, backend, default)
    if q_len == 1 and task.shape.gqa:
        found["dense SDPA, group as rows"] = _group_as_rows
    return found


def default_backend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Name the backend that scaled_dot_product_attention chooses by itself for these tensors."""
    gqa = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=gqa)
    return _short(SDPBackend(choice))


def _short(backend: SDPBackend) -> str:
    return str(backend.name).lower().removesuffix("_attention")


def _by_backend(backend: SDPBackend, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v)


def _group_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One new token: the query heads of a group read the same keys, so they may be rows of one head."""
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return scaled_dot_product_attention(rows, k, v).reshape(q.shape)


def _written_mask(task: Task) -> Attention:
    """What transformers gives SDPA for a sliding-window model: a full n x n mask."""
    n, device = task.length, task.shape.device
    heads = task.shape.heads if task.heads_differ else 1
    size = (2 if device.type == "cpu" else 16) * GIB
    if heads * n * n * task.shape.dtype.itemsize > size:
        raise Unavailable(f"a mask of {heads} x {n} x {n} is beyond the suite's {size // GIB} GiB")
    mask = torch.empty(1, heads, n, n, dtype=torch.bool, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    key = torch.arange(n, device=device)[None, None, :]
    for start in range(0, n, 256):
        query = torch.arange(start, min(start + 256, n), device=device)[None, :, None]
        mask[0, :, start : start + 256] = task.allowed(head, query, key)
    groups = task.shape.heads // task.shape.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Beside a mask transformers repeats shared heads: no fused operator takes both.
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention


def _local_attention(task: Task) -> Attention:
    from local_attention import LocalAttention

    # Its window is a block; exact_windowsize cuts the keys of the block before to a distance of at most `window`.
    layer = LocalAttention(
        window_size=task.case.options["window"],
        causal=True,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    groups = task.shape.heads // task.shape.kv_heads
    return lambda q, k, v: layer(q, *(x.repeat_interleave(groups, 1) for x in (k, v)))


_numbers = itertools.count()


def _compiled(function: Any, *, fullgraph: bool = False) -> Any:
    """Compile a copy with a code object of its own: recompilations are counted, and limited, per code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, dynamic=False, fullgraph=fullgraph)


def _flex(task: Task) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, device = task.length, task.shape.device
    allowed = _predicate(task)
    heads = task.shape.heads if task.heads_differ else None
    size, most = 2 * (heads or 1) * n * n, (4 if device.type == "cpu" else 40) * GIB
    if size > most:
        raise Unavailable(
            f"create_block_mask over {heads or 1} x {n} x {n} pairs is beyond the suite's {most // GIB} GiB"
        )
    # Eagerly it holds several n x n integers; compiled it evaluates all pairs as well, but keeps few.
    create: Any = create_block_mask if n <= 4096 else _compiled(create_block_mask)
    block_mask = create(allowed, None, heads, n, n, device=device.type)
    gqa = task.shape.gqa

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa)

    return _compiled(attention, fullgraph=True)


def _predicate(task: Task) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the pattern's predicate; lists of positions and drawn blocks become tables, as a user would write them."""
    causal, device = task.case.causal, task.shape.device
    if task.case.name in ("longformer", "global_tokens"):
        chosen = task.case.options["global_tokens" if task.case.name == "longformer" else "positions"]
        is_global = torch.zeros(task.length, dtype=torch.bool, device=device)
        is_global[[position for position in chosen if position < task.length]] = True
        window = task.case.options.get("window", 1)

        def listed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            near = ((q - k) < window) & ((k - q) < window)
            pairs = near | is_global[k]
            return pairs & (k <= q) if causal else pairs | is_global[q]

        return listed
    if task.case.name == "bigbird":
        block = task.case.options["block"]
        first = torch.arange(0, task.length, block, device=device)
        last = (first + block - 1).clamp(max=task.length - 1)
        table = torch.cat(
            [
                task.allowed(torch.tensor([[[head]]], device=device), last[:, None], first[None, :])
                for head in range(task.shape.heads)
            ]
        )

        def drawn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            pairs = table[h, q // block, k // block]
            return pairs & (k <= q) if causal else pairs

        return drawn
    return lambda b, h, q, k: task.allowed(h, q, k)


PEERS = (
    Peer(
        "SDPA with the pattern's mask",
        _written_mask,
        lambda task: True,
        note="a written n x n mask; shared heads are repeated",
        most={"cpu": 8192, "cuda": 32768},
    ),
    Peer(
        "FlexAttention, create_block_mask",
        _flex,
        lambda task: True,
        note="the mask is made beforehand and not timed",
        backward=("cuda",),
        most={"cpu": 16384, "cuda": 65536},
    ),
    Peer(
        "local-attention",
        _local_attention,
        lambda task: task.case.name == "sliding_window" and task.case.causal,
        exact=False,
        note="sees one key more than the window",
    ),
    Peer(
        "HF LongformerSelfAttention",
        longformer,
        lambda task: task.case.name == "longformer" and not task.case.causal,
        note="attention_window = 2 * window - 2, global tokens with the same projections; without its linear layers",
        most={"cpu": 16384, "cuda": 131072},
    ),
    Peer(
        "HF BigBirdBlockSparseAttention",
        bigbird,
        lambda task: task.case.name == "bigbird" and not task.case.causal,
        exact=False,
        note="draws other random blocks of the same number, in training mode; without its linear layers",
    ),
)
PEER_NAMES = tuple(peer.name for peer in PEERS)
