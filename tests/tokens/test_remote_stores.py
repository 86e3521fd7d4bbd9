"""Stores at URLs: read as a local copy is, through a cache that is bounded, checked, shared and survives a crash."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from web_server import FolderServer, serve

from toto.commands import shards as command
from toto.commands.parsing import parse_source
from toto.media.ledger import LedgerRow
from toto.runtime import cache as caching
from toto.runtime import network
from toto.runtime.cache import Cache
from toto.runtime.errors import ConfigError, PlaceError, StoreError
from toto.runtime.provenance import as_plain
from toto.runtime.remote import RemotePath
from toto.tokens.passport import Passport
from toto.tokens.shards import (
    StoredItem,
    TokenStore,
    finish_store,
    read_splits,
    write_ledger,
    write_shard,
    write_splits,
)
from toto.training.mixture import Mixture
from toto.training.source import SourceConfig

FRAMES, SHARDS = 40, 4
SHARD_BYTES = FRAMES * 16 * 16 * 2 + 128


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "WAITS", (0.0, 0.01))
    monkeypatch.setenv("TOTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOTO_CACHE_GB", "1")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    dice = np.random.default_rng(0)
    codes = [dice.integers(0, 64, (FRAMES, 16, 16), dtype=np.uint16) for _ in range(SHARDS)]
    entries = [write_shard(folder, number, [each], (16, 16)) for number, each in enumerate(codes)]
    items = [
        StoredItem(id=f"{n}.mp4", kind="video", label=f"c{n % 2}", first_frame=n * FRAMES, frame_count=FRAMES, fps=10.0,
                   stride=4) for n in range(SHARDS)
    ]  # fmt: skip
    write_ledger(folder, [LedgerRow(id=item.id, kind="video", status="ok", frames=FRAMES) for item in items])
    write_splits(folder, {item.id: "train" for item in items})
    passport = Passport(
        kind="test", weights_sha256="0" * 64, preprocessing="none", vocab_size=64, frame_size=(128, 128), grid=(16, 16)
    )
    finish_store(folder, passport=passport, stride=4, shards=entries, items=items, counts={"ok": SHARDS}, job={})
    return folder


@pytest.fixture
def url(local: Path) -> str:
    place = f"memory://{uuid.uuid4().hex}/store"
    for file in local.iterdir():
        fsspec.filesystem("memory").pipe_file(f"{place}/{file.name}", file.read_bytes())
    return place


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, piece by piece."""
    names: list[str] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, **options: object) -> bytes:
        names.append(path.rpartition("/")[2])
        return bytes(original(self, path, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return names


def all_codes(store: TokenStore) -> list[torch.Tensor]:
    return [store.codes(number) for number in range(len(store))]


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_a_remote_store_reads_as_its_copy_and_fetches_what_is_asked_for(
    local: Path, url: str, reads: list[str], tmp_path: Path
) -> None:
    near, far = TokenStore(local), TokenStore(url, verify="read")
    assert reads == ["manifest.json"]
    assert torch.equal(far.codes(2), near.codes(2))
    assert reads == ["manifest.json", "items.parquet", "frames-00002.npy"]
    assert all(torch.equal(a, b) for a, b in zip(all_codes(far), all_codes(near), strict=True))
    assert (far.table, far.sizes(), read_splits(far.folder)) == (near.table, near.sizes(), read_splits(local))
    assert len(kept(tmp_path / "cache")) == SHARDS + 1
    reads.clear()
    all_codes(TokenStore(url))
    assert reads == ["manifest.json"]


def test_the_cache_stays_within_its_bound_and_the_store_warns(
    local: Path, url: str, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_CACHE_GB", str(2.5 * SHARD_BYTES / 1e9))
    near = TokenStore(local)
    with pytest.warns(UserWarning, match="shards will be fetched again and again; set TOTO_CACHE_GB to more"):
        far = TokenStore(url)
    held = far.frames(0, FRAMES)
    for _ in range(2):
        for number in range(SHARDS):
            assert torch.equal(far.codes(number), near.codes(number))
            files = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()]
            assert sum(files) <= 2.5 * SHARD_BYTES
    assert reads.count("frames-00001.npy") == 2
    assert np.array_equal(held, near.frames(0, FRAMES)), "what was handed out stays readable"


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    here = Cache(tmp_path / "c", 250)
    contents = {name: name.encode() * 100 for name in "abcd"}
    gone: list[str] = []

    def hold(name: str) -> Path:
        content = contents[name]

        def fetch(file: io.BufferedIOBase, each: Callable[[bytes], object]) -> None:
            file.write(content)
            each(content)

        return here.hold(sha256(content).hexdigest(), fetch, size=lambda: 100, ending=".x", where=name,
                         let_go=lambda: gone.append(name))  # fmt: skip

    a = hold("a")
    hold("b")
    here.touch(sha256(contents["a"]).hexdigest())
    hold("c")
    assert (gone, a.read_bytes()) == (["b"], contents["a"])
    hold("d")
    assert gone == ["b", "a"]


def test_another_process_keeps_what_it_has_open(local: Path, url: str, tmp_path: Path) -> None:
    TokenStore(url).codes(0)
    cache = tmp_path / "cache"
    program = (
        "import fcntl, sys, pathlib\n"
        f"files = [open(path, 'rb') for path in pathlib.Path({str(cache)!r}).glob('*.npy')]\n"
        "[fcntl.flock(file, fcntl.LOCK_SH) for file in files]\n"
        "print(len(files), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        open_there = next(cache.glob("*.npy"))
        small = Cache(cache, 1)
        content = b"new"

        def fetch(file: io.BufferedIOBase, each: Callable[[bytes], object]) -> None:
            file.write(content)
            each(content)

        def let_go() -> None:
            pass

        small.hold(sha256(content).hexdigest(), fetch, size=lambda: 3, ending="", where="x", let_go=let_go)
        assert open_there.exists()
        assert not list(cache.glob("*.parquet")) or open_there.exists()
        other.communicate()


FETCHING = """
import hashlib, json, sys
from toto.runtime.remote import RemotePath
from toto.tokens.kept_files import KeptFiles
store = RemotePath(sys.argv[1])
shards = {shard["file"]: shard["sha256"] for shard in json.loads((store / "manifest.json").read_text())["shards"]}
kept = KeptFiles(store, shards)
print(all(hashlib.sha256(kept.file(name, int).read_bytes()).hexdigest() == shards[name] for name in shards))
"""
DYING = """
import os, pathlib, signal, sys
from toto.runtime.cache import Cache
def fetch(file, each):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
Cache(pathlib.Path(sys.argv[1]), 10**9).hold(sys.argv[2], fetch, size=lambda: 100, ending=".npy", where="x", let_go=int)
"""


def test_several_processes_fetch_each_file_once(local: Path) -> None:
    pytest.importorskip("aiohttp")
    with serve(local) as server:
        words = [sys.executable, "-c", FETCHING, server.url]
        several = [subprocess.Popen(words, stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(3)]
        assert [process.communicate(timeout=100)[0] for process in several] == [b"True\n"] * 3
        fetched = [name for method, name, _ in server.requests if method == "GET" and name != "manifest.json"]
        assert sorted(fetched) == [f"frames-{number:05d}.npy" for number in range(SHARDS)]


def test_a_process_that_is_killed_while_it_fetches_harms_nobody(local: Path, url: str, tmp_path: Path) -> None:
    store = TokenStore(url)
    name = store.checksums["frames-00000.npy"]
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path / "cache"), name], check=False)
    assert died.returncode == -9
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [f".{name}.npy.partial"]
    assert torch.equal(store.codes(0), TokenStore(local).codes(0))
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_a_crash_left_is_removed_and_never_used(local: Path, url: str, tmp_path: Path) -> None:
    store = TokenStore(url)
    name = store.checksums["frames-00000.npy"]
    partial = tmp_path / "cache" / f".{name}.npy.partial"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"half")
    assert torch.equal(store.codes(0), TokenStore(local).codes(0))
    assert not partial.exists()
    partial.write_bytes(b"half")
    Cache(tmp_path / "cache", 10**9)
    assert not partial.exists()


