"""Trials of tiny models, made without texts: random windows, nothing kept on disk."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import random_model, tokens
from tqdm import tqdm

from hf_sparse import Full, SlidingWindow, StreamingLLM
from hf_sparse.calibrate.costs import density_costs
from hf_sparse.calibrate.gated import Gated
from hf_sparse.calibrate.ledger import ROWS_FILE, Ledger
from hf_sparse.calibrate.objective import Objective
from hf_sparse.calibrate.trial import Trial
from hf_sparse.calibrate.units import units_of
from hf_sparse.calibrate.windows import IGNORED, Window
from hf_sparse.evaluate.head import ChunkedHead
from hf_sparse.evaluate.journal import Journal
from hf_sparse.evaluate.processes import Processes
from hf_sparse.evaluate.variants import base_of

CANDIDATES = (Full(), SlidingWindow(3), StreamingLLM(sinks=1, window=5))


def windows(masked=False, count=2, length=17):
    """Return random windows; of an encoder every fourth token is to be predicted."""
    made = []
    for seed in range(count):
        ids = tokens(1, length + 1, seed=seed)
        targets = ids[:, 1:].clone()
        if masked:
            targets[:, torch.arange(length) % 4 != 1] = IGNORED
        made.append(Window(ids[:, :-1], targets))
    return made


def gated(model, kind="head", candidates=CANDIDATES, backend="auto"):
    return Gated(model, units_of(base_of(model), kind), candidates, backend)


def trial(model, kind="head", candidates=CANDIDATES, objective="loss", chunk=5, **of_windows):
    """Return the trial of a model, its costs those of density."""
    head = ChunkedHead(model, chunk)
    read = windows(head.masked, **of_windows)
    judged = Objective(head, read, objective, torch.device("cpu"))
    ledger = Ledger(Journal(None, ROWS_FILE, {}), Processes(), len(read), tqdm(disable=True))
    own = gated(model, kind, candidates)
    made = Trial(
        own, judged, ledger, density_costs(base_of(model), own.units, candidates, read[0].ids.shape[1])
    )
    made.read_dense()
    return made


def random_choice(made, seed=0):
    """Return an int array [L, U] in which candidates are mixed."""
    return np.random.default_rng(seed).integers(0, len(CANDIDATES), made.units.shape)


def hybrid(layers):
    """Return a model of which every other layer has attention, the last one included."""
    kinds = ["linear_attention", "full_attention"] * (layers // 2)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
    linear = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2)
    linear |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    experts = {"num_experts": 0, "num_experts_per_tok": 1, "mlp_only_layers": list(range(layers))}
    options = {**sizes, **heads, **linear, **experts, "layer_types": kinds}
    return random_model("Qwen3NextForCausalLM", options)
