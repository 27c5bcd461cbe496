"""hf-sparse generate: every mistake is one sentence on stderr and exit status 2, before a token is written."""

import io
import sys

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_sparse.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other

PATTERN = ("--pattern", "streaming_llm", "--sinks", "2", "--window", "10")
TEXT = "import os\n\ndef main(argv):\n    return os.path.join(argv[0], argv[1])\n"


def mistake(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-sparse: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "was saved without a pattern; name one with --pattern, or --pattern full"),
        (("--pattern", "full", "--pattern", "strided"), "runs one pattern, got 2"),
        (("--pattern", "full", "--window", "3"), "full has no option --window"),
        ((*PATTERN, "--max-new-tokens", "0"), "--max-new-tokens must be >= 1, got 0"),
        ((*PATTERN, "--prefill-chunk", "0"), "--prefill-chunk must be >= 1, got 0"),
        ((*PATTERN, "--top-k", "0"), "--top-k must be >= 1, got 0"),
        ((*PATTERN, "--top-p", "1.5"), "--top-p must be > 0 and <= 1, got 1.5"),
        ((*PATTERN, "--temperature", "0"), "--temperature must be > 0, got 0.0"),
        ((*PATTERN, "--temperature", "nan"), "--temperature must be > 0, got nan"),
        ((*PATTERN, "--seed", "-1"), "--seed must be between"),
        ((*PATTERN, "--file", "/nowhere.txt"), "not allowed with argument --prompt"),
        ((*PATTERN, "--stats", "--quiet"), "not allowed with argument"),
        ((*PATTERN, "--cache", "big"), "invalid choice: 'big'"),
    ],
)
def test_mistakes(tiny_model_folder, arguments, words, capsys):
    assert words in mistake(capsys, tiny_model_folder, "--prompt", TEXT, *arguments)


def test_mistakes_in_prompts(tiny_model_folder, monkeypatch, capsys):
    assert "/nowhere.txt does not exist" in mistake(
        capsys, tiny_model_folder, *PATTERN, "--file", "/nowhere.txt"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe".encode("latin1"))))
    assert "the prompt is not UTF-8" in mistake(capsys, tiny_model_folder, *PATTERN)
    assert "the prompt is not UTF-8" in mistake(capsys, tiny_model_folder, *PATTERN, "--prompt", "a\udce9")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "a dialogue has no end" in mistake(capsys, tiny_model_folder, *PATTERN, "--cache", "static")


def test_a_file_that_is_no_prompt(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, words in {"empty.txt": "empty.txt holds no text", "": "is a folder; name a text file"}.items():
        assert words in mistake(capsys, tiny_model_folder, *PATTERN, "--file", tmp_path / name)


def test_an_empty_prompt_without_bos(tiny_model_folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tiny_model_folder)
    assert "the prompt is empty" in mistake(capsys, tiny_model_folder, *PATTERN, "--prompt", "")


def test_a_model_that_cannot_see_keys_at_other_places_is_refused_with_the_option(
    tiny_model_folder, tiny_model, capsys
):
    tiny_model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_model.save_pretrained(tiny_model_folder)
    arguments = (tiny_model_folder, *PATTERN, "--prompt", TEXT, "--max-new-tokens", 2)
    assert "with --positions absolute" in mistake(capsys, *arguments)
    assert main(["generate", *map(str, arguments), "--positions", "absolute"]) == 0


def test_learned_positions_are_places_in_the_cache(tmp_path, tiny_tokenizer, capsys):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    arguments = (tmp_path, *PATTERN, "--prompt", TEXT, "--max-new-tokens", 60)
    assert main(["generate", *map(str, arguments)]) == 0
    assert "tokens kept" in capsys.readouterr().err
    assert "has learned 32 positions" in mistake(capsys, *arguments, "--positions", "absolute")
