"""Sequence parallelism by heads (DeepSpeed-Ulysses): two processes give what one gives, outputs and gradients.

Each holds a share of the tokens and, while it attends, all tokens of a share of the heads.
"""

import copy
import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_sparse
from hf_sparse.hf import hold_heads

WORLD, ROWS, TOKENS, HEADS = 2, 2, 48, 4
ALIKE = {
    "sliding_window": {"window": 7},
    "streaming_llm": {"sinks": 2, "window": 5},
    "longformer": {"window": 6, "global_tokens": (0, 11)},
    "sparse_transformer_strided": {"stride": 5},
}
PER_HEAD = hf_sparse.PerHead(tuple(hf_sparse.get_pattern(name, **options) for name, options in ALIKE.items()))
DIFFERENT = {
    "per_head": PER_HEAD,
    "bigbird": hf_sparse.get_pattern("bigbird", block=4, random_blocks=1),
    "grouped_heads": hf_sparse.get_pattern("grouped_heads", window=6, local_heads=3),
    "longformer": hf_sparse.get_pattern("longformer", window=4, dilation=(1, 1, 2, 3)),
}


class Exchange(torch.autograd.Function):
    """Part i of dim 0 goes to process i; its parts come back in the order of the processes."""

    @staticmethod
    def forward(ctx, tensor):
        given = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(given, tensor.contiguous())
        return given

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad.contiguous())


def all_tokens_of_some_heads(tensor):
    """[B, H, N / world, D] of this process's tokens to [B, H / world, N, D] of its heads."""
    apart = tensor.unflatten(1, (WORLD, -1)).movedim(1, 0)  # [world, B, H / world, N / world, D]
    return Exchange.apply(apart).movedim(0, 2).flatten(2, 3)


def some_tokens_of_all_heads(out):
    """[B, N, H / world, D] to [B, N / world, H, D]."""
    apart = out.unflatten(1, (WORLD, -1)).movedim(1, 0)
    return Exchange.apply(apart).movedim(0, 2).flatten(2, 3)


@contextmanager
def ulysses(name):
    """Put around a registered function what DeepSpeed's UlyssesSPAttentionHF does, as it does: without a mask."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def around(module, query, key, value, attention_mask, *args, **kwargs):
        places = [torch.empty_like(kwargs["position_ids"]) for _ in range(WORLD)]
        dist.all_gather(places, kwargs["position_ids"])
        kwargs["position_ids"] = torch.cat(places, 1)
        held = (all_tokens_of_some_heads(tensor) for tensor in (query, key, value))
        out, weights = attend(module, *held, None, *args, **kwargs)
        return some_tokens_of_all_heads(out).flatten(2), weights

    ALL_ATTENTION_FUNCTIONS[name] = around
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend


def llama(pattern, key_heads=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=key_heads)
    return hf_sparse.patch_model(LlamaForCausalLM(config), pattern)


def step(model, ids, places, weights):
    """Return the logits, and the gradients of their weighted sum."""
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
    (logits * weights).sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


def check(rank, pattern, *, key_heads=2, packed=False, checkpointed=False, told=False):
    whole = llama(pattern, key_heads)
    torch.manual_seed(1)
    ids, weights = torch.randint(64, (ROWS, TOKENS)), torch.randn(ROWS, TOKENS, 64)
    lengths = [(20, 9, 19), (30, 18, 0)] if packed else [(TOKENS,)] * ROWS
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    spread = copy.deepcopy(whole)
    want, gradients = step(whole, ids, places, weights)
    mine = slice(rank * TOKENS // WORLD, (rank + 1) * TOKENS // WORLD)
    if told:
        hold_heads(spread, rank * HEADS // WORLD)
    if checkpointed:
        spread.train().gradient_checkpointing_enable({"use_reentrant": False})
    with ulysses(spread.config._attn_implementation):
        got, own = step(spread, ids[:, mine], places[:, mine], weights[:, mine])
    torch.testing.assert_close(got, want[:, mine], atol=1e-5, rtol=1e-5)
    for part, entire in zip(own, gradients, strict=True):
        dist.all_reduce(part)
        torch.testing.assert_close(part, entire, atol=1e-4, rtol=1e-5)  # a sum over 6,144 weighted logits


def check_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        for name, options in ALIKE.items():
            for packed in (False, True):
                check(rank, hf_sparse.get_pattern(name, **options), packed=packed)
        window = hf_sparse.SlidingWindow(7)
        check(rank, window, key_heads=HEADS)
        check(rank, window, packed=True, checkpointed=True)
        for pattern in DIFFERENT.values():
            check(rank, pattern, told=True)
            with pytest.raises(
                ValueError, match=r"holds 2 of 4 query heads, nobody said which, .*hold_heads"
            ):
                check(rank, pattern)
        query = torch.randn(1, HEADS, 8, 8)
        tokens = DTensor.from_local(query, init_device_mesh("cpu", (WORLD,)), [Shard(2)])
        attend = ALL_ATTENTION_FUNCTIONS["sparse_sliding_window"]
        with pytest.raises(ValueError, match="context parallelism gives each process a part of the tokens"):
            attend(llama(window).model.layers[0].self_attn, tokens, tokens, tokens, None)
    finally:
        dist.destroy_process_group()


def test_two_processes_that_share_tokens_and_heads_give_what_one_gives(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes.spawn(check_all, (str(tmp_path),), WORLD)


@pytest.mark.parametrize("first", [-1, 4, True, 1.0])
def test_a_head_that_the_model_does_not_have_is_refused(first):
    with pytest.raises(ValueError, match="first must be the number of a query head, 0 to 3, got"):
        hold_heads(llama(hf_sparse.SlidingWindow(7)), first)


def test_heads_beyond_the_model_are_refused():
    model = llama(PER_HEAD)
    hold_heads(model, 3)
    query = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="holds 2 of 4 query heads, the first is said to be number 3"):
        ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](
            model.model.layers[0].self_attn, query, query, query, None
        )
