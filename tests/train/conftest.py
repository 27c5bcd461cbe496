import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse.train import AdaptationArguments, SparseTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))  # the tiny models of every architecture

TOKENIZER = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A random Llama of two layers with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Three documents, the first and the last long enough for samples of 64 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {
        "long.txt": "\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(300)),
        "short.txt": "import os\n",
        "other.txt": "\n".join(f"class C{i}:\n    value = {i * i}" for i in range(300)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in texts]


@pytest.fixture
def arguments(base_folder, text_files):
    def make(**changes):
        settings = {"pattern_options": {"window": 8}, "length": 64, "lora_r": 4, **changes}
        return AdaptationArguments(model=str(base_folder), text=text_files, **settings)

    return make


@pytest.fixture
def training(tmp_path):
    def make(output_dir=tmp_path / "run", **changes):
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            "seed": 1,
            **changes,
        }
        return SparseTrainingArguments(output_dir=str(output_dir), **settings)

    return make
