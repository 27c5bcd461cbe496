"""hf-sparse merge: from an adapter to a model that every other command takes."""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.patterns import registry

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # hf_sparse.load


def test_a_merged_model_is_evaluated_as_its_adapter(adapter_folder, texts, tmp_path, capsys):
    output = tmp_path / "a model"
    assert main(["merge", str(adapter_folder), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert f"model     {output}" in out and "pattern   sliding_window(window=8)" in out
    assert "attn_implementation='sparse_sliding_window'" in out
    assert err == f"next: hf-sparse eval {shlex.quote(str(output))}\n"
    assert set(load_file(output / "model.safetensors")) == set(
        load_file(tmp_path / "tiny_model" / "model.safetensors")
    )
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        merged, apart = (hf_sparse.load(folder)(input_ids=ids).logits for folder in (output, adapter_folder))
    # x W + x A B is rounded otherwise than x (W + A B): in parts of the largest logit
    torch.testing.assert_close(merged, apart, atol=1e-5 * float(apart.abs().max()), rtol=0)
    assert main(["eval", str(output), "--text", *texts, "--length", "48", "--quiet"]) == 0
    assert re.search(r"sliding_window\(window=8\)", capsys.readouterr().out)

    assert main(["merge", str(adapter_folder), "--output", str(output)]) == 2
    assert re.search(r"exists; name another one, or replace it with --overwrite\n", capsys.readouterr().err)
    again = ["merge", str(adapter_folder), "--output", str(output), "--overwrite", "--dtype", "bfloat16"]
    assert main(again) == 0
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("adapter", "output", "message"),
    [
        ("tiny_model", "merged", r"tiny_model is no adapter folder: it holds no adapter_config\.json"),
        ("absent", "merged", r"absent is no adapter folder"),
        ("adapter", "adapter/merged", r"lie in one another; name a folder beside it"),
        ("adapter", "text0.txt", r"text0\.txt is a file; name a folder"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    adapter_folder, texts, tmp_path, capsys, adapter, output, message
):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["merge", str(tmp_path / adapter), "--output", str(tmp_path / output)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and re.search(message, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_pattern_of_ones_own_needs_its_plugin(adapter_folder, tmp_path, capsys):
    sidecar = adapter_folder / "sparse_attention.json"
    saved = json.loads(sidecar.read_text())
    saved["pattern"] = {"name": "every_other_2", "options": {}}
    sidecar.write_text(json.dumps(saved))
    command = ["merge", str(adapter_folder), "--output", str(tmp_path / "merged")]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "names the pattern 'every_other_2'" in err and "--plugin FILE.py" in err
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from dataclasses import dataclass\nimport hf_sparse\n\n"
        "@hf_sparse.register_pattern('every_other_2')\n@dataclass(frozen=True)\n"
        "class EveryOther(hf_sparse.Pattern):\n    '''Every other key.'''\n\n"
        "    def allows(self, context, head, query, key):\n        return (query - key) % 2 == 0\n"
    )
    known = dict(registry._PATTERNS)
    try:
        assert main([*command, "--plugin", str(plugin)]) == 0, capsys.readouterr().err
    finally:
        registry._PATTERNS.clear()
        registry._PATTERNS.update(known)
    out, err = capsys.readouterr()
    assert "sparse_every_other_2" in out and f"--plugin {plugin}" in err
