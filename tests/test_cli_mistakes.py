"""The command line: every mistake is one sentence on stderr and exit status 2."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_sparse.cli import main
from hf_sparse.patterns import registry

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other


def mistake(capsys, *arguments):
    """Run a command that must fail, and return its one sentence."""
    texts = [] if "--text" in arguments or "eval" not in arguments else ["--text", __file__]
    assert main([str(argument) for argument in (*arguments, *texts)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("hf-sparse: error: ") and err.count("\n") == 1, err
    return err.removeprefix("hf-sparse: error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pattern", "longfromer"], r"unknown pattern 'longfromer'\. Did you mean 'longformer'\?"),
        (["--pattern", "strided", "--window", "8"], r"strided has no option --window.*--stride"),
        (["--window", "8"], r"--window is an option of a pattern, and there is no --pattern"),
        (["--pattern", "sliding_window", "--window", "0"], r"window must be >= 1.*got 0"),
        (["--pattern", "sliding_window", "--window", "many"], r"--window must be a whole number, got 'many'"),
        (["--pattern", "strided", "--stride", "0"], r"stride must be >= 1, got 0"),
        (["--pattern", "streaming_llm", "--sinks", "-1"], r"sinks must be >= 0, got -1"),
        (
            ["--pattern", "longformer", "--global-tokens", "1,x"],
            r"--global-tokens must be whole numbers separated by commas, got '1,x'",
        ),
        (["--pattern", "strided", "--anchor", "middle"], r"anchor must be .* got 'middle'"),
        (["--backend", "fast"], r"unknown backend 'fast'"),
        (["--length", "2"], r"--length must be a whole number >= 3 .*got 2"),
        (["--documents", "0"], r"--documents must be >= 1, got 0"),
        (["--seed", "-1"], r"--seed must be between 0 and 4294967295, got -1"),
        (["--seed", "9" * 23], r"--seed must be between 0 and 4294967295, got 9{23}"),
        (["--text", "a\0b"], r"'a.x00b' is no file name, it holds a null byte"),
        (["--output", "a\0b"], r"--output 'a.x00b' is no name of a folder"),
        (
            ["--pattern", "strided", "--pattern", "full", "--window", "8"],
            r"strided and full have no option --window; their options",
        ),
        (["--wndow", "3"], r"unrecognized arguments: --wndow 3; see: hf-sparse eval --help"),
        (["--pattern", "sliding_window||full"], r"'sliding_window\|\|full' names no pattern in one place"),
        (
            ["--pattern", "full|mine", "--reach", "3"],
            r"unknown pattern 'mine'\. A pattern .* --plugin FILE\.py",
        ),
        (["--pattern", "./none.json"], r"pattern file \./none\.json cannot be read \(No such file"),
        (["--plot"], r"--plot is about the output folder; name one with --output"),
        (["--report"], r"--report is about the output folder; name one with --output"),
        (["--overwrite"], r"--overwrite is about the output folder; name one with --output"),
        (["--mode", "fast"], r"invalid choice: 'fast'"),
        (["--step", "10"], r"--step 10 goes with --mode 'strided', got --mode 'full'"),
        (
            ["--mode", "strided", "--step", "40", "--length", "40"],
            r"--step must be below --length 40, got 40; for windows that do not overlap use --mode 'rolling'",
        ),
        (["--contexts", "64,x"], r"'64,x' is no list of lengths such as 512,1024,2048"),
        (["--contexts", "4096"], r"a context of 4096 tokens is beyond --length 2048"),
        (["--contexts", "256"], r"must hold more than the 256 that are scored; .* fewer --context-targets"),
        (["--contexts", "1"], r"--contexts must be a whole number >= 2"),
        (["--contexts", "300,300"], r"--contexts has one length twice: \[300, 300\]"),
        (["--context-targets", "8"], r"--context-targets 8 is of the context curve, and there is none"),
        (["--key-tokens", "4096"], r"--key-tokens 4096 is the short context .* larger --length, got"),
        (["--batch-size", "0"], r"--batch-size must be a whole number >= 1"),
        (
            ["--prefill-chunk", "8", "--batch-size", "2"],
            r"--prefill-chunk 8 reads one window .* got --batch-size 2",
        ),
        (["--mask-share", "2"], r"--mask-share must be in \(0, 1\], got 2.0"),
        (["--mask-share", "0.3"], r"--mask-share 0.3 is for encoders, this is a causal model"),
        (
            ["--key-tokens", "16", "--no-dense", "--pattern", "full"],
            r"--key-tokens 16 are found with dense attention",
        ),
        (["--no-bos", "--bos-each-window"], r"--bos-each-window with --no-bos: no window gets a BOS token"),
        (["--text", "/nowhere/a.txt"], r"/nowhere/a.txt does not exist"),
        (["--device", "quantum"], r"--device quantum is not usable"),
        (["--control", "/nowhere"], r"--control /nowhere holds no adapter_config.json"),
    ],
)
def test_mistakes_in_options(tiny_model_folder, arguments, expected, capsys):
    assert re.search(expected, mistake(capsys, "eval", tiny_model_folder, *arguments))


def test_mistakes_in_texts(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("größe".encode("latin1"))
    (tmp_path / "short.txt").write_text("a")
    for name, expected in {
        "empty": "2 tokens to score",
        "latin1": "is not UTF-8",
        "short": "2 tokens to score",
    }.items():
        path = tmp_path / f"{name}.txt"
        assert expected in mistake(capsys, "eval", tiny_model_folder, "--text", path)


def test_mistakes_in_models(tmp_path, tiny_model_folder, tiny_tokenizer, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing"
    assert f"there is no folder {missing}" in mistake(capsys, "eval", missing)
    assert "holds neither config.json nor adapter_config.json" in mistake(capsys, "eval", tmp_path / "empty")
    assert "is a file; give the model's folder" in mistake(capsys, "eval", __file__)
    monkeypatch.chdir(tmp_path)
    assert "there is no folder empty/run1" in mistake(capsys, "eval", "empty/run1")
    assert "the hub cannot be reached" in mistake(capsys, "eval", "no-such-organisation/no-such-model")
    assert "neither a folder nor a hub id" in mistake(capsys, "eval", "no such model")
    assert "the name of the model is empty, got ''" in mistake(capsys, "eval", "")

    weights = tiny_model_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{tiny_model_folder} cannot be loaded" in mistake(capsys, "eval", tiny_model_folder)
    weights.unlink()
    assert str(tiny_model_folder) in mistake(capsys, "eval", tiny_model_folder)
    weights.write_bytes(whole)
    for content in (b"{", b"[]", b"\xff\xfe", b'{"model_type": "zorg"}'):
        (tiny_model_folder / "config.json").write_bytes(content)
        text = mistake(capsys, "eval", tiny_model_folder)
        assert f"the config of {tiny_model_folder} cannot be loaded" in text


def test_a_tokenizer_that_is_broken_or_of_another_model_is_refused(tiny_model_folder, texts, capsys):
    command = ("eval", tiny_model_folder, "--text", *texts, "--length", "40")
    tokenizer = tiny_model_folder / "tokenizer.json"
    saved = tokenizer.read_bytes()
    for content in (b"{", None):
        if content is None:
            tokenizer.unlink()
        else:
            tokenizer.write_bytes(content)
        text = mistake(capsys, *command)
        assert f"the tokenizer of {tiny_model_folder} cannot be loaded" in text and "save_pretrained" in text
    tokenizer.write_bytes(saved)
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tiny_model_folder)
    text = mistake(capsys, *command)
    assert re.search(r"the tokenizer gives the token \d+, but LlamaForCausalLM knows only 0 to 49", text)


def test_a_checkpoint_with_missing_weights_is_not_filled_with_noise(tiny_model_folder, capsys):
    from safetensors.torch import load_file, save_file

    path = tiny_model_folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    text = mistake(capsys, "eval", tiny_model_folder)
    assert "lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj.weight" in text


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: BertForMaskedLM(
                BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
            ),
            "tokenizer has no mask token",
        ),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4)), "Bloom"),
    ],
    ids=["encoder", "unsupported"],
)
def test_architectures_that_cannot_be_measured(model, expected, tiny_tokenizer, texts, tmp_path, capsys):
    torch.manual_seed(0)
    model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["eval", tmp_path / "model", "--pattern", "full", "--text", *texts, "--length", "40"]
    assert re.search(expected, mistake(capsys, *arguments, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mistakes_in_adapters(adapter_folder, tiny_model_folder, tmp_path, capsys):
    command = ("eval", tiny_model_folder)
    assert "holds no adapter_config.json" in mistake(capsys, *command, "--adapter", tmp_path)
    assert "is an adapter itself" in mistake(capsys, "eval", adapter_folder, "--adapter", adapter_folder)
    weights = adapter_folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights} is corrupt" in mistake(capsys, "eval", adapter_folder)
    weights.unlink()
    assert f"adapter {adapter_folder} has no {weights.name}" in mistake(capsys, "eval", adapter_folder)
    weights.write_bytes(whole)
    config = adapter_folder / "adapter_config.json"
    described = config.read_text()
    config.write_text(described.replace('"LORA"', '"ZORG"'))
    for named in (("eval", adapter_folder), (*command, "--adapter", adapter_folder)):
        text = mistake(capsys, *named)
        assert f"adapter {adapter_folder} is of the type 'ZORG', which peft" in text and "update peft" in text
    config.write_text(described)

    sidecar = adapter_folder / "sparse_attention.json"
    saved = sidecar.read_text()
    sidecar.write_text("{")
    assert "sparse_attention.json" in mistake(capsys, "eval", adapter_folder)
    sidecar.unlink()
    assert "name one with --pattern" in mistake(capsys, "eval", adapter_folder)
    sidecar.write_text(saved)

    tiny_model_folder.rename(tmp_path / "moved")
    text = mistake(capsys, "eval", adapter_folder)
    assert "the base model of adapter" in text and f"hf-sparse eval BASE --adapter {adapter_folder}" in text
    (adapter_folder / "adapter_config.json").write_text("[]")
    assert "adapter_config.json must hold a JSON object" in mistake(capsys, "eval", adapter_folder)


def test_an_adapter_that_lacks_weights_is_refused(adapter_folder, capsys):
    from safetensors.torch import load_file, save_file

    path = adapter_folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, {"format": "pt"})
    assert f"adapter {adapter_folder} does not fit" in mistake(capsys, "eval", adapter_folder)


def test_output_that_cannot_be_written(tiny_model_folder, texts, tmp_path, capsys, monkeypatch):
    command = ("eval", tiny_model_folder, "--text", *texts, "--length", "30", "--output")
    assert "is a file; name a folder" in mistake(capsys, *command, texts[0])
    assert "is a file; name a folder" in mistake(capsys, *command, f"{texts[0]}/deeper")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written (Permission denied)" in mistake(capsys, *command, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupt_and_memory(monkeypatch, capsys):
    from hf_sparse.cli import patterns

    def raise_(error):
        def run(args):
            raise error

        monkeypatch.setattr(patterns, "run", run)
        return main(["patterns"])

    assert raise_(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "hf-sparse: interrupted\n"
    assert raise_(RuntimeError("CUDA out of memory. Tried to allocate")) == 2
    assert "use a smaller --length" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        raise_(RuntimeError("a bug"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["x"], r"unknown pattern 'x'"),
        (["full", "--length", "0"], r"--length must be between 1 and 128 tokens .*--png FILE.*, got 0"),
        (["full", "--length", "129"], r"up to 512 with --png FILE.*, got 129"),
        (
            ["full", "--length", "513", "--png", "a.png"],
            r"--length must be between 1 and 512 tokens, got 513",
        ),
        (["full", "--window", "3"], r"full has no option --window"),
        (
            ["full", "--lengths", "1024,x"],
            r"--lengths must be whole numbers separated by commas, got '1024,x'",
        ),
        (["full", "--lengths", "8,0"], r"--lengths must be numbers of tokens >= 1 .* got '8,0'"),
        (["full", "--heads", "0"], r"--heads must be >= 1, got 0"),
        (
            ["full", "--heads", "6", "--kv-heads", "4"],
            r"--heads must be a multiple of --kv-heads, got 6 and 4",
        ),
        (["full", "--head-dim", "-1"], r"--head-dim must be >= 1, got -1"),
        (
            ["full", "--heads", "split"],
            r"argument --heads: must be a whole number, got 'split'.*--pattern-heads",
        ),
        (["full", "--layer", "-1"], r"--layer must be >= 0 .*got -1"),
        (["full", "--seq-len", "0"], r"--seq-len must be >= 1, got 0"),
        (["full", "--heads", "200000", "--length", "24"], r"200000 heads of 24 tokens are too many to draw"),
        (["full", "--dtype", "int8"], r"argument --dtype: invalid choice: 'int8'"),
        (
            ["longformer", "--window", "4,8", "--layer", "2"],
            r"window has 2 entries and the model has 3 layers",
        ),
        (["longformer", "--dilation", "1,2", "--heads", "3"], r"dilation has 2 entries and the model has 3"),
        (["layered", "--layers", "6"], r"--layers of layered cannot be written .* JSON file"),
        (["full", "--png", "mask.jpg"], r"--png writes a PNG, and 'mask\.jpg' .*end it with \.png"),
        (["full", "--png", __file__ + "/a.png"], r"is a file; name a folder"),
        (["full", "--plugin"], r"argument --plugin: expected one argument"),
    ],
)
def test_show_refuses(arguments, expected, capsys):
    assert re.search(expected, mistake(capsys, "show", *arguments))


def test_heads_are_the_reason_where_the_number_of_layers_fits(tmp_path, capsys):
    per_head = {"per_head": [{"name": "full"}] * 3}
    (tmp_path / "p.json").write_text(json.dumps({"per_layer": [{"name": "full"}, per_head]}))
    assert "3 entries and the model has 5 query heads" in mistake(
        capsys, "show", tmp_path / "p.json", "--heads", 5
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", r"is not JSON \(Expecting"),
        (b"\xff\xfe", r"is not JSON"),
        (b"[" * 100_000, r"is not JSON"),
        (b"[]", r"holds no usable pattern: a saved pattern must be"),
        (b'{"union": []}', r"holds no usable pattern: a saved pattern must be"),
        (
            b'{"name": "sliding_window", "options": {"window": 0}}',
            r"holds no usable pattern: window must be >= 1",
        ),
        (
            b'{"per_layer": [{"name": "full"}, {"name": "mine"}]}',
            r"names the pattern 'mine'.*--plugin FILE\.py",
        ),
        (b'{"version": 9, "pattern": {"name": "full"}}', r"has version 9"),
    ],
)
def test_mistakes_in_a_pattern_file(content, expected, tmp_path, capsys):
    path = tmp_path / "pattern.json"
    path.write_bytes(content)
    text = mistake(capsys, "show", path)
    assert text.startswith(f"the pattern file {path} ") and re.search(expected, text)
    path.write_text('{"name": "full"}')
    text = mistake(capsys, "show", path, "--window", 3)
    assert text == f"--window goes with a named pattern; write it into the options of {path}"


PLUGIN = """
from dataclasses import dataclass
import hf_sparse

