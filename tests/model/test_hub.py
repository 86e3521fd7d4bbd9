"""Models to and from a hub that is a folder here: the real client's calls, at their boundary."""

from __future__ import annotations

import fnmatch
import shutil
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

import toto
from toto.model import hub
from toto.model.config import ModelConfig
from toto.model.hub import push_to_hub
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_card, save_llama, save_model, weights_sha256
from toto.runtime.errors import CheckpointError, ConfigError

CARD = Card(passport={"kind": "x"}, sequence={"frames": 4, "rows": 3, "cols": 3, "stride": 4})
CONFIG = ModelConfig(vocab_size=60, width=32, layers=2, heads=2, mlp_hidden=48)


class LocalHub:
    """Repositories as folders, with the calls of `HfApi` and `snapshot_download` that are used."""

    def __init__(self, root: Path):
        self.root, self.private, self.fetched = root, {}, []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        self.private.setdefault(repo_id, bool(private))

    def model_info(self, repo_id):
        return types.SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        assert commit_message
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return types.SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    def snapshot_download(self, repo_id, *, allow_patterns):
        target = self.root / "cache" / repo_id
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                self.fetched.append(path.name)
        return str(target)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    running = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda **_: running)
    monkeypatch.setattr(hub, "snapshot_download", running.snapshot_download)
    return running


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture
def folder(model, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    save_llama(made, model, CARD, most_bytes=10_000)
    (made / "README.md").write_text("# It\n")
    return made


@pytest.mark.parametrize("form", ["llama", "toto"])
def test_what_is_pushed_is_loaded_by_its_name(local_hub, model, folder, tmp_path, form):
    if form == "toto":
        folder = tmp_path / "own"
        folder.mkdir()
        save_model(folder, model, CARD)
    assert push_to_hub(folder, "some/model") == "https://hub/some/model"
    (local_hub.root / "some" / "model" / "pytorch_model.bin").write_bytes(b"no")
    again = toto.load_model("some/model")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_card("some/model") == CARD
    assert weights_sha256("some/model") == weights_sha256(folder)
    assert not {"pytorch_model.bin", "README.md"} & set(local_hub.fetched)


def test_a_push_leaves_no_weights_of_the_one_before(local_hub, model, folder, tmp_path):
    push_to_hub(folder, "some/model")
    own = tmp_path / "own"
    own.mkdir()
    save_model(own, model, CARD)
    push_to_hub(own, "some/model")
    held = {path.name for path in (local_hub.root / "some" / "model").iterdir()}
    assert held == {"config.json", "model.safetensors", "README.md"}


def test_private_is_never_put_into_a_public_repository(local_hub, folder):
    push_to_hub(folder, "some/private", private=True)
    assert local_hub.private == {"some/private": True}
    push_to_hub(folder, "some/private", private=True)
    local_hub.create_repo("some/public", exist_ok=True)
    with pytest.raises(ConfigError, match="some/public: is public on the hub, and --private is asked for"):
        push_to_hub(folder, "some/public", private=True)
    assert not list((local_hub.root / "some" / "public").iterdir())


@pytest.mark.parametrize("name", ["model", "a/b/c", "", "some/mo del", "-/x", "../x", "some/" + "x" * 100])
def test_names_that_are_none_are_refused(local_hub, folder, name):
    with pytest.raises(ConfigError, match="is no name on the hub; write user/name"):
        push_to_hub(folder, name)
    assert not local_hub.root.exists()


def answer(status):
    return types.SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (HfHubHTTPError("401 Client Error.\nMore", response=answer(401)), "hf auth login"),
        (HfHubHTTPError("403 Forbidden", response=answer(403)), "hf auth login"),
        (HfHubHTTPError("500 Server Error", response=answer(500)), "check the network"),
        (OfflineModeIsEnabled("offline"), "check the network"),
        (hub.HTTPError("refused"), "check the network"),
        (ConnectionResetError(104, "Connection reset by peer"), "check the network"),
    ],
    ids=str,
)
def test_a_hub_that_takes_nothing_is_one_line(local_hub, folder, monkeypatch, error, remedy):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(local_hub, "upload_folder", fail)
    with pytest.raises(CheckpointError) as caught:
        push_to_hub(folder, "some/model")
    line = str(caught.value)
    assert line.startswith("some/model: the hub doesn't take it (")
    assert remedy in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        RepositoryNotFoundError("404 Client Error.\nMore", response=answer(404)),
        LocalEntryNotFoundError("not in the cache"),
        hub.HTTPError("refused"),
    ],
    ids=str,
)
def test_a_hub_that_gives_nothing_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"some/model: no such folder, and the hub can't give it \("):
        toto.load_model("some/model")


def test_a_repository_without_a_model_is_said(local_hub):
    local_hub.create_repo("some/empty", exist_ok=True)
    with pytest.raises(Exception, match="some/empty") as caught:
        toto.load_model("some/empty")
    assert isinstance(caught.value, toto.TotoError)
