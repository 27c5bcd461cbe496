"""Learned sinks in a training: trained beside LoRA, in the adapter, in the merged model, and never in the teacher."""

import json

import pytest
import torch

import hf_sparse
from hf_sparse.hf import settings
from hf_sparse.hf.learned_sinks import NAME
from hf_sparse.train import add_lora, prepare, run
from hf_sparse.train.export import merge
from hf_sparse.train.model import load_patched


def sinks_in(model):
    return {key: weight for key, weight in model.named_parameters() if f".{NAME}." in key}


@pytest.mark.parametrize(
    "options",
    [{}, {"narrow_from": 32, "attention_weight": 0.5, "backend": "reference"}],
    ids=["plain", "narrowing"],
)
def test_a_training_moves_them_and_saves_them_with_the_pattern(arguments, training, tmp_path, options):
    trainer = prepare(arguments(learned_sinks=True, layers=[1], **options), training(learning_rate=0.05))
    trained = {key: weight for key, weight in sinks_in(trainer.model).items() if weight.requires_grad}
    assert len(trained) == 1 and all("layers.1.self_attn" in key for key in trained)
    before = {key: weight.detach().clone() for key, weight in trained.items()}
    folder = run(trainer)
    assert all((weight != before[key]).all() for key, weight in trained.items())
    assert json.loads((folder / "sparse_attention.json").read_text())["learned_sinks"] is True
    loaded, ids = hf_sparse.load(folder).eval(), torch.randint(4096, (2, 40))
    assert settings(loaded).learned_sinks
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, want)
    merged = hf_sparse.load(merge(folder, tmp_path / "merged")).eval()
    assert settings(merged).learned_sinks and len(sinks_in(merged)) == 1
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "sinks     learned" in card and "or, which gives the same" not in card


def test_the_teacher_has_none(arguments, training):
    trainer = prepare(arguments(learned_sinks=True), training())
    with torch.no_grad():
        for weight in sinks_in(trainer.model).values():
            weight.fill_(50.0)  # what is left of every head is nothing
    ids = torch.randint(4096, (1, 30))
    states, outputs = trainer.objective.teacher.read({"input_ids": ids}, True)
    plain = hf_sparse.unpatch_model(trainer.model.get_base_model())
    with torch.no_grad(), trainer.model.disable_adapter():
        want = plain.model(ids).last_hidden_state
    torch.testing.assert_close(states.hidden, want, atol=1e-5, rtol=1e-5)
    assert all(out.abs().max() > 1e-3 for out in outputs)


def test_the_dense_control_gets_none_and_a_model_without_the_option_neither(arguments):
    for options in ({"learned_sinks": True, "dense_control": True}, {}):
        model, _ = load_patched(arguments(**options), 64)
        assert not sinks_in(model) and not sinks_in(add_lora(model, arguments(**options)))
