"""Stand-ins for the CUDA kernels, dense but true to what the kernels read, so that everything around them runs here."""

import torch


def run_kernel(query, key, value, block_mask, scale, softcap, want_lse):
    """FlexAttention as its kernels do it: mask_mod decides inside listed partial blocks, full ones count whole."""
    assert (query.shape[2], key.shape[2]) == block_mask.seq_lengths
    allowed = allowed_pairs(block_mask, *query.shape[:2])
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    out, lse = softmax(scores.masked_fill(~allowed, float("-inf")), value)
    return out, lse if want_lse else None


def softmax(scores, value):
    """Return the output and the log-sum-exp; rows without a key give 0 and -inf."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return weights @ value, lse


def allowed_pairs(block_mask, rows_of_batch, heads):
    """Return the pairs [B, H, Q, K] that a block mask holds; its lists for the backward pass must say the same."""
    q_len, k_len = block_mask.seq_lengths
    rows, keys = q_len // 128, k_len // 128
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, keys)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, keys)
    assert not (partial & full).any()
    if block_mask.q_indices is not None:
        assert torch.equal(listed(block_mask.q_num_blocks, block_mask.q_indices, rows).mT, partial)
        assert torch.equal(listed(block_mask.full_q_num_blocks, block_mask.full_q_indices, rows).mT, full)
    shape = (rows_of_batch, heads, q_len, k_len)
    batch, head, query, key = (torch.arange(n, dtype=torch.int32) for n in shape)
    mask = block_mask.mask_mod(batch[:, None, None, None], head[:, None, None], query[:, None], key)
    mask = mask.expand(shape)
    partial, full = (x.repeat_interleave(128, 2).repeat_interleave(128, 3) for x in (partial, full))
    return (partial & mask) | full


def listed(count, index, blocks):
    """Return lists of blocks as bool [B or 1, H or 1, n, blocks]; none may occur twice."""
    table = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.long)
    assert index.min() >= 0 and index.max() < blocks and count.dtype == index.dtype == torch.int32
    column = torch.where(torch.arange(index.shape[3]) < count[..., None], index.long(), blocks)
    table.scatter_add_(3, column, torch.ones_like(column))
    assert table[..., :blocks].max() <= 1
    return table[..., :blocks].bool()


def flash_forward(query, key, value, *, left, right, scale):
    """FlashAttention's window: the last query is level with the last key."""
    scores, value = _scores(query, key, value, left, right, scale)
    out, lse = softmax(scores, value)
    return out.transpose(1, 2), lse


def flash_backward(grad, query, key, value, out, lse, *, left, right, scale):
    """The kernels' backward pass: weights from the given log-sum-exp, one row sum from the given output."""
    shared = query.shape[2] // key.shape[2]
    scores, wide = _scores(query, key, value, left, right, scale)
    weights = (scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]).exp()
    g, o = grad.transpose(1, 2), out.transpose(1, 2)
    dscores = weights * (g @ wide.mT - (g * o).sum(-1, keepdim=True)) * scale
    k = key.transpose(1, 2).repeat_interleave(shared, 1)
    dq, dk, dv = dscores @ k, dscores.mT @ query.transpose(1, 2), weights.mT @ g
    dk, dv = (x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def aten_flash_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    """The operator itself, with what it demands of its arguments; a row without keys has log-sum-exp +inf."""
    _demands(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale)
    assert not return_debug_mask and not (is_causal and window_size_left >= 0)
    left, right = window_size_left, 0 if is_causal else window_size_right
    exact = torch.promote_types(query.dtype, torch.float32)
    wide = (x.to(exact) for x in (query, key, value))
    out, lse = flash_forward(*wide, left=left, right=right, scale=scale)
    empty = torch.empty(0, dtype=torch.uint64)
    return out.to(query.dtype), lse.masked_fill(lse == float("-inf"), float("inf")), empty, empty, empty


def aten_flash_backward(
    grad,
    query,
    key,
    value,
    out,
    lse,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    state,
    unused,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    """The operator itself; -inf in the log-sum-exp would make weights infinite."""
    _demands(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale)
    assert grad.shape == out.shape == query.shape and lse.shape == out.transpose(1, 2).shape[:3]
    assert grad.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    assert not (lse == float("-inf")).any() and state.dtype == torch.uint64 and len(state) == 2
    left, right = window_size_left, 0 if is_causal else window_size_right
    assert (
        lse.dtype == torch.promote_types(query.dtype, torch.float32)
        and grad.dtype == out.dtype == query.dtype
    )
    wide = (x.to(lse.dtype) for x in (grad, query, key, value, out))
    grads = flash_backward(*wide, lse, left=left, right=right, scale=scale)
    return tuple(x.to(query.dtype) for x in grads)


def _demands(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale):
    assert query.shape[3] == key.shape[3] == value.shape[3] and query.shape[3] % 8 == 0
    assert query.shape[2] % key.shape[2] == 0 and key.shape == value.shape
    assert (max_q, max_k) == (query.shape[1], key.shape[1]) and cum_seq_q is cum_seq_k is None
    assert dropout_p == 0.0 and isinstance(scale, float)
    for x in (query, key, value):
        assert x.stride(3) == 1 and x.storage_offset() % 8 == 0
        assert not any(step % 8 for n, step in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1)


def _scores(query, key, value, left, right, scale):
    assert left >= -1 and right >= -1 and query.shape[1] and key.shape[1]
    shared = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    level = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    place = torch.arange(k.shape[2])
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if left >= 0:
        allowed &= place >= level - left
    if right >= 0:
        allowed &= place <= level + right
    return (q @ k.mT * scale).masked_fill(~allowed, float("-inf")), v
