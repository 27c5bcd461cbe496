"""A checkpoint that is not whole is passed over or refused by name; one that somebody added to is never read."""

import ast
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

import hf_sparse.train
from hf_sparse.train import last_complete_checkpoint
from hf_sparse.train.checkpoints import MANIFEST, checkpoint_to_resume, find_flaw
from hf_sparse.train.checkpoints.manifest import write_manifest

from .runs import names

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    MANIFEST,
    "optimizer.json",
    "optimizer.safetensors",
    "random_state_0.json",
    "random_state_0.safetensors",
    "scheduler.json",
    "sparse_attention.json",
    "trainer_state.json",
)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": os.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "first byte": lambda path: flip(path, 0),
    "a byte in the middle": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
}


def test_whatever_happens_to_a_file_the_one_before_is_used(run, caplog):
    newest, older = run / "checkpoint-2", run / "checkpoint-1"
    assert tuple(names(newest)) == FILES
    assert last_complete_checkpoint(run) == newest and not caplog.text
    for name in FILES:
        intact = (newest / name).read_bytes()
        for damage, apply in DAMAGES.items():
            if (name, damage) == (MANIFEST, "longer"):
                continue  # a space after JSON says nothing else
            apply(newest / name)
            caplog.clear()
            assert last_complete_checkpoint(run) == older, (name, damage)
            assert len(caplog.records) == 1, "one line for the one passed over"
            assert "checkpoint-2: " in caplog.text and name in caplog.text
            (newest / name).write_bytes(intact)
    assert last_complete_checkpoint(run) == newest


