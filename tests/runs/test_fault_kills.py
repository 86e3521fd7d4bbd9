"""kill -9 of tokenizing runs: at random moments, and at every single rename and deletion; the bytes stay the same."""

from __future__ import annotations

import subprocess
import sys

from conftest import make_photo, make_video
from fault_kills import kill_runs

from toto.tokens.extract import TokenizeConfig, tokenize

EVERY_MOMENT = """
import os, shutil, signal, sys
from pathlib import Path
from toto.tokens import extract

source, out, tokenizer = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
changes = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "rmdir", "fsync")}


def dying(change):
    def act(*words, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return change(*words, **named)
    return act


def run(folder, moment):
    global left
    child = os.fork()
    if child == 0:
        left = moment
        for name, change in changes.items():
            setattr(os, name, dying(change))
        extract.tokenize(extract.TokenizeConfig(
            source=source, out=folder, tokenizer=tokenizer, size=32, min_frames=4, keep_pixels=True, workers=0
        ))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), (moment, code)
    return code == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "made.json"}


assert run(out / "first", -1)
moment = checked = 0
while not run(out / "killed", moment):  # and the next run finds what this one left
    shutil.rmtree(out / "again", ignore_errors=True)
    shutil.copytree(out / "killed", out / "again")
    assert run(out / "again", -1)
    assert contents(out / "again") == contents(out / "first"), moment
    shutil.rmtree(out / "killed")
    moment, checked = moment + 7, checked + 1
print(moment, checked)
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "made.json"}


def test_a_run_that_dies_at_any_step_of_its_bookkeeping_goes_on(tmp_path, tokenizer_folder):
    make_video(tmp_path / "source" / "a.mp4", frames=20, size=32)
    make_photo(tmp_path / "source" / "b.jpg")
    expected = tokenize(
        TokenizeConfig(
            source=tmp_path / "source", out=tmp_path / "whole", tokenizer=str(tokenizer_folder), size=32, min_frames=4,
            keep_pixels=True, workers=0,
        )
    )  # fmt: skip
    words = [tmp_path / "source", tmp_path, tokenizer_folder]
    process = subprocess.run(
        [sys.executable, "-c", EVERY_MOMENT, *map(str, words)], capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, process.stderr
    moments, checked = map(int, process.stdout.split())
    assert moments >= 25
    assert checked >= moments // 7
    assert contents(tmp_path / "killed") == contents(expected.folder)


def test_the_campaign_kills_and_compares(tmp_path):
    result = kill_runs(tmp_path, times=1, seed=5, workers=0, videos=4)
    assert result.kills == 1
    assert result.stores >= 1
    assert result.shards >= 2
    assert result.wrong == []
