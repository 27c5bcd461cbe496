"""The script that trains the small models, for both architectures: a step learns, and what is exported loads."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in ("pretrain_attention", "pretrain_data", "pretrain_model", "pretrain_tiny"):
        if name != "pretrain_attention":  # it registers a name, which can be done once
            sys.modules.pop(name, None)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_steps_lower_the_loss_and_the_export_holds_the_weights(recipe, tmp_path, architecture):
    import pretrain_model
    import pretrain_tiny

    trainer = pretrain_model.Trainer(architecture, vocab_size=64, workers=1, seed=0)
    rows = np.random.default_rng(0).integers(3, 64, (2, 33))
    losses = [trainer.step(rows[:, :-1], rows[:, 1:].copy(), 1.0) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3

    class Stream:
        def state(self):
            return {}

    counters = {"architecture": architecture, "vocab_size": 64, "step": 6}
    pretrain_tiny.save_checkpoint(tmp_path, trainer, Stream(), counters)
    (tmp_path / "training_log.jsonl").write_text("{}\n")
    pretrain_tiny.export(tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    for name, weight in trainer.master.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(torch.bfloat16).float()), name
    assert json.loads((tmp_path / "out" / "TRAINING.json").read_text())["step"] == 6


def test_short_rows_of_learned_positions_begin_anywhere(recipe):
    import pretrain_model

    model = pretrain_model.Trainer("gpt2", vocab_size=64, workers=1, seed=0).model
    x = torch.zeros(64, 32, dtype=torch.long)
    places = pretrain_model._places(model, x)["position_ids"]
    assert (places.diff(dim=1) == 1).all() and places.min() >= 0 and places.max() < model.config.n_positions
    assert len(set(places[:, 0].tolist())) > 32
