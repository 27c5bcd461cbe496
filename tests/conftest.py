"""What several tests need: a tokenizer and model folders small enough to be made on the spot."""

import argparse
import os

# No test may wait for a network; huggingface_hub reads this when it is imported, so the imports stand below.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = Path(os.__file__).read_text(encoding="utf-8")[:20_000] + "ä ö ü € 漢字 🙂\n"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, with <s>, </s> and <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    """A random Llama of two layers for the tokens of `tiny_tokenizer`, in eval mode; its weights are large enough that
    what a token may see changes its loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_model_folder(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with `tiny_model` and `tiny_tokenizer`, as save_pretrained writes it."""
    folder = tmp_path / "tiny_model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Six text files of different lengths."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"text{i}.txt")
        paths[-1].write_text(source[i * 800 : i * 800 + 300 + 60 * i], encoding="utf-8")
    return [str(path) for path in paths]


@pytest.fixture
def adapter_folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """An adapter of `tiny_model_folder` that remembers sliding_window(window=8)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import hf_sparse

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    hf_sparse.patch_model(model, "sliding_window", window=8)
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    hf_sparse.save_adapter(get_peft_model(model, config), tmp_path / "adapter")
    return tmp_path / "adapter"
