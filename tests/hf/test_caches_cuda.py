"""Generation on a CUDA device, against the same model on the CPU; `make gpu-tests` runs it."""

import copy

import pytest
import torch
from tiny_models import tiny, tokens
from torch.testing import assert_close

import hf_sparse
from hf_sparse import Longformer, ReRoPE, SlidingWindow, StreamingLLM, Strided

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # of whatever versions the machine has
]
PATTERNS = [
    SlidingWindow(window=5),
    StreamingLLM(sinks=2, window=9),
    StreamingLLM(sinks=2, window=9, positions="cache"),
    Longformer(window=9, global_tokens=(0, 7)) | Strided(stride=4, anchor="absolute"),
    ReRoPE(window=6),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_padded_batch_decodes_as_on_the_cpu(pattern, monkeypatch):
    monkeypatch.setattr("hf_sparse.plan.held.SLACK", 8)
    model = hf_sparse.patch_model(tiny("llama").double(), pattern)
    there = copy.deepcopy(model).cuda()
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    found = []
    for own in (model, there):
        cache, parts, device = hf_sparse.make_cache(own), [], own.device
        with torch.no_grad():
            for start, stop in ((0, 21), (21, 30), *((n, n + 1) for n in range(30, 60))):
                chunk, seen = ids[:, start:stop].to(device), mask[:, :stop].to(device)
                parts.append(own(chunk, attention_mask=seen, past_key_values=cache).logits)
        found.append(torch.cat(parts, 1).cpu()[mask == 1])
    assert_close(found[1], found[0], atol=1e-9, rtol=1e-9)


def test_a_decoding_step_waits_for_nothing():
    model = hf_sparse.patch_model(tiny("llama").cuda(), "streaming_llm", sinks=2, window=9, positions="cache")
    cache, ids = hf_sparse.make_cache(model), tokens(1, 300).cuda()
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for n in range(100, 300):  # dropping and moving the base included
                model(ids[:, n : n + 1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.get_seq_length() == 300 and cache.kept <= 2 + 9 + 128