def test_a_flipped_bit_elsewhere_or_here_never_gets_through(local: Path, url: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    good = files.cat_file(f"{url}/frames-00001.npy")
    files.pipe_file(f"{url}/frames-00001.npy", good[:-1] + bytes([good[-1] ^ 1]))
    store = TokenStore(url)
    with pytest.raises(StoreError, match=r"frames-00001.npy: damaged: the SHA-256 is .*\.\.\., the manifest says"):
        store.codes(1)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 0
    with pytest.raises(StoreError, match=r"frames-00001.npy: damaged \(checksum of the manifest\)"):
        store.verify()
    files.pipe_file(f"{url}/frames-00001.npy", good)
    store.verify()
    path = store.file("frames-00001.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert torch.equal(TokenStore(url, verify="read").codes(1), TokenStore(local).codes(1))


def test_a_missing_shard_and_a_network_that_fails_are_told_apart(local: Path) -> None:
    pytest.importorskip("aiohttp")
    with serve(local) as server:
        store = TokenStore(server.url)
        (local / "frames-00003.npy").rename(local / "elsewhere")
        with pytest.raises(StoreError, match=r"frames-00003.npy: missing; restore it"):
            store.codes(3)
        server.broken = 99
        with pytest.raises(PlaceError, match="can't be reached"):
            store.codes(0)
        server.broken = 1
        server.cut = 1
        assert store.codes(0).shape == (FRAMES, 16, 16)
        with pytest.raises(StoreError, match="no shard manifest"):
            TokenStore(f"{server.url}/nothing")


def test_a_full_disk_is_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(url)
    store.codes(0)
    usage = caching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StoreError, match=r"frames-00001.npy: no room for its .* GB in the cache .*: the disk is full"):
        store.codes(1)
    monkeypatch.undo()


def test_a_bound_that_is_no_number(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("TOTO_CACHE_GB", "lots")
    with pytest.raises(ConfigError, match="TOTO_CACHE_GB: 'lots' is no number of gigabytes"):
        TokenStore(url)


@pytest.fixture
def server(local: Path) -> Iterator[FolderServer]:
    pytest.importorskip("aiohttp")
    with serve(local.parent) as running:
        yield running


def test_training_draws_the_same_from_a_url(local: Path, url: str) -> None:
    def draws(path: str) -> list[torch.Tensor]:
        source = parse_source(f"{path}=0.5")
        assert as_plain(source)["path"] == path
        mixture = Mixture((source,), frames=8, seed=0)
        return [window.codes for window in mixture.windows(0, 12)]

    assert parse_source(f"image:{url}=0.2").path == RemotePath(url)
    assert parse_source(url) == SourceConfig(path=RemotePath(url), weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(draws(url), draws(str(local)), strict=True))


def test_every_shard_command_takes_urls(
    local: Path, server: FolderServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web = f"{server.url}/store"
    command.run(["info", str(local)])
    near = capsys.readouterr().out
    files = len(TokenStore(local).checksums)
    for place in (url, web):
        command.run(["info", place])
        assert capsys.readouterr().out == near.replace(str(local), place)
        command.run(["verify", place])
        assert capsys.readouterr().out.startswith(f"{place}: {files} of {files} files are whole")
        command.run(["cat", place, "1.mp4", "--frames", "0:1"])
        assert capsys.readouterr().out.startswith("1.mp4: frames 0 to 0 of 40")
    command.run(["split", url, "--labels", "c0", "--out", str(tmp_path / "c0"), "--rest", str(tmp_path / "c1")])
    command.run(["merge", url, str(tmp_path / "c1"), "--out", str(tmp_path / "both"), "--prefix"])
    command.run(["export", web, "--to", "parquet", "--out", str(tmp_path / "tables")])
    assert len(TokenStore(tmp_path / "both")) == SHARDS + SHARDS // 2
    near_codes = all_codes(TokenStore(local))
    assert all(torch.equal(a, b) for a, b in zip(all_codes(TokenStore(tmp_path / "both")), near_codes, strict=False))
    TokenStore(tmp_path / "both").verify()
