"""Tiny random models with an encoder and a decoder, their inputs, and the written mask of the decoder."""

import copy
import functools

import torch
import transformers
from tiny_models import VOCAB, tokens

from hf_sparse import Longformer, SlidingWindow, StreamingLLM, Strided

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
N, SOURCE = 23, 11
SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,  # not as many as the decoder has, nor as many heads
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
CLASSES = {
    "bart": "BartForConditionalGeneration",  # learned positions
    "mbart": "MBartForConditionalGeneration",
    "marian": "MarianMTModel",  # sinusoidal positions
    "pegasus": "PegasusForConditionalGeneration",
    "pegasus_x": "PegasusXForConditionalGeneration",  # its decoder says that it is not causal
    "blenderbot": "BlenderbotForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "plbart": "PLBartForConditionalGeneration",
}
PATTERNS = [
    SlidingWindow(window=4),
    StreamingLLM(sinks=2, window=5),
    Longformer(window=3, global_tokens=(0, 6)) | Strided(stride=5),
]


def randomized(model):
    with torch.no_grad():  # the default 0.02 makes attention nearly uniform: patterns would hardly show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


@functools.cache
def _build(name):
    model_class = getattr(transformers, CLASSES[name])
    torch.manual_seed(len(name))
    return randomized(model_class(model_class.config_class(**SIZES)))


def tiny_pair(name, implementation=None):
    model = copy.deepcopy(_build(name))
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def both_inputs(length=N, batch=2, padded=True):
    """Return ids of both sides; the second row of the encoder's is padded on the right."""
    mask = torch.ones(batch, SOURCE, dtype=torch.long)
    mask[-1, 8:] = int(not padded)
    return {
        "input_ids": tokens(batch, SOURCE, seed=1),
        "attention_mask": mask,
        "decoder_input_ids": tokens(batch, length, seed=2),
    }


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def written_mask(pattern, real):
    """Return the additive mask [B, 1, N, N] of the pattern for rows whose real tokens are contiguous."""
    batch, n = real.shape
    bias = torch.full((batch, 1, n, n), torch.finfo(torch.float32).min)
    for row in range(batch):
        places = real[row].nonzero().flatten()
        allowed = pattern.mask(len(places), len(places), causal=True)[0]
        block = torch.where(allowed, 0.0, bias[row, 0, : len(places), : len(places)])
        bias[row, 0, places[0] : places[-1] + 1, places[0] : places[-1] + 1] = block
    return bias