@hf_sparse.register_pattern("flawed")
@dataclass(frozen=True)
class Flawed(hf_sparse.Pattern):
    def allows(self, context, head, query, key):
        return {allows}
"""


def test_mistakes_in_plugins(tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    assert "there is no plugin file" in mistake(capsys, "patterns", "--plugin", path)
    assert "a plugin is a .py file" in mistake(capsys, "show", "full", "--plugin", tmp_path)
    for content, expected in {
        "x = 1\n": "registers no pattern",
        "x = (\n": "raises SyntaxError on line 1",
        "import no_such_module_at_all\n": "raises ModuleNotFoundError on line 1",
        PLUGIN.format(allows="key").replace("flawed", "full"): "pattern 'full' is already",
    }.items():
        path.write_text(content)
        assert expected in mistake(capsys, "patterns", "--plugin", path)
    for i, (allows, expected) in enumerate(
        {
            "(key * 1.0)": "returns a tensor of torch.float32 from allows",
            "key.nothing_like_that": "raises AttributeError in allows",
            "(key > key.max() - 3)": "allows must look at each pair alone",
        }.items()
    ):
        monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))
        registry._PATTERNS.pop("flawed", None)
        own = tmp_path / f"mine{i}.py"
        own.write_text(PLUGIN.format(allows=allows))
        assert expected in mistake(capsys, "show", "flawed", "--plugin", own)


def test_as_a_program_there_is_no_traceback(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "hf_sparse.cli", "eval", str(tmp_path / "missing"), "--pattern", "full"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"hf-sparse: error: there is no folder {tmp_path / 'missing'}; "
        "check the spelling, or give a hub id such as org/name.\n"
    )


def test_unknown_commands(capsys):
    assert mistake(capsys, "evaluate").startswith("argument COMMAND: invalid choice: 'evaluate'")
    assert "the following arguments are required: COMMAND" in mistake(capsys)
