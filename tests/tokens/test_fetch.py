"""Files from a path, a web server and the hub; what is broken or of another checksum is refused and not kept."""

from __future__ import annotations

import hashlib
import http.server
import threading
import types
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from toto.runtime.errors import CheckpointError, ConfigError
from toto.tokens import fetch
from toto.tokens.fetch import local_copy

CONTENT = bytes(range(256)) * 10_000
ANSWER = types.SimpleNamespace(headers={}, request=None)
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """One file, good and bad."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
        elif self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/encoder.pkl")
            self.end_headers()
        elif self.path.startswith("/nonsense"):
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif self.path.startswith("/slow"):
            self.server.patience.wait(20)
        else:
            self.send_response(200)
            if not self.path.startswith("/unmeasured"):
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: 1_500_000 if self.path.startswith("/truncated") else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.asked, running.patience = [], threading.Event()
        running.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.patience.set()
        running.shutdown()
        thread.join()


def refusal(where: str, folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        local_copy(where, folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    return str(caught.value)


def test_a_path_is_itself(tmp_path):
    path = tmp_path / "a # b.pkl"
    path.write_bytes(CONTENT)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert local_copy(str(path), folder) == path
    assert local_copy(f"{path}#sha256={CHECKSUM.upper()}", folder) == path
    message = refusal(f"{path}#sha256={'0' * 64}", folder)
    assert f"{CHECKSUM[:12]}..., not {'0' * 12}..." in message
    assert path.exists()


@pytest.mark.parametrize("where", ["nowhere.pkl", "user/name", "", "no/such\0path", "x" * 300])
def test_missing_paths_are_said(tmp_path, where):
    assert "no such file" in refusal(where, tmp_path) or not where


def test_folders_are_no_files(tmp_path):
    assert "is a folder" in refusal(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "where",
    [
        "x.pkl#sha256=",
        "x.pkl#sha256=abc",
        f"x.pkl#sha256={CHECKSUM}0",
        f"x.pkl#sha256={CHECKSUM[:-1]}g",
        f"http://127.0.0.1/x#sha256:{CHECKSUM}",
        f"hf://user/name/x#{CHECKSUM}",
        "hf://user/name",
        "hf://user/name/",
        "hf://user//file",
        "ftp://127.0.0.1/x",
        "s3://bucket/x",
        "file:///etc/hostname",
    ],
)
def test_malformed_places_are_said(tmp_path, where):
    refusal(where, tmp_path, ConfigError)


@pytest.mark.parametrize("path", ["/encoder.pkl", "/moved/decoder.pkl", "/unmeasured/a%20b?x=1", "/"])
def test_downloads_are_whole_and_named_after_their_address(server, tmp_path, capsys, path):
    folder = tmp_path / "made" / "here"
    copy = local_copy(server.address + path, folder)
    assert copy.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [copy]
    assert copy.name.endswith(("-encoder.pkl", "-decoder.pkl", "-a_b", "-download"))
    assert f"downloading {copy.name.partition('-')[2]}: 2560000" in capsys.readouterr().err
    assert local_copy(f"{server.address}{path}#sha256={CHECKSUM}", folder) == copy


def test_a_download_is_used_again_where_its_checksum_is_known(server, tmp_path):
    where = f"{server.address}/encoder.pkl#sha256={CHECKSUM}"
    copy = local_copy(where, tmp_path)
    assert local_copy(where, tmp_path) == copy
    assert server.asked == ["/encoder.pkl"]
    copy.write_bytes(b"spoilt")
    assert local_copy(where, tmp_path).read_bytes() == CONTENT
    assert local_copy(f"{server.address}/other/encoder.pkl", tmp_path) != copy


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing.pkl", "the server says 404"),
        ("/truncated.pkl", "broke off after 1500000 of 2560000 bytes"),
        ("/nonsense.pkl", "can't be downloaded"),
        ("/slow.pkl", "timed out"),
        (f"/encoder.pkl#sha256={'0' * 64}", f"the SHA-256 is {CHECKSUM[:12]}..., not {'0' * 12}..."),
    ],
)
def test_bad_downloads_are_said_and_not_kept(server, tmp_path, monkeypatch, path, said):
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.5)
    message = refusal(server.address + path, tmp_path)
    assert said in message
    assert message.startswith(f"{server.address}{path.partition('#')[0]}: ")
    if "sha256" not in path:
        assert "or download it yourself and give the file" in message


@pytest.mark.parametrize(
    "where",
    [
        "http://127.0.0.1:1/x",
        "http://no-such-host.invalid/x",
        "http://127.0.0.1:port/x",
        "http://[::1/x",
        "http:///x",
        "http://127.0.0.1/a b",
        f"http://{'a' * 300}/x",
    ],
)
def test_unreachable_addresses_are_said(tmp_path, monkeypatch, where):
    monkeypatch.setenv("no_proxy", "*")
    assert "can't be downloaded" in refusal(where, tmp_path)


def test_files_of_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    cached = tmp_path / "cached"
    cached.write_bytes(CONTENT)
    asked = []
    monkeypatch.setattr(fetch, "hf_hub_download", lambda *args: asked.append(args) or str(cached))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert local_copy("hf://user/name/path/in/repo.ckpt", folder) == cached
    assert asked == [("user/name", "path/in/repo.ckpt")]
    assert local_copy(f"hf://user/name/repo.ckpt#sha256={CHECKSUM}", folder) == cached
    assert "the SHA-256 is" in refusal(f"hf://user/name/repo.ckpt#sha256={'0' * 64}", folder)
    assert cached.exists()


@pytest.mark.parametrize(
    "error",
    [
        RepositoryNotFoundError("404 Client Error.\nMore", response=ANSWER),
        RemoteEntryNotFoundError("no entry", response=ANSWER),
        LocalEntryNotFoundError("not in the cache"),
        OfflineModeIsEnabled("offline"),
        fetch.HTTPError("refused"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_what_the_hub_cannot_give_is_said(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(fetch, "hf_hub_download", fail)
    message = refusal("hf://user/name/file", tmp_path)
    assert message.startswith("hf://user/name/file: the hub can't give it: ")
    assert "check the address or the network" in message


def test_names_that_are_none_of_the_hub_are_said(tmp_path):
    assert "the hub can't give it" in refusal("hf://us er/na--me/file", tmp_path)
