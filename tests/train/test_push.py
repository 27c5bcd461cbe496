"""Pushed adapters: the finished folder alone goes to the hub, and what would keep it from going is said before."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from hf_sparse.train import prepare
from hf_sparse.train.export import check_push, push


def test_pushing_uploads_the_adapters_folder_alone(training, tmp_path, monkeypatch):
    calls = []

    class Address(str):
        repo_id = "me/run"

    def create(api, repo_id, **kwargs):
        calls.append(("create", api.token, repo_id, kwargs))
        return Address("https://hub/me/run")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(
        HfApi, "create_branch", lambda _, *args, **kwargs: calls.append(("branch", args, kwargs))
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **kwargs: calls.append(("upload", kwargs)))
    wanted = training(hub_private_repo=True, hub_token="hf_x")
    assert push(tmp_path / "run" / "adapter", wanted) == "https://hub/me/run"
    (_, token, name, asked), (_, sent) = calls
    assert (token, name, asked) == ("hf_x", "run", {"private": True, "exist_ok": True})
    assert sent["folder_path"] == str(tmp_path / "run" / "adapter") and sent["repo_id"] == "me/run"
    assert sent["revision"] is None
    calls.clear()
    push(tmp_path, training(hub_model_id="org/other", hub_revision="v2"))
    (_, _, name, _), (_, *branch), (_, sent) = calls
    assert name == "org/other" and branch == [("me/run",), {"branch": "v2", "exist_ok": True}]
    assert sent["revision"] == "v2"

    def fails(_, **_kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr(HfApi, "upload_folder", fails)
    with pytest.raises(ValueError, match=r"adapter is in .*, and could not be pushed .*the line is dead"):
        push(tmp_path, wanted)


def test_what_would_keep_a_push_from_working_is_said_before(training, tmp_path, monkeypatch):
    def says(error):
        def whoami(_self):
            if error is not None:
                raise error

        monkeypatch.setattr(HfApi, "whoami", whoami)

    says(None)
    check_push(training(hub_model_id="org/name"), "org/base")
    check_push(training(), "org/base")
    for name in ("a/b/c", "org/a b"):
        with pytest.raises(ValueError, match="needs the name of a repository on the hub, got '"):
            check_push(training(hub_model_id=name), "org/base")
    with pytest.raises(ValueError, match="got 'a b'; give hub_model_id"):
        check_push(training(tmp_path / "a b"), "org/base")
    says(LocalTokenNotFoundError("no token"))
    with pytest.raises(ValueError, match=r"push_to_hub to run needs a token .* hf auth login"):
        check_push(training(), "org/base")
    says(ConnectionError("down"))
    with pytest.raises(ValueError, match=r"the hub cannot be reached \(down\)"):
        check_push(training(), "org/base")


def test_an_adapter_of_a_folder_is_not_pushed(arguments, training, tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", lambda _self: None)
    wanted = training(push_to_hub=True, hub_model_id="org/name")
    with pytest.raises(
        ValueError, match=r"base is the folder .*base.* of this machine; name the model by its hub id"
    ):
        prepare(arguments(), wanted)
    assert not Path(wanted.output_dir).exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    with pytest.raises(ValueError, match="whose base is the folder org/base of this machine"):
        check_push(wanted, "org/base")