def test_every_byte_of_the_manifest_counts(run):
    """Other numbers, names, or settings in it are damage too, though it can be read."""
    path = run / "checkpoint-2" / MANIFEST
    for old, new in (
        ("safetensors", "safetensorz"),
        ('"length": 24', '"length": 25'),
        ('"engine": null', '"engine": 0'),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert last_complete_checkpoint(run) == run / "checkpoint-1"
        path.write_text(text)


def test_a_folder_named_is_refused_unless_whole_and_of_the_same_settings(run):
    newest = run / "checkpoint-2"
    assert checkpoint_to_resume(str(newest), str(run), {"length": 24}) == newest
    with pytest.raises(ValueError, match=r"was trained with length=24, not 32; give another --output_dir"):
        checkpoint_to_resume("auto", str(run), {"length": 32})
    flip(newest / "optimizer.safetensors", 0.5)
    with pytest.raises(
        ValueError, match=r"cannot resume from .*: optimizer.safetensors is not as it was written"
    ):
        checkpoint_to_resume(str(newest), str(run), {"length": 24})
    with pytest.raises(ValueError, match=r"cannot resume from .*nowhere: it has no readable complete.json"):
        checkpoint_to_resume(str(run / "nowhere"), str(run), {})
    for nothing in (None, "", "false", "False"):
        assert checkpoint_to_resume(nothing, str(run), {}) is None
    assert checkpoint_to_resume("auto", str(run / "nowhere"), {}) is None


@pytest.mark.parametrize("text", ['{"files": {}}', "[]", "1", '{"sha256": null, "files": 1}', "\0"])
def test_a_manifest_that_says_nothing_is_passed_over(tmp_path, text, caplog):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(text)
    assert last_complete_checkpoint(tmp_path) is None
    assert "passing over checkpoint" in caplog.text and MANIFEST in caplog.text


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def torch_archive(bomb, legacy=False):
    file = io.BytesIO()
    torch.save(bomb, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


PLANTED = {
    "optimizer.pt": lambda bomb: pickle.dumps(bomb, protocol=0),
    "training_args.bin": pickle.dumps,
    "adapter_model.bin": torch_archive,
    "rng_state.pth": lambda bomb: torch_archive(bomb, legacy=True),
    "x.pkl": pickle.dumps,
    "x.pickle": pickle.dumps,
    "x.ckpt": pickle.dumps,
    "x.npy": pickle.dumps,
    "x.npz": pickle.dumps,
    "x.joblib": pickle.dumps,
    "X.PT": pickle.dumps,
    "sub/folder/adapter_model.bin": pickle.dumps,
    "notes.txt": pickle.dumps,
    "harmless.json": lambda bomb: b"{}",
    ".hidden": lambda bomb: b"",
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("wanted", ["auto", "checkpoint-2"])
def test_a_file_that_somebody_put_there_is_refused_and_never_read(run, trainer, tmp_path, name, wanted):
    marker = tmp_path / "the pickle was read"
    path = run / "checkpoint-2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PLANTED[name](Bomb(marker)))
    folder = wanted if wanted == "auto" else str(run / wanted)
    with pytest.raises(ValueError) as caught:
        trainer("run", resume_from_checkpoint=folder)
    assert str(path) in str(caught.value) and "start from another checkpoint." in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["optimizer.json", "optimizer.safetensors", "adapter_model.safetensors", "a.pt"]
)
@pytest.mark.parametrize(
    "pickled", [pickle.dumps, torch_archive, lambda bomb: torch_archive(bomb, legacy=True)]
)
def test_a_pickle_is_refused_though_the_manifest_lists_it(run, trainer, tmp_path, name, pickled):
    marker, folder = tmp_path / "the pickle was read", run / "checkpoint-2"
    (folder / name).write_bytes(pickled(Bomb(marker)))
    write_manifest(folder, {"length": 24}, None)
    assert find_flaw(folder) is None
    with pytest.raises(
        ValueError, match=r"may be a pickle, and reading one runs whatever code is in it; delete"
    ):
        trainer("run").train("auto")
    assert not marker.exists()


def test_a_pickle_without_a_manifest_beside_it_is_refused_too(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "optimizer.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(ValueError, match=r"optimizer\.pt may be a pickle"):
        last_complete_checkpoint(tmp_path)


def test_a_link_out_of_the_checkpoint_is_refused(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint-2" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"link does not belong to its checkpoint"):
        last_complete_checkpoint(run)


def test_safetensors_that_begin_like_a_pickle_are_none(run):
    """Their first bytes are the length of the header: 1,152 bytes begin as protocol 4 does."""
    from safetensors.torch import save_file

    path = run / "checkpoint-2" / "adapter_model.safetensors"
    for size in range(1000, 1100):
        save_file({"x" * size: torch.zeros(1)}, path)
        if path.read_bytes()[:2] == b"\x80\4":
            break
    assert path.read_bytes()[:2] == b"\x80\4"
    write_manifest(run / "checkpoint-2", {"length": 24}, None)
    assert last_complete_checkpoint(run) == run / "checkpoint-2"


def test_what_an_engine_wrote_is_read_only_where_one_says_so(run, trainer):
    folder = run / "checkpoint-2"
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps({}))
    write_manifest(folder, {"length": 24}, "fsdp")
    with pytest.raises(ValueError, match=r"fsdp wrote, in part as pickles.*set trust_engine_state=True"):
        last_complete_checkpoint(run)
    assert last_complete_checkpoint(run, trust_engine_state=True) == folder
    with pytest.raises(ValueError, match=r"was written under fsdp and cannot be read without an engine"):
        trainer("run", trust_engine_state=True, resume_from_checkpoint="auto")
    (folder / "pytorch_model_fsdp_0" / "more.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"more\.pt does not belong to its checkpoint"):
        last_complete_checkpoint(run, trust_engine_state=True)


def test_no_file_of_the_training_imports_pickle_or_asks_torch_for_it():
    source = Path(hf_sparse.train.__file__).parent
    for path in source.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                imported = [ast.unparse(node)]
            for name in imported:
                unsafe = name.split(".")[0] in (
                    "pickle",
                    "cloudpickle",
                    "dill",
                    "joblib",
                    "marshal",
                    "shelve",
                )
                assert not unsafe and name not in ("torch.load", "torch.save"), f"{path}: {name}"
