"""hf-sparse lm-eval: the arguments of lm_eval with ours, the proof it prints and writes, and how it fails."""

import argparse
import functools
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.hf import SparseSettings, settings_to_json
from hf_sparse.patterns import registry

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'hf_sparse[lm-eval]'")
from lm_eval.tasks import TaskManager

TEXTS = [
    Path(argparse.__file__).read_text(encoding="utf-8")[i * 500 : i * 500 + 200 + 150 * i] for i in range(3)
]
PLUGIN = """
from dataclasses import dataclass
from hf_sparse import Pattern, register_pattern
@register_pattern("nearest_of_mine")
@dataclass(frozen=True)
class Nearest(Pattern):
    reach: int = 3
    def allows(self, context, head, query, key):
        return query - key < self.reach
"""


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    """Nothing is looked up or kept, and what lm_eval sets in the process is taken back."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda: None)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip
    # the thousands of tasks of its own take seconds to be listed
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.WARNING)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))


@pytest.fixture
def task(tmp_path):
    """A file with a task over TEXTS."""
    texts, file = tmp_path / "texts.jsonl", tmp_path / "local_texts.yaml"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    content = {
        "task": "local_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(texts)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [metric],
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


@pytest.fixture
def lm_eval_run(task, tiny_model_folder, capsys):
    """Run the command on the tiny model with these arguments; return its status, stdout and stderr."""

    def run(*arguments, model_args=""):
        known = f"pretrained={tiny_model_folder},max_length=64{model_args}"
        status = main(["lm-eval", "--tasks", task, "--device", "cpu", "--model_args", known, *arguments])
        return status, *capsys.readouterr()

    return run


def bits_per_byte(out):
    return float(re.search(r"bits_per_byte\s*\|[^|]*\|\s*([\d.]+)\|", out)[1])


def test_every_way_to_ask_for_a_pattern_gives_the_same(lm_eval_run, tmp_path):
    spelled = ("--pattern", "sliding_window", "--window", "8")
    stored = tmp_path / "pattern.json"
    stored.write_text('{"name": "sliding_window", "options": {"window": 8}}', encoding="utf-8")
    ways = [
        (spelled, ""),
        (("--model", "hf-sparse", *spelled), ""),
        (("--model", "hf", *spelled), ""),
        (("--pattern", str(stored)), ""),
        (("--model", "hf-sparse"), ",pattern=sliding_window,window=8"),
    ]
    found = set()
    for arguments, model_args in ways:
        status, out, err = lm_eval_run(*arguments, model_args=model_args)
        assert status == 0, err
        assert "pattern   sliding_window(window=8)\nlayers    0, 1\n" in out
        found.add(out[out.index("|") :])  # below what lm_eval says of its arguments: figures and proof
    assert len(found) == 1

    status, out, err = lm_eval_run("--pattern", "full")
    assert status == 0, err
    assert "density   1 of the pairs" in out and "nothing was left out at these lengths" in out
    assert bits_per_byte(out) != bits_per_byte(found.pop())


def test_the_implementation_of_a_plain_hf_model(lm_eval_run):
    status, out, err = lm_eval_run("--model", "hf", model_args=",attn_implementation=sparse_longformer")
    assert status == 0, err
    assert "pattern   longformer(window=512" in out and "density   1 of" in out


def test_options_that_are_lists(lm_eval_run):
    status, out, err = lm_eval_run(model_args=",pattern=longformer,window=8,global_tokens=[0,5]")
    assert status == 0, err
    assert "pattern   longformer(window=8, global_tokens=(0, 5)" in out


def test_an_adapter(lm_eval_run, adapter_folder):
    status, out, err = lm_eval_run(model_args=f",peft={adapter_folder}")
    assert status == 0, err
    assert "pattern   sliding_window(window=8)" in out


def test_a_union_a_backend_and_a_plugin(lm_eval_run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN, encoding="utf-8")
    patterns = ("--pattern", "nearest_of_mine|strided", "--reach", "2", "--stride", "5")
    status, out, err = lm_eval_run("--plugin", str(file), *patterns, "--backend", "reference")
    assert status == 0, err
    assert "pattern   nearest_of_mine(reach=2) | strided(stride=5," in out
    assert re.search(r"ran       [\d,]+ attention calls: reference/dense [\d,]+\n", out)


@pytest.mark.parametrize("name", ["results", "results.json"])
def test_the_proof_lies_beside_the_results(name, lm_eval_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in (1, 2):
        status, out, err = lm_eval_run("--pattern", "strided", "--stride", "5", "--output_path", f"to/{name}")
        assert status == 0, err
        proofs, results = (
            sorted(Path("to").rglob("sparse_attention_*.json")),
            sorted(Path("to").rglob("results_*.json")),
        )
        assert len(proofs) == len(results) == run
    proof, result = (json.loads(file.read_text(encoding="utf-8")) for file in (proofs[-1], results[-1]))
    assert proof.pop("results") == results[-1].name and proofs[-1].parent == results[-1].parent
    assert result["config"]["sparse_attention"] == proof
    assert proof["settings"] == settings_to_json(SparseSettings(hf_sparse.get_pattern("strided", stride=5)))
    assert proof["layers"] == [0, 1] and proof["calls"] == sum(proof["ran"].values()) > 0
    assert proof["density"] == proof["pairs"] / proof["dense_pairs"] < 1
    assert f"written   {proofs[-1]}" in out


def test_a_config_file_of_lm_eval(task, tiny_model_folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    content = {
        "model": "hf",
        "model_args": {
            "pretrained": str(tiny_model_folder),
            "max_length": 64,
            "pattern": "strided",
            "stride": 3,
        },
        "tasks": [task],
        "device": "cpu",
        "output_path": str(tmp_path / "out"),
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["lm-eval", "--config", str(file), "--limit", "1"]) == 0
    assert "pattern   strided(stride=3," in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("sparse_attention_*.json"))

    file.write_text(yaml.safe_dump(content | {"taks": []}), encoding="utf-8")
    assert main(["lm-eval", "--config", str(file)]) == 2
    assert "unknown key 'taks'; did you mean 'tasks'?" in capsys.readouterr().err
    file.write_text("- a list", encoding="utf-8")
    assert main(["lm-eval", "--config", str(file)]) == 2
    assert "YAML root must be a mapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "model_args", "message"),
    [
        ((), "", "nothing sparse was asked for: .* name one with --pattern"),
        ((), ",attn_implementation=sdpa", "nothing sparse was asked for"),
        (
            ("--model", "vllm"),
            "",
            "patterns run in models of transformers, got --model vllm; use --model hf-sparse",
        ),
        (("--pattern", "longformr"), "", "Did you mean 'longformer'"),
        (("--pattern", "strided", "--pattern", "full"), "", "lm-eval runs one pattern, got 2 of --pattern"),
        (("--pattern", "strided", "--window", "8"), "", "strided has no option --window"),
        (("--pattern", "HEADS"), "", r"the pattern file .*heads\.json was made for 3 query heads, and Llama"),
        (
            ("--pattern", "strided"),
            ",pattern=full",
            "--model_args has pattern=full, and there is --pattern strided",
        ),
        (("--window", "8"), "", "--window is an option of a pattern, and there is no --pattern"),
        (("--pattern", "strided", "--backend", "fast"), "", "invalid choice: 'fast'"),
        (("--pattern", "strided", "--taskz", "x"), "", "unrecognized arguments: --taskz x"),
        (("--pattern", "strided", "--tasks", "no_such_task"), "", "Tasks not found: no_such_task"),
        (("--pattern", "strided", "--output_path", "FILE"), "", "--output_path .* is a file; name a folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments, model_args, message, lm_eval_run, task, tmp_path):
    heads = hf_sparse.save_pattern(hf_sparse.PerHead((hf_sparse.Full(),) * 3), tmp_path / "heads.json")
    files = {"FILE": task, "HEADS": str(heads)}
    status, out, err = lm_eval_run(*(files.get(word, word) for word in arguments), model_args=model_args)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("hf-sparse: error: ") and re.search(message, line), line
    assert "density" not in out


def test_a_model_must_be_named(task, capsys):
    assert main(["lm-eval", "--pattern", "strided", "--tasks", task]) == 2
    assert "no model is named; add --model_args pretrained=NAME" in capsys.readouterr().err
    assert (
        main(["lm-eval", "--pattern", "strided", "--tasks", task, "--model_args", "pretrained=./none"]) == 2
    )
    assert "there is no folder ./none" in capsys.readouterr().err


def test_figures_that_are_not_sparse_are_refused(lm_eval_run, tmp_path):
    """Answers that lm_eval kept prove nothing; no results are written then."""
    kept = ("--pattern", "strided", "--use_cache", str(tmp_path / "kept"))
    assert lm_eval_run(*kept)[0] == 0
    status, out, err = lm_eval_run(*kept, "--output_path", str(tmp_path / "out"))
    assert status == 2
    assert "no attention call of LlamaForCausalLM went through strided" in err.splitlines()[-1]
    assert "bits_per_byte" not in out and not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_a_failure(lm_eval_run, tmp_path, monkeypatch):
    """lm_eval itself only logs a warning."""

    def full_disk(*args):
        raise OSError("No space left on device")

    assert lm_eval_run("--pattern", "strided", "--output_path", str(tmp_path / "out"))[0] == 0
    monkeypatch.setattr("lm_eval.loggers.evaluation_tracker.asdict", full_disk)
    status, _, err = lm_eval_run("--pattern", "strided", "--output_path", str(tmp_path / "out"))
    assert status == 2
    assert "lm_eval could not write its results to" in err.splitlines()[-1]


def test_without_lm_eval_it_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    assert main(["lm-eval", "--tasks", "wikitext"]) == 2
    assert "run: pip install 'hf_sparse[lm-eval]'" in capsys.readouterr().err


def test_help_shows_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit):
        main(["lm-eval", "--help"])
    out = capsys.readouterr().out
    assert all(option in out for option in ("--pattern PATTERN", "--window", "--model_args", "--log_samples"))


@pytest.mark.slow
def test_two_processes_of_accelerate(task, tiny_model_folder, tmp_path):
    """Without GPUs lm_eval repeats the run in every process, and the first one on the machine reports."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "hf_sparse.cli", "lm-eval", "--tasks", task, "--pattern", "strided", "--device", "cpu"]
    command += [
        "--model_args",
        f"pretrained={tiny_model_folder},max_length=64",
        "--output_path",
        str(tmp_path / "out"),
    ]
    env = os.environ | {
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    root = Path(hf_sparse.__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, timeout=280)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("density") == 1
    assert len(list((tmp_path / "out").rglob("sparse_attention_*.json"))) == 1
