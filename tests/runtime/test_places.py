"""Files and folders at URLs, over memory, a disk, and a web server on this machine that fails on purpose."""

from __future__ import annotations

import copy
import io
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from web_server import FolderServer, serve

from toto.runtime import network
from toto.runtime.errors import ConfigError, PlaceError
from toto.runtime.places import Place, as_path, sha256_at
from toto.runtime.provenance import as_plain
from toto.runtime.remote import RemotePath

FILES = {"a/1.txt": b"one", "a/b/2.txt": b"two two", "top.bin": bytes(range(256)) * 40, "with space/ü%.txt": b"x"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WAITS", (0.0, 0.01, 0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    (tmp_path / "tree" / ".hidden").mkdir()
    (tmp_path / "tree" / ".hidden" / "x.txt").write_bytes(b"x")
    (tmp_path / "tree" / "a" / ".y.txt").write_bytes(b"y")
    return tmp_path / "tree"


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    pytest.importorskip("aiohttp")
    with serve(folder) as running:
        yield running


@pytest.fixture
def memory() -> str:
    url = f"memory://{uuid.uuid4().hex}"
    for name, content in {**FILES, "a/.y.txt": b"y"}.items():
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", content)
    return url


@pytest.fixture(params=["memory", "file", "path"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kinds = {"memory": f"memory://{uuid.uuid4().hex}/x", "file": f"file://{tmp_path}/o", "path": f"{tmp_path}/o"}
    return kinds[request.param]


def test_a_place_gives_back_what_was_put(empty: str, tmp_path: Path) -> None:
    local = tmp_path / "local.bin"
    local.write_bytes(b"first")
    place = Place.open(empty)
    assert place.list() == []
    assert not place.exists("deep/er/file.bin")
    place.put(local, "deep/er/file.bin")
    place.write_bytes(b"text", "note.txt")
    assert place.list() == ["deep/er/file.bin", "note.txt"]
    assert place.list("deep") == ["deep/er/file.bin"]
    assert place.read_bytes("deep/er/file.bin") == b"first"
    assert (place.size("note.txt"), place.exists("note.txt"), place.exists("deep")) == (4, True, False)
    local.write_bytes(b"the second one")
    place.put(local, "deep/er/file.bin")
    place.get("deep/er/file.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == b"the second one"
    place.remove("deep/er/file.bin")
    place.remove("deep/er/file.bin")
    assert place.list() == ["note.txt"]
    with pytest.raises(FileNotFoundError):
        place.read_bytes("deep/er/file.bin")


def test_a_server_without_whole_puts_gets_files_under_another_name_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("toto.runtime.places.WHOLE_OR_NOT", ())
    (tmp_path / "local").write_bytes(b"content")
    place = Place.open(f"memory://{uuid.uuid4().hex}")
    written: list[str] = []
    original = MemoryFileSystem.put_file

    def put_file(self: MemoryFileSystem, local: str, path: str, **options: object) -> None:
        written.append(path)
        original(self, local, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    for _ in range(2):
        place.put(tmp_path / "local", "sub/file")
    assert place.list() == ["sub/file"]
    assert place.read_bytes("sub/file") == b"content"
    assert all(path.rpartition("/")[2].startswith(".file.") for path in written)


def test_a_put_that_fails_leaves_nothing_and_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"content")
    place = Place.open(f"memory://{uuid.uuid4().hex}")
    failures = [ConnectionResetError("reset"), OSError("reset")]
    original = MemoryFileSystem.put_file

    def put_file(self: MemoryFileSystem, *words: object, **options: object) -> None:
        if failures:
            raise failures.pop()
        original(self, *words, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    place.put(tmp_path / "local", "file")
    assert place.read_bytes("file") == b"content"
    failures[:] = [ConnectionResetError("reset")] * 9
    with pytest.raises(PlaceError, match=r"other: can't be reached \(ConnectionResetError: reset\)"):
        place.put(tmp_path / "local", "other")
    assert place.list() == ["file"]


def test_names_of_urls_are_those_of_paths() -> None:
    for text in ("s3://bucket/a/b.tar.gz", "memory://bucket/a/b.tar.gz", "https://host:80/a/b.tar.gz?key=x/y"):
        path = RemotePath(text)
        assert (path.name, path.stem, path.suffix, path.parent.name) == ("b.tar.gz", "b.tar", ".gz", "a")
        assert str(path) == text
        assert (path.parent / "./c d.mp4").name == "c d.mp4"
        assert (path.parent / "../x/y.mp4").below(path.parent.parent) == "x/y.mp4"
        assert path / "memory://other/x" == RemotePath("memory://other/x")
        assert copy.copy(path) == path  # as it crosses to another process
    assert RemotePath("https://host/a%20b/%C3%BC.mp4").parts[-2:] == ("a b", "ü.mp4")
    assert str(RemotePath("https://host") / "a b") == "https://host/a%20b"
    assert RemotePath("s3://bucket").parent == RemotePath("s3://bucket")
    order = ["s3://b/a/z", "s3://b/a.x", "s3://b/b"]
    assert [str(path) for path in sorted(map(RemotePath, reversed(order)))] == order
    assert as_plain({"where": RemotePath("s3://b/a")}) == {"where": "s3://b/a"}
    assert as_path("file:///x/a%20b") == Path("/x/a b")


@pytest.mark.parametrize("kind", ["memory", "web"])
def test_a_listing_tells_names_and_sizes_and_opens_nothing(kind: str, memory: str, server: FolderServer) -> None:
    root = RemotePath(memory if kind == "memory" else server.url)
    found = {file.below(root): file.size for file in root.files()}
    assert found == {name: len(content) for name, content in FILES.items()}
    assert {method for method, name, _ in server.requests if name in FILES} <= {"HEAD"}
    for name, content in FILES.items():
        file = root / name
        assert file.is_file()
        assert file.read_bytes() == content
    assert (root / "a").is_dir()
    assert not (root / "a").is_file() or kind == "web"
    assert not (root / "no.txt").exists()


def test_random_reads_are_those_of_a_local_file(memory: str, server: FolderServer) -> None:
    content = random.Random(1).randbytes(1_000_003)
    (server.folder / "big").write_bytes(content)
    fsspec.filesystem("memory").pipe_file(f"{memory}/big", content)
    dice = random.Random(2)
    for url, ranges in ((memory, True), (server.url, True), (server.url, False)):
        server.ranges = ranges
        with RemotePath(f"{url}/big").open("rb") as file:
            assert isinstance(file, io.BufferedReader)
            for _ in range(60):
                place, count = dice.randrange(len(content) + 10), dice.choice([1, 512, 70_000])
                file.seek(place)
                assert file.read(count) == content[place : place + count]
            assert (file.seek(-3, io.SEEK_END), file.read()) == (len(content) - 3, content[-3:])


def test_reads_that_follow_each_other_take_few_requests(server: FolderServer) -> None:
    (server.folder / "big").write_bytes(bytes(8_000_000))
    with RemotePath(f"{server.url}/big").ranges() as file:
        server.requests.clear()
        while file.read(10_240):
            pass
        assert len(server.requests) < 10


def test_a_network_that_fails_is_tried_again(server: FolderServer) -> None:
    path = RemotePath(f"{server.url}/top.bin", size=len(FILES["top.bin"]))
    server.broken = 2
    assert path.read_bytes() == FILES["top.bin"]
    server.cut = 2
    assert path.read_bytes() == FILES["top.bin"]
    server.cut = 1
    with path.open("rb") as file:
        assert file.read() == FILES["top.bin"]
    server.broken = 99
    with pytest.raises(PlaceError, match=r"top.bin: can't be reached \(ClientResponseError: 503"):
        path.read_bytes()
    with pytest.raises(PlaceError):
        RemotePath(str(path)).is_file()
    with pytest.raises(PlaceError), path.open("rb") as file:
        file.read()
    server.down = True
    for action in (path.read_bytes, RemotePath(f"{server.url}/a").files, RemotePath(str(path)).exists):
        with pytest.raises(PlaceError, match="check the network and run the same command again"):
            action()


def test_what_is_missing_or_forbidden_is_said_at_once(server: FolderServer, memory: str) -> None:
    server.forbidden = {"top.bin"}
    for url, error in ((f"{server.url}/top.bin", PermissionError), (f"{server.url}/none", FileNotFoundError)):
        server.requests.clear()
        with pytest.raises(error):
            RemotePath(url).read_bytes()
        with pytest.raises(error):
            RemotePath(url, size=4).copy_to(io.BytesIO())
        assert len(server.requests) <= 4
        assert not RemotePath(url).is_file()
    with pytest.raises(FileNotFoundError):
        RemotePath(f"{memory}/none").files()


def test_checksums_are_those_of_the_content(server: FolderServer, folder: Path) -> None:
    assert sha256_at(RemotePath(f"{server.url}/top.bin")) == sha256_at(folder / "top.bin")


def test_a_place_too_slow_is_given_up_and_not_called_damaged(
    server: FolderServer, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "BESIDES_SECONDS", -1e9)
    for url in (server.url, memory):
        with pytest.raises(PlaceError, match=r"gives less than 0.25 MB a second"):
            RemotePath(f"{url}/top.bin").read_bytes()


def test_the_web_is_read_only(server: FolderServer) -> None:
    with pytest.raises(ConfigError, match="a web address can't be written to"):
        Place.open(server.url).write_bytes(b"", "x")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ConfigError, match=r"s3:// needs the package s3fs; pip install 'toto-video\[cloud\]'"):
        RemotePath("s3://bucket/x").read_bytes()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="Protocol not known: nope"):
        RemotePath("nope://bucket/x").is_file()
