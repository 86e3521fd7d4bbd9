"""Compressed tars give what plain ones give, within bounds, and leave nothing behind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import torch
from conftest import make_photo, make_video

from toto.media import unpacked
from toto.media.catalogs import open_source
from toto.media.catalogs.sources import recognise
from toto.media.reading import stream_item
from toto.media.unpacked import compression, damage_of, open_tar
from toto.runtime.errors import ConfigError, MediaError

ENDINGS = ["tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "tzst"]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A scratch folder of the test's own."""
    monkeypatch.setenv("TOTO_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("TOTO_SCRATCH_OF_RUN", "")
    return tmp_path / "scratch"


def compressed(content, ending):
    if ending in ("tar.gz", "tgz"):
        return gzip.compress(content)
    if ending.endswith("zst"):
        half = len(content) // 2  # two frames, as parallel compressors write them
        return b"".join(bytes(pa.compress(part, "zstd")) for part in (content[:half], content[half:]))
    return {"tar.bz2": bz2.compress, "tar.xz": lzma.compress}[ending](content)


def tar_of(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A tar with a video, two images, a link and a label."""
    root = tmp_path_factory.mktemp("shard")
    video, photo = make_video(root / "v.mp4").read_bytes(), make_photo(root / "p.jpg").read_bytes()
    return tar_of(("a.mp4", video), ("a.cls", b"run"), ("b.jpg", photo), ("../c.jpg", photo), ("d.jpg", photo))


def entries(source, name):
    """What a source offers, without the name of the file."""
    catalog = open_source(str(source))
    items = [(item.id.replace(name, "TAR"), item.kind, item.label, item.split, item.part) for item in catalog.items]
    refused = [(row.id.replace(name, "TAR"), row.status, row.reason) for row in catalog.skipped]
    frames = [torch.cat([clip.frames for clip in stream_item(item, stride=4)]) for item in catalog.items]
    return items, refused, frames


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_compressed_tar_is_the_tar(ending, shard, tmp_path):
    (tmp_path / "train-0.tar").write_bytes(shard)
    name = f"train-0.{ending}"
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / name).write_bytes(compressed(shard, ending))
    assert recognise(str(tmp_path / "in")).kind == recognise(str(tmp_path / "in" / "deep" / name)).kind == "webdataset"
    items, refused, frames = entries(tmp_path / "train-0.tar", "train-0.tar")
    assert len(items) == 3
    again = entries(tmp_path / "in" / "deep" / name, name)
    assert again[:2] == (items, refused)
    assert all(mine.equal(theirs) for mine, theirs in zip(again[2], frames, strict=True))
    assert entries(tmp_path / "in", f"deep/{name}")[0] == items


def test_other_endings_are_not_unpacked(tmp_path):
    assert [compression(Path(name)) for name in ("a.tar", "a.gz", "a.tar.GZ", "tar.gz", "x.mp4")] == [
        None, None, ".gz", None, None,
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(b"plain")
    with open_tar(tmp_path / "a.tar") as file:
        assert file.read() == b"plain"
    assert damage_of(tmp_path / "a.tar") is None
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_what_lies_before_the_damage_is_used(ending, shard, tmp_path):
    path = tmp_path / f"s.{ending}"
    noise = torch.randint(0, 256, (3_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = compressed(tar_of(("a.jpg", make_photo(tmp_path / "p.jpg").read_bytes()),
                              ("b.bin", noise.numpy().tobytes()), ("c.jpg", b"x")), ending)  # fmt: skip
    path.write_bytes(whole[: int(0.9 * len(whole))])
    catalog = open_source(str(path))
    assert [item.id for item in catalog.items] == [f"s.{ending}/a.jpg"]
    damage = {row.id: (row.status, row.reason) for row in catalog.skipped}
    assert damage[f"s.{ending}"][0] == "corrupt"
    assert "can't be read to its end" in damage[f"s.{ending}"][1]
    path.write_bytes(b"not compressed at all")
    with pytest.raises(ConfigError, match=r"none of its 1 entries can be read"):
        open_source(str(path))


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, scratch, monkeypatch):
    monkeypatch.setattr(unpacked, "FREE_BYTES", 2**20)
    photo = make_photo(tmp_path / "p.jpg").read_bytes()
    bomb = gzip.compress(tar_of(("a.jpg", photo), ("zeros.bin", bytes(2**26))))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bomb.tar.gz").write_bytes(bomb)
    (tmp_path / "in" / "good.tar.gz").write_bytes(gzip.compress(tar_of(("a.jpg", photo))))
    sizes = []
    write = unpacked._write
    monkeypatch.setattr(
        unpacked, "_write", lambda file, block, path: sizes.append(len(block)) or write(file, block, path)
    )
    catalog = open_source(str(tmp_path / "in"))
    assert [item.id for item in catalog.items] == ["good.tar.gz/a.jpg"]
    ((name, status, reason),) = [(row.id, row.status, row.reason) for row in catalog.skipped]
    assert (name, status) == ("bomb.tar.gz", "corrupt")
    assert reason.startswith("refused: it unpacks to more than 100 times its size")
    assert sum(sizes) < 101 * len(bomb) + 2**21 < 2**24
    assert sum(file.stat().st_size for file in scratch.rglob("*.tar")) < 2**17
    body = tar_of(("a.jpg", photo))[: 512 + -(-len(photo) // 512) * 512]
    declared = tarfile.TarInfo("huge.jpg")
    declared.size = 2**40
    (tmp_path / "declared.tgz").write_bytes(gzip.compress(body + declared.tobuf()))
    said = open_source(str(tmp_path / "declared.tgz")).skipped
    assert any(row.reason == f"{2**40:,} bytes, the limit is {8 * 2**30:,}" for row in said)


def shard_files(root, count, size=400_000):
    """Tars of random bytes that don't shrink."""
    paths = []
    for number in range(count):
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        paths.append(root / f"{number}.tar.gz")
        paths[-1].write_bytes(gzip.compress(tar_of(("a.bin", noise.numpy().tobytes())), compresslevel=1))
    return paths


def test_the_scratch_folder_is_bounded_and_what_was_deleted_comes_again(tmp_path, scratch, monkeypatch):
    monkeypatch.setenv("TOTO_SCRATCH_GB", "0.001")
    paths = shard_files(tmp_path, 4)
    held = open_tar(paths[0])
    first = held.read()
    for path in (*paths, *reversed(paths)):
        with open_tar(path) as file:
            assert len(file.read()) == len(first)
        assert sum(each.stat().st_size for each in scratch.rglob("*.tar")) <= 1_000_000
    held.seek(0)
    assert held.read() == first
    with open_tar(paths[0]) as file:
        assert file.read() == first
    (large,) = shard_files(tmp_path, 1, size=1_200_000)
    with pytest.raises(ConfigError, match=r"unpacks to more than 0.001 GB; set TOTO_SCRATCH_GB to more"):
        open_tar(large)
    monkeypatch.setenv("TOTO_SCRATCH_GB", "much")
    with pytest.raises(ConfigError, match="TOTO_SCRATCH_GB: 'much' is no number of gigabytes"):
        open_tar(large)


def test_a_full_or_forbidden_disk_is_one_line(tmp_path, scratch, monkeypatch):
    (path,) = shard_files(tmp_path, 1)
    code = (
        "import resource, sys; from pathlib import Path; from toto.media.unpacked import open_tar;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); open_tar(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert "ConfigError" in said
    assert "no room left to unpack it in" in said
    assert "set TOTO_SCRATCH to a folder with more room" in said
    assert not list(scratch.rglob(".run.*"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOTO_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"can't be used as scratch folder .*set TOTO_SCRATCH"):
        open_tar(path)


def read_in_process(path):
    with open_tar(path) as file:
        return len(file.read()), os.environ["TOTO_SCRATCH_OF_RUN"]


def test_processes_share_one_copy(tmp_path, scratch):
    paths = shard_files(tmp_path, 2)
    here = [read_in_process(paths[0])]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(read_in_process, [*paths, *paths])
    assert {place for _, place in [*here, *found]} == {here[0][1]}
    assert len(list(scratch.rglob("*.tar"))) == 2


def test_nothing_is_left_when_the_run_ends_or_after_the_next_one(tmp_path, scratch):
    (path,) = shard_files(tmp_path, 1)
    code = (
        "import os, sys; from pathlib import Path; from toto.media.unpacked import open_tar;"
        f"open_tar(Path({str(path)!r})).close(); print(os.environ['TOTO_SCRATCH_OF_RUN']);"
        "sys.stdout.flush(); os._exit(9) if sys.argv[1] == 'die' else None"
    )

    def run(how):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        return Path(done.stdout.strip())

    assert not run("end").exists()
    killed = run("die")
    assert len(list(killed.glob("*.tar"))) == 1
    assert not run("end").exists()
    assert not killed.exists()


def test_a_tar_that_is_gone_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "gone.tar.gz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "s.tar.gz").write_bytes(gzip.compress(tar_of(("a.jpg", b"x"))))
    catalog = open_source(str(tmp_path / "in"))
    assert [item.id for item in catalog.items] == ["s.tar.gz/a.jpg"]
    assert [(row.id, row.status) for row in catalog.skipped] == [("gone.tar.gz", "corrupt")]


def test_a_bomb_met_while_reading_is_a_media_error(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "FREE_BYTES", 2**10)
    path = tmp_path / "z.tar.xz"
    path.write_bytes(lzma.compress(bytes(2**22)))
    with pytest.raises(MediaError, match="refused: it unpacks to more than 100 times"):
        open_tar(path)


def test_a_remote_tar_is_unpacked_like_a_local_one(shard, tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(shard))
    with fsspec.open("memory://unpacked/t.tar.gz", "wb") as file:
        file.write(gzip.compress(shard))
    local = entries(tmp_path / "t.tar.gz", "t.tar.gz")
    remote = entries("memory://unpacked/t.tar.gz", "t.tar.gz")
    assert remote[:2] == local[:2]
    assert all(mine.equal(theirs) for mine, theirs in zip(remote[2], local[2], strict=True))
