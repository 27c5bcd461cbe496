"""hf-sparse eval beyond its defaults: modes, curves, going on, encoders, and the page of a report."""

import json
import os

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import hf_sparse
from hf_sparse.cli import main


def evaluate(capsys, *arguments):
    status = main(["eval", *map(str, arguments), "--quiet"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


@pytest.fixture
def command(tiny_model_folder, texts):
    return [tiny_model_folder, "--pattern", "sliding_window", "--window", 8, "--text", *texts, "--length", 60]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mode", "rolling"], {"mode": "rolling", "stride": None, "max_length": 60}),
        (["--mode", "strided", "--step", 20, "--batch-size", 3], {"stride": 20, "batch_size": 3}),
        (["--mode", "strided", "--no-bos-each-window"], {"stride": 30, "bos_each_window": False}),
        (["--no-bos", "--prefill-chunk", 16], {"prefix": "none", "prefill_chunk": 16}),
        (
            ["--contexts", "50,20", "--context-targets", 10, "--key-tokens", 16],
            {"contexts": [20, 50], "key_tokens": 16},
        ),
    ],
    ids=str,
)
def test_settings_reach_the_measurement(command, tmp_path, capsys, flags, expected):
    evaluate(capsys, *command, *flags, "--output", tmp_path)
    figures = json.loads((tmp_path / "results.json").read_text())
    assert expected.items() <= figures["config"].items()
    assert len(figures["runs"][1]["loss_by_context"]) == len(figures["config"]["contexts"])
    if figures["config"]["mode"] != "full":
        assert figures["text"]["truncated_tokens"] == 0


def test_an_evaluation_goes_on_and_another_one_is_refused(command, tmp_path, capsys):
    evaluate(capsys, *command, "--output", tmp_path / "whole")
    evaluate(capsys, *command, "--output", tmp_path / "cut")
    rows = (tmp_path / "cut" / "per_document.jsonl").read_bytes().splitlines(keepends=True)
    kept = [*rows[:4], rows[4][:30]]
    (tmp_path / "cut" / "per_document.jsonl").write_bytes(b"".join(kept))
    (tmp_path / "cut" / "results.json").unlink()
    evaluate(capsys, *command, "--output", tmp_path / "cut")
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    for figures in found:
        figures.pop("timing")
    assert json.dumps(found[0]) == json.dumps(found[1])
    again = (tmp_path / "cut" / "per_document.jsonl").read_bytes().splitlines(keepends=True)
    assert len(again) == len(rows) and set(kept[:4]) <= set(again)  # measured rows are kept, timing included

    assert main(["eval", *map(str, command), "--mode", "rolling", "--output", str(tmp_path / "cut")]) == 2
    assert 'holds other figures (mode: "full", now "rolling"' in capsys.readouterr().err
    assert (tmp_path / "cut" / "per_document.jsonl").read_bytes().splitlines(keepends=True) == again
    evaluate(capsys, *command, "--mode", "rolling", "--output", tmp_path / "cut", "--overwrite")
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["config"]["mode"] == "rolling"


def test_a_backend_on_the_command_line_replaces_the_saved_one(
    tiny_model, tiny_tokenizer, texts, tmp_path, capsys
):
    folder = tmp_path / "patched"
    hf_sparse.patch_model(tiny_model, "sliding_window", window=8, backend="torch").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    for flags, wanted in (([], "torch"), (["--backend", "reference"], "reference")):
        out = tmp_path / wanted
        evaluate(capsys, folder, "--text", *texts, "--length", 60, "--output", out, *flags)
        sparse = json.loads((out / "results.json").read_text())["runs"][1]
        assert {name.split("/")[0] for name in sparse["ran"]} == {wanted}
        probing = ["probe", folder, "--probe", "copy:block=8", "--lengths", 80, "--samples", 1, *flags]
        assert main([*map(str, probing), "--output", str(out / "probe"), "--quiet"]) == 0
        sparse = json.loads((out / "probe" / "probe.json").read_text())["runs"][1]
        assert {name.split("/")[0] for name in sparse["ran"]} == {wanted}


def test_a_model_that_cannot_is_told_the_option(tmp_path, tiny_tokenizer, texts, capsys):
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    command = ["eval", str(tmp_path / "gpt2"), "--text", *texts, "--length", "65"]
    assert main(command) == 2
    assert (
        "--length 65 is beyond the 64 positions of GPT2LMHeadModel; use --length 64"
        in capsys.readouterr().err
    )


def test_a_report_is_one_page(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    evaluate(capsys, *command, "--output", tmp_path, "--report")
    page = (tmp_path / "report.html").read_text()
    assert "sliding_window(window=8)" in page and "data:image/png;base64," in page
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".png")]


def test_documents_without_text_are_counted(command, tmp_path, capsys):
    for name, content in (("empty", ""), ("blank", " \n\t"), ("nul", "\0" * 50), ("one", "a")):
        (tmp_path / f"{name}.txt").write_text(content)
    more = [tmp_path / f"{name}.txt" for name in ("empty", "blank", "nul", "one")]
    out, _ = evaluate(capsys, *command, "--text", *more, "--output", tmp_path / "out")
    text = json.loads((tmp_path / "out" / "results.json").read_text())["text"]
    reasons = [skipped["reason"] for skipped in text["skipped_documents"]]
    assert reasons == ["no text"] * 3 + ["fewer than 2 tokens to score"]
    assert text["documents"] == 6 and "4 documents" in out


def test_an_encoder_is_measured_by_its_masked_tokens(tiny_tokenizer, texts, tmp_path, capsys):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token = "<s>", "</s>", "!"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    evaluate(
        capsys,
        *(tmp_path / "bert", "--pattern", "sliding_window", "--window", 4, "--text", *texts, "--length", 40),
        *("--output", tmp_path / "out"),
    )
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures["config"]["measure"] == "pseudo-log-likelihood"
    assert figures["runs"][1]["kv_cache"]["bytes"] is None and figures["runs"][1]["density"] < 0.5
