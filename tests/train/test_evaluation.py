"""Held-out texts scored while a model is trained, and the best adapter kept."""

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse.documents import read_documents
from hf_sparse.evaluate import perplexity
from hf_sparse.evaluate.callback import FIGURES
from hf_sparse.hf import settings
from hf_sparse.train import prepare, run

WATCHED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}


def test_dense_and_sparse_figures_are_logged_and_are_those_of_the_harness(arguments, training, text_files):
    wanted = arguments(eval_text=text_files[:1], eval_length=48, narrow_from=64, narrow_share=1.0)
    trainer = prepare(wanted, training(**WATCHED))
    run(trainer)
    logs = [entry for entry in trainer.state.log_history if "eval_sparse_nats_per_token" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    assert all("eval_loss" in entry for entry in trainer.state.log_history if "eval_runtime" in entry)
    # of the pattern alone, though the last step was trained beside a window
    assert [entry["window"] for entry in trainer.state.log_history if "window" in entry][-1] > 0
    result = perplexity(
        trainer.model.eval(),
        trainer.processing_class,
        read_documents(text_files[:1]),
        max_length=48,
        patterns=[settings(trainer.model)],
        prompt=False,
    )
    dense, sparse = (result.nats_per_token(run) for run in result.runs)
    assert logs[-1]["eval_dense_nats_per_token"] == pytest.approx(dense, rel=1e-5)
    assert logs[-1]["eval_sparse_nats_per_token"] == pytest.approx(sparse, rel=1e-5)


def test_evaluating_changes_no_weight(arguments, training, tmp_path, text_files):
    changes = {"lora_dropout": 0.2}
    plain = run(prepare(arguments(**changes), training(tmp_path / "a", max_steps=4)))
    watched = run(
        prepare(
            arguments(eval_text=text_files[:1], **changes),
            training(tmp_path / "b", **{**WATCHED, "max_steps": 4, "eval_steps": 1}),
        )
    )
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (plain, watched))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_adapter_is_kept(arguments, training, text_files):
    settings = training(
        **WATCHED,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sparse_nats_per_token",
        greater_is_better=True,  # it gets better from step to step, so that the first is to be kept
        save_total_limit=1,
    )
    trainer = prepare(arguments(eval_text=text_files[:1]), settings)
    folder = run(trainer)
    figures = {
        entry["step"]: entry["eval_sparse_nats_per_token"]
        for entry in trainer.state.log_history
        if "eval_sparse_nats_per_token" in entry
    }
    best = max(figures, key=figures.__getitem__)
    assert best != 6
    kept = sorted(path.name for path in folder.parent.glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", "checkpoint-6"})
    a, b = (
        load_file(path / "adapter_model.safetensors")
        for path in (folder, folder.parent / f"checkpoint-{best}")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, WATCHED, "eval_strategy='steps' needs texts that were not trained on; name them with eval_text"),
        ({"eval_text": ["{0}"]}, {}, "eval_text is given but eval_strategy is 'no'"),
    ],
)
def test_what_would_not_be_evaluated_is_refused(arguments, training, text_files, changes, settings, message):
    changes = {name: [text_files[0]] for name in changes}
    with pytest.raises(ValueError, match=message):
        prepare(arguments(**changes), training(**settings))


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_sparse_perplexity", False),
        ("sparse_nats_above_dense", False),
        ("eval_loss", False),
        (None, None),
    ],
)
def test_less_is_better_of_every_figure(training, metric, greater):
    assert training(**WATCHED, metric_for_best_model=metric).greater_is_better is greater


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True needs evaluations to choose by"),
        (
            {**WATCHED, "metric_for_best_model": "eval_perplexity"},
            "metric_for_best_model=eval_perplexity is not among what is measured; give one of eval_loss, eval_dense_",
        ),
    ],
)
def test_a_best_adapter_that_nothing_tells_is_refused(arguments, training, text_files, changes, message):
    wanted = arguments(eval_text=text_files[:1]) if "eval_strategy" in changes else arguments()
    with pytest.raises(ValueError, match=message):
        prepare(wanted, training(**changes))


def test_the_figures_that_may_choose_are_those_that_are_logged(arguments, training, text_files):
    trainer = prepare(arguments(eval_text=text_files[:1]), training(**WATCHED))
    assert set(trainer.adaptation.scores.figures(without_adapter=False)) == set(FIGURES)
