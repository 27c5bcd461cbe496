"""A long prompt read in chunks needs hardly more memory than a short one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ = """
import resource, sys, torch, hf_sparse
from transformers import AutoModelForCausalLM
how, tokens = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("recipes/tiny_base").eval()
hf_sparse.patch_model(model, "sliding_window", window=1024)
ids = torch.randint(4, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
with torch.no_grad():
    model(ids[:, :64])
    before = peak()
    if how == "generate":
        model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=4096, pad_token_id=0)
    else:
        cache = hf_sparse.make_cache(model)
        for start in range(0, tokens, 4096):
            model(ids[:, start : start + 4096], past_key_values=cache, logits_to_keep=1)
print(peak() - before)
"""


def extra(how, tokens):
    """Return the KiB that reading takes on top of the loaded model."""
    command = [sys.executable, "-c", READ, how, str(tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["generate", "loop"])
def test_a_prompt_of_128k_tokens_peaks_where_one_of_16k_does(how):
    short, long = extra(how, 2**14), extra(how, 2**17)
    assert 0 < long <= 1.3 * short
