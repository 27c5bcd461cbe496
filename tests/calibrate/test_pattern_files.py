"""A file with a pattern stands wherever a pattern does, and one made for another model is named with what it is for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import PerHead, PerLayer, SlidingWindow, load_pattern, patch_model, patched, save_pattern
from hf_sparse.cli import main
from hf_sparse.documents import Document
from hf_sparse.evaluate import perplexity
from hf_sparse.hf import SparseSettings, settings, settings_to_json
from hf_sparse.patterns import pattern_to_json
from hf_sparse.patterns.full import Full

ROOT = Path(__file__).resolve().parents[2]
WINDOW = SlidingWindow(4)
# what a calibration of `tiny_model` (2 layers of 4 heads) gives
CALIBRATED = PerLayer((PerHead((WINDOW, Full(), WINDOW, SlidingWindow(9))), WINDOW))


@pytest.fixture
def file(tmp_path):
    return save_pattern(CALIBRATED, tmp_path / "pattern.json")


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(3, 400, (1, 40))).logits


def test_a_pattern_comes_back_and_the_file_holds_settings(file):
    assert load_pattern(file) == load_pattern(str(file)) == CALIBRATED
    stored = json.loads(file.read_text())
    assert stored == settings_to_json(SparseSettings(CALIBRATED)) and set(stored) == {
        "version",
        "pattern",
        "layers",
        "backend",
    }
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("spelled", [str, Path])
def test_a_model_is_patched_from_a_file(tiny_model, file, spelled):
    with patched(tiny_model, CALIBRATED):
        expected = logits(tiny_model)
    dense = logits(tiny_model)
    with patched(tiny_model, spelled(file)):
        assert torch.equal(logits(tiny_model), expected)
    assert torch.equal(logits(tiny_model), dense) and not torch.allclose(dense, expected)
    assert settings(patch_model(tiny_model, spelled(file))) == SparseSettings(CALIBRATED)


def test_layers_and_backend_are_those_of_the_file_unless_given(tiny_model, tmp_path):
    whole = SparseSettings(WINDOW, layers=(1,), backend="reference")
    file = save_pattern(whole, tmp_path / "whole.json")
    assert settings(patch_model(tiny_model, file)) == whole
    given = settings(patch_model(tiny_model, file, layers=[0], backend="torch"))
    assert given == SparseSettings(WINDOW, layers=(0,), backend="torch")
    with pytest.raises(ValueError, match=r"whole\.json has its pattern in layers \[1\] alone"):
        load_pattern(file)
    with pytest.raises(ValueError, match="options window go with a pattern name"):
        patch_model(tiny_model, file, window=3)
    with pytest.raises(ValueError, match="layers must be a list of layer indices"):
        patch_model(tiny_model, file, layers={(0, 1): "full"})


def test_the_config_of_a_patched_model_and_a_plain_pattern_are_files_too(tiny_model, tmp_path):
    patch_model(tiny_model, CALIBRATED).save_pretrained(tmp_path / "saved")
    assert load_pattern(tmp_path / "saved" / "config.json") == CALIBRATED
    (tmp_path / "plain.json").write_text(json.dumps(pattern_to_json(CALIBRATED)))
    assert load_pattern(tmp_path / "plain.json") == CALIBRATED


HEADS = PerHead((WINDOW,) * 3)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (PerLayer((WINDOW,) * 3), "was made for 3 layers, and"),
        (HEADS, "was made for 3 query heads, and"),
        (PerLayer((WINDOW, HEADS, WINDOW)), "was made for 3 layers of 3 query heads, and"),
        (PerLayer((WINDOW, HEADS)), "was made for 2 layers of 3 query heads, and"),
    ],
    ids=["layers", "heads", "both", "heads-in-layers"],
)
def test_a_file_for_another_model_is_named(
    tiny_model, tiny_model_folder, tiny_tokenizer, tmp_path, capsys, pattern, expected
):
    file = save_pattern(pattern, tmp_path / "other.json")
    expected = (
        f"the pattern file {file} {expected} LlamaForCausalLM has 2 layers of 4 query heads; give a file"
    )
    dense = logits(tiny_model)
    for attempt in (
        lambda: patch_model(tiny_model, file),
        lambda: patched(tiny_model, str(file)).__enter__(),
        lambda: perplexity(tiny_model, tiny_tokenizer, ["some text " * 20], max_length=32, patterns=[file]),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            attempt()
        assert torch.equal(logits(tiny_model), dense)
    text = tmp_path / "text.txt"
    text.write_text("some text " * 20)
    for command in (["eval", "--text", text], ["probe", "--lengths", "80"], ["generate", "--prompt", "a"]):
        arguments = [command[0], tiny_model_folder, "--pattern", file, *command[1:]]
        assert main(list(map(str, arguments))) == 2
        assert expected in capsys.readouterr().err


def test_what_else_does_not_fit_names_the_file(tiny_model, tmp_path):
    file = save_pattern(SparseSettings(WINDOW, layers=(5,)), tmp_path / "far.json")
    with pytest.raises(
        ValueError, match=r"far\.json does not fit LlamaForCausalLM: layers must hold indices from 0 to 1"
    ):
        patch_model(tiny_model, file)
    with pytest.raises(ValueError, match=r"^layers must hold indices from 0 to 1"):
        patch_model(tiny_model, file, layers=[7])  # said by the caller, not the file
    with pytest.raises(ValueError, match=r"none\.json cannot be read \(No such file or directory\)"):
        patch_model(tiny_model, tmp_path / "none.json")


def test_the_message_of_a_file_of_something_else_is_short(tiny_model, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"format": 1, "gains": [[0.5] * 100] * 100}))
    with pytest.raises(ValueError, match=r"calibration\.json holds no usable pattern") as caught:
        hf_sparse.patch_model(tiny_model, path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_perplexity_of_a_file_is_that_of_its_pattern(tiny_model, tiny_tokenizer, file):
    documents = [Document("a", "import os\n" * 30)]
    found = [
        perplexity(tiny_model, tiny_tokenizer, documents, max_length=64, patterns=[pattern], dense=False)
        for pattern in (file, str(file), CALIBRATED)
    ]
    assert len({result.nats_per_token(result.runs[0]) for result in found}) == 1
    assert {result.runs[0].label for result in found} == {str(CALIBRATED)}


def test_checkpoints_and_adapters_keep_a_calibrated_pattern(tiny_model, tiny_model_folder, file, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    expected = logits(patch_model(tiny_model, file))
    tiny_model.save_pretrained(tmp_path / "saved")
    back = hf_sparse.load(tmp_path / "saved").eval()
    assert settings(back).pattern == CALIBRATED and torch.equal(logits(back), expected)

    model = patch_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), file)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    hf_sparse.save_adapter(adapted, tmp_path / "adapter")
    back = hf_sparse.load(tmp_path / "adapter").eval()
    assert settings(back).pattern == CALIBRATED and torch.equal(logits(back), logits(adapted))


IMPORTS = """
import sys

for first in ("import hf_sparse", "from hf_sparse.calibrate import SCORES", "import hf_sparse.calibrate.run"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_sparse"]:
        del sys.modules[name]
    exec(first)
    import hf_sparse, hf_sparse.calibrate.save
    from hf_sparse.calibrate import SCORES, calibrate
    from hf_sparse.calibrate.scores import Ablation

    assert hf_sparse.calibrate is calibrate and SCORES["ablation"] is Ablation, first
print("both")
"""


def test_the_function_and_the_package_of_one_name_are_both_there_whatever_is_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout.strip()) == (0, "both"), done.stderr
