"""The recipe and its configs, run as a person runs them."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.evaluate.saved_results import read_results
from hf_sparse.hf import settings
from hf_sparse.plan import cost
from hf_sparse.train import AdaptationArguments, ConfigParser, SparseTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


def run(*command, timeout=180):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random model of one layer, and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(RECIPES / "tiny_base" / name, folder / "model" / name)
    (folder / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(500)), encoding="utf-8")
    return folder


def overrides(tiny, output):
    return [
        *("--model", str(tiny / "model"), "--text", str(tiny / "text.txt"), "--length", "64"),
        *("--output_dir", str(output), "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1"),
    ]


def test_accelerate_launch_trains_and_saves_an_adapter_with_its_pattern(tiny, tmp_path):
    done = run(
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"),
        *("recipes/finetune_lora.py", "--config", "recipes/sliding_window.yaml", *overrides(tiny, tmp_path)),
        *("--pattern_options", "{window: 16}"),
    )
    assert done.returncode == 0, done.stderr
    assert "sliding_window(window=16)" in done.stdout
    assert f"hf-sparse eval {tmp_path / 'adapter'}" in done.stdout
    assert "'loss'" in done.stdout, "progress is logged"
    assert (tmp_path / "checkpoint-2" / "complete.json").exists()
    model = hf_sparse.load(tmp_path / "adapter")
    assert settings(model).pattern == hf_sparse.SlidingWindow(16)


def test_a_mistake_is_one_sentence_and_status_2(tiny, tmp_path):
    done = run(
        *(sys.executable, "recipes/finetune_lora.py", "--config", "recipes/sliding_window.yaml"),
        *(*overrides(tiny, tmp_path / "out"), "--windw", "3"),
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument '--windw' on the command line. See --help for all names.\n"
    assert not (tmp_path / "out").exists()


PATTERNS = {
    "sliding_window": hf_sparse.SlidingWindow(128),
    "streaming_llm": hf_sparse.StreamingLLM(4, 124),
    "longformer": hf_sparse.Longformer(64, tuple(range(0, 2048, 32))),
    "sparse_transformer_fixed": hf_sparse.SparseTransformerFixed(128, 8),
    "sparse_transformer_strided": hf_sparse.SparseTransformerStrided(128),
    "bigbird": hf_sparse.BigBird(block=16, window_blocks=3, global_blocks=1, random_blocks=4),
    "strided": hf_sparse.Strided(8),
    "layered": hf_sparse.Layered(pattern=hf_sparse.SlidingWindow(96), dense_every=6),
    "calibrated": None,  # chosen by calibration, head by head
}


def test_every_config_is_understood_and_they_differ_in_their_pattern_alone():
    parser = ConfigParser((AdaptationArguments, SparseTrainingArguments))
    rest = []
    for path in sorted(RECIPES.glob("*.yaml")):
        arguments, training = parser.parse(["--config", str(path)])
        assert training.output_dir == f"runs/{path.stem}"
        chosen = hf_sparse.hf.pattern_file.settings_of(arguments.chosen_pattern()).pattern
        if PATTERNS[path.stem] is not None:
            assert chosen == PATTERNS[path.stem]
        densities = [cost(chosen, 2048, heads=8, layer=layer).density for layer in range(6)]
        assert sum(densities) / 6 <= 0.25, path.stem
        settings = {**arguments.as_json(), **training.to_dict()}
        for own in ("pattern", "pattern_options", "output_dir", "logging_dir"):
            settings.pop(own, None)
        rest.append(settings)
    assert len(rest) == len(PATTERNS) and all(settings == rest[0] for settings in rest)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.slow
def test_the_demo_writes_its_table_results_and_plot(tiny, tmp_path):
    config = LlamaConfig.from_pretrained(
        tiny / "model", max_position_embeddings=2048
    )  # both prompts are longer
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(RECIPES / "tiny_base" / name, tmp_path / "model" / name)
    done = run(
        *(
            sys.executable,
            "recipes/demo.py",
            "--model",
            str(tmp_path / "model"),
            "--output",
            str(tmp_path / "demo"),
        ),
        *("--steps", "2", "--documents", "5"),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "demo" / "table.md").read_text(encoding="utf-8")
    assert table in done.stdout
    head, _, dense, window, *_ = [line.split(" | ") for line in table.splitlines()]
    assert len(head) == len(dense) == len(window) == 7  # one prompt, of all its positions
    assert dense[:2] == ["| dense", "100.0%"] and window[0] == "| sliding_window(window=128)"
    assert float(dense[2]) > 0 and float(dense[3]) > 0 and float(window[3]) > 0
    saved = read_results(tmp_path / "demo")
    titles = [run["title"] for run in saved.figures["runs"]]
    pattern = "sliding_window(window=128)"
    assert titles[:2] == ["dense", pattern]
    assert titles[6:] == ["dense + adapter", f"{pattern} + adapter", "dense + control"]
    shown = {run["title"]: f"{run['perplexity']:.3f}" for run in saved.figures["runs"]}
    assert [dense[2], dense[3]] == [shown["dense"], shown["dense + control"]]
    assert [window[2], window[3]] == [shown[pattern], shown[f"{pattern} + adapter"]]
    assert set(saved.rows) == set(titles), "every sum is kept"
    (gap,) = saved.figures["gap_closed"]
    assert (gap["pattern"], gap["control"]) == (pattern, "the dense control")
    with open(tmp_path / "demo" / "prompts.csv", encoding="utf-8") as file:
        prompts = list(csv.DictReader(file))
    assert [prompt["run"] for prompt in prompts] == titles[:6]
    assert {prompt["tokens"] for prompt in prompts} == {"2048"}
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "The demo&#x27;s table" in page and "python recipes/demo.py" in page and "+ control" in page
    for name in ("loss_by_position", "quality_against_speed"):
        assert (tmp_path / "demo" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
