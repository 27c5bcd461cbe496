"""The attention operators of transformers' Longformer and BigBird, fed with given query, key and value."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .task import Attention, Task, Unavailable

GIB = 2**30


class _Given(nn.Module):
    """Stands where a linear layer was: returns the first tokens of `value` [N, 1, E], as many as come in."""

    value: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value[: hidden.shape[0]].clone()  # the caller scales queries in place


def longformer(task: Task) -> Attention:
    """transformers' LongformerSelfAttention: a window to both sides, and global tokens."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    shape, n = task.shape, task.length
    window = 2 * (task.case.options["window"] - 1)
    globals_ = task.case.options["global_tokens"]
    if n % window or list(globals_) != list(range(len(globals_))):
        raise Unavailable(
            f"needs a multiple of {window} tokens, and the first ones as global tokens; got {n}"
        )
    config = LongformerConfig(
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0).to(shape.device, shape.dtype).eval()
    given = {name: _Given() for name in ("query", "key", "value")}
    for name, module in given.items():
        setattr(layer, name, module)
        setattr(layer, f"{name}_global", module)
    hidden = torch.empty(1, n, config.hidden_size, device=shape.device, dtype=shape.dtype)
    chosen = (torch.arange(n, device=shape.device) < len(globals_))[None]
    mask = chosen.to(shape.dtype) * 10000.0
    groups = shape.heads // shape.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, x in zip(given, (q, k, v), strict=True):
            x = x if name == "query" else x.repeat_interleave(groups, 1)
            given[name].value = x.permute(2, 0, 1, 3).flatten(2)
        out = layer(
            hidden,
            attention_mask=mask,
            is_index_masked=torch.zeros_like(chosen),
            is_index_global_attn=chosen,
            is_global_attn=True,
        )[0]
        return out.unflatten(2, (shape.heads, shape.head_dim)).transpose(1, 2)

    return attention


def bigbird(task: Task) -> Attention:
    """transformers' BigBirdBlockSparseAttention in training mode; in eval mode it draws no random blocks."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    shape, n, block = task.shape, task.length, task.case.options["block"]
    # It also returns the whole matrix of attention probabilities.
    size, most = shape.heads * n * n * shape.dtype.itemsize, (4 if shape.device.type == "cpu" else 32) * GIB
    if n % block or n < 11 * block:
        raise Unavailable(f"needs a multiple of {block} tokens, at least {11 * block}; got {n}")
    if size > most:
        raise Unavailable(
            f"its matrix of {shape.heads} x {n} x {n} probabilities is beyond the suite's {most // GIB} GiB"
        )
    config = BigBirdConfig(
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        block_size=block,
        num_random_blocks=3,
        max_position_embeddings=max(n, 4096),
        attention_probs_dropout_prob=0.0,
    )
    layer = BigBirdBlockSparseAttention(config, seed=0).train()
    real = torch.ones(1, n, device=shape.device, dtype=shape.dtype)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(real, block)
    groups = shape.heads // shape.kv_heads
    operator = layer.bigbird_block_sparse_attention
    # Some versions of transformers ask whether the probabilities are wanted.
    asks = "output_attentions" in inspect.signature(operator).parameters
    quiet = {"output_attentions": False} if asks else {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        sizes = (shape.heads, 3, shape.head_dim, block, block, 1, n, n)
        masks = (band, rows, columns, blocked, blocked)
        return operator(q, k, v, *masks, *sizes, 0, None, None, **quiet)[0].transpose(1, 2)

    return attention
