"""A model in which one head alone matters, and texts that this model wrote, so that it could not do better."""

from __future__ import annotations

import functools

import torch
from tiny_models import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WRITER = (1, 2)  # layer and head
LENGTH = 37


@functools.cache
def tokenizer():
    """Return a tokenizer of one token per word, so that texts come back as the tokens they were written from."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w2")


def writer():
    """Return a Llama whose heads give nothing, but for one that makes much of what it sees."""
    model = tiny("llama")
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            weight = layer.self_attn.o_proj.weight.view(32, 4, 8)
            others = [head for head in range(4) if (number, head) != WRITER]
            weight[:, others] = 0
        model.model.layers[1].self_attn.o_proj.weight.mul_(4)
        model.lm_head.weight.mul_(2)
    return model


@functools.cache
def texts(count=4):
    """Return texts that the dense model wrote, each of one window."""
    model = writer()
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((count, 1), 2)
    with torch.no_grad():
        for _ in range(LENGTH + 1):
            likely = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat((ids, torch.multinomial(likely, 1, generator=generator)), 1)
    return [" ".join(f"w{i}" for i in row[1:]) for row in ids.tolist()]
