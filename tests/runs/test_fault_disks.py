"""Full, limited and read-only disks: one line that names the path, a store that stays valid, a job that goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_photo, make_store, make_video
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from toto.__main__ import main
from toto.media.encode import write_image, write_video
from toto.runtime.errors import StorageError
from toto.runtime.files import folder_written_aside, written_aside
from toto.runtime.metrics import Metrics
from toto.tokens.shards import TokenStore

LIMIT = 200_000
MANY = 1_000_000


@contextlib.contextmanager
def largest_file(limit):
    """No file may grow beyond so many bytes, in this process: needs no rights, and is told as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of its own in memory, where the system permits it."""
    folder.mkdir()
    mount = shutil.which("mount")
    words = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not mount or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


WRITERS = {
    "text": lambda path: path.write_text("x" * MANY),
    "numpy": lambda path: np.zeros(MANY, np.uint16).tofile(path),
    "parquet": lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(MANY // 4)}), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(MANY)}, path),
    "torch": lambda path: torch.save(torch.zeros(MANY), path),
    "video": lambda path: write_video(path.with_suffix(".mp4"), noise(24, 128, 128, 3), rate=12, crf=1),
    "image": lambda path: write_image(path, noise(400, 400, 3)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_way_of_writing_tells_of_a_full_disk_in_one_line(tmp_path, name):
    with (
        largest_file(LIMIT),
        pytest.raises(StorageError, match=r"/out/file: can't be written: .*; ") as error,
        written_aside(tmp_path / "out" / "file") as aside,
    ):
        WRITERS[name](aside)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_not_there(tmp_path):
    with (
        largest_file(LIMIT),
        pytest.raises(StorageError, match=r"step-1: can't be written: .*; "),
        folder_written_aside(tmp_path / "step-1") as aside,
    ):
        save_distributed({"a": torch.zeros(MANY)}, checkpoint_id=str(aside / "trainer"), no_dist=True)
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_do_not_fit(tmp_path):
    metrics = Metrics(tmp_path)
    with largest_file(300), pytest.raises(StorageError, match=r"metrics\.jsonl: can't be written"):
        metrics.write(0, {f"train/{name}": 0.5 for name in range(50)})
    metrics.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_what_the_system_says_becomes_words(tmp_path, number):
    with (
        pytest.raises(StorageError, match=r"a\.json: can't be written: [^;]*; [^;]*$"),
        written_aside(tmp_path / "a.json"),
    ):
        raise OSError(number, os.strerror(number))


def test_errors_about_something_else_stay_what_they_are(tmp_path):
    for error in (OSError("something"), ValueError("no space"), PermissionError(errno.EACCES, "no", "/elsewhere/b")):
        with pytest.raises(type(error)) as found, written_aside(tmp_path / "a"):
            raise error
        assert found.value is error


def tokenize(source, out, tokenizer_folder, *more):
    words = ["tokenize", source, "--out", out, "--tokenizer", tokenizer_folder, "--size", 64, "--min-frames", 4]
    return main([str(word) for word in [*words, "--keep-pixels", "--workers", 0, *more]])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "made.json"}


def line_of(capsys):
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("toto: "))
    return line


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks") / "source"
    for number in range(4):
        make_video(folder / f"{number}.mp4", number=number, frames=40)
        make_photo(folder / f"{number}.jpg", number=number)
    return folder


@pytest.mark.parametrize("limit", [0, 600, 3_000, 50_000, 200_000])
def test_tokenizing_continues_when_there_is_room_again(source, tmp_path, tokenizer_folder, capsys, limit):
    assert tokenize(source, tmp_path / "whole", tokenizer_folder) == 0
    capsys.readouterr()
    with largest_file(limit):
        assert tokenize(source, tmp_path / "out", tokenizer_folder) == 1
    line = line_of(capsys)
    assert f"{tmp_path}/out" in line
    assert "can't be written" in line
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert tokenize(source, tmp_path / "out", tokenizer_folder) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_tokenizing_on_a_full_disk(source, tmp_path, tokenizer_folder, capsys):
    assert tokenize(source, tmp_path / "whole", tokenizer_folder) == 0
    with small_disk(tmp_path / "disk", "4m") as disk:
        (disk / "other").write_bytes(bytes(3_500_000))
        capsys.readouterr()
        assert tokenize(source, disk / "out", tokenizer_folder) == 1
        line = line_of(capsys)
        assert "no space is left on its disk; make space, then run the same command again" in line
        assert str(disk / "out") in line
        (disk / "other").unlink()
        assert tokenize(source, disk / "out", tokenizer_folder) == 0
        assert contents(disk / "out") == contents(tmp_path / "whole")


def test_a_read_only_disk(source, tmp_path, tokenizer_folder, capsys):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert tokenize(source, disk / "out", tokenizer_folder) == 1
        assert "its disk is read-only; make the folder writable, or choose another one" in line_of(capsys)


def test_a_read_only_folder(source, tmp_path, tokenizer_folder, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    if os.access(tmp_path / "out", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert tokenize(source, tmp_path / "out", tokenizer_folder) == 1
    assert "no permission to write it" in line_of(capsys)


@pytest.mark.parametrize("job", ["merge", "split", "export"])
def test_stores_made_of_stores_are_whole_or_absent(tmp_path, capsys, job):
    store = make_store(tmp_path / "store", videos=(9,) * 400)
    words = {
        "merge": ["merge", store, "--out", tmp_path / "out", "--copy"],
        "split": ["split", store, "--share", 0.9, "--out", tmp_path / "out", "--rest", tmp_path / "rest"],
        "export": ["export", store, "--to", "webdataset", "--out", tmp_path / "out"],
    }[job]
    with largest_file(30_000):
        assert main(["shards", *map(str, words)]) == 1
    assert "can't be written" in line_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert main(["shards", *map(str, words)]) == 0
    TokenStore(store).verify()


def test_training_on_a_full_disk_keeps_its_last_checkpoint(video_store, tmp_path, capsys):
    run = tmp_path / "run"
    tiny = "--steps 4 --save-every 2 --batch 2 --micro-batch 2 --data.frames 4"
    tiny += " --model.width 32 --model.layers 1 --model.heads 2 --model.mlp-hidden 48"
    words = ["train", "nano", "--out", str(run), "--data", str(video_store), *tiny.split()]
    with largest_file(20_000):
        assert main(words) == 1
    line = line_of(capsys)
    assert f"{run}/checkpoints/step-00000002: can't be written" in line
    assert list(run.glob("checkpoints/*")) == []
    assert list(run.glob("checkpoints/.*")) == []
    assert main([*words, "--resume"]) == 0
    assert len(list(run.glob("checkpoints/step-*"))) >= 1
