"""Training that can't go on: one line, an exit code, and nothing lost of what was written."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PASSPORT, make_store
from fault_training import kill_training
from safetensors.torch import load_file, save_file

from toto.__main__ import main
from toto.model.weights import newest_checkpoint
from toto.runtime import files
from toto.runtime.metrics import read_metrics
from toto.tokens.passport import Passport
from toto.training import checkpoint, loop, parallel

TINY = "--save-every 2 --batch 2 --micro-batch 2 --data.frames 4 --log-every 1 --device cpu --precision fp32"
TINY += " --model.width 32 --model.layers 1 --model.heads 2 --model.mlp-hidden 48"


@pytest.fixture
def data(tmp_path) -> Path:
    return make_store(tmp_path / "data", videos=(20, 9, 4, 33, 3, 12))


def run(out: Path, data: Path, *more: object) -> int:
    return main([str(word) for word in ["train", "nano", "--out", out, "--data", data, *TINY.split(), *more]])


def line_of(capsys) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("toto: "))
    return line


def contents(out: Path) -> dict[str, bytes]:
    """All that is in the checkpoints of a run."""
    return {str(path): path.read_bytes() for path in sorted((out / "checkpoints").rglob("*")) if path.is_file()}


def losses(out: Path) -> dict[float, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(out) if "train/loss" in row}


@pytest.fixture
def begun(data, tmp_path, monkeypatch, capsys):
    """A run of six steps that was ended from outside after four of them, and an undisturbed one."""
    assert run(tmp_path / "whole", data, "--steps", 6) == 0
    step = loop._step

    def ended(run_, stop):
        if run_.step == 4:
            run_.saver.wait()
            raise KeyboardInterrupt
        return step(run_, stop)

    monkeypatch.setattr(loop, "_step", ended)
    assert run(tmp_path / "run", data, "--steps", 6) != 0
    monkeypatch.setattr(loop, "_step", step)
    capsys.readouterr()
    return tmp_path / "run"


def goes_on(begun: Path, data: Path) -> None:
    """Resuming gives what the undisturbed run has."""
    assert run(begun, data, "--steps", 6, "--resume") == 0
    assert losses(begun) == losses(begun.parent / "whole")
    ours, theirs = (load_file(newest_checkpoint(one) / "model.safetensors") for one in (begun, begun.parent / "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_missing_shard(begun, data, tmp_path, capsys):
    before, shard = contents(begun), next(data.glob("frames-*.npy"))
    shard.rename(tmp_path / "elsewhere")
    assert run(begun, data, "--steps", 6, "--resume") == 1
    assert shard.name in line_of(capsys)
    assert contents(begun) == before
    (tmp_path / "elsewhere").rename(shard)
    goes_on(begun, data)


def test_missing_data(begun, data, tmp_path, capsys):
    before = contents(begun)
    data.rename(tmp_path / "elsewhere")
    assert run(begun, data, "--steps", 6, "--resume") == 1
    assert str(data) in line_of(capsys)
    assert contents(begun) == before
    (tmp_path / "elsewhere").rename(data)
    goes_on(begun, data)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_checkpoint(begun, data, monkeypatch, capsys, number):
    before = contents(begun)

    def refused(folder, *_):
        raise OSError(number, os.strerror(number), str(folder / "model.safetensors"))

    monkeypatch.setattr(checkpoint, "save_weights", refused)
    assert run(begun, data, "--steps", 6, "--resume") == 1
    line = line_of(capsys)
    assert "step-00000006: can't be written" in line
    assert files.UNWRITABLE[number][0] in line
    assert contents(begun) == before
    monkeypatch.undo()
    goes_on(begun, data)


def test_a_checkpoint_of_another_architecture(begun, data, capsys):
    before = contents(begun)
    assert run(begun, data, "--steps", 6, "--resume", "--model.layers", 2) == 2
    assert "model.layers was 1, is 2" in line_of(capsys)
    assert run(begun.parent / "new", data, "--steps", 1, "--init", begun, "--model.layers", 2) == 2
    assert "is of another architecture (layers was 1, is 2)" in line_of(capsys)
    assert not (begun.parent / "new").exists()
    assert contents(begun) == before
    goes_on(begun, data)


def test_tokens_of_another_tokenizer(begun, data, tmp_path, capsys):
    before = contents(begun)
    stranger = Passport.from_dict({**PASSPORT.to_dict(), "weights_sha256": "c" * 64}, where="test")
    other = make_store(tmp_path / "other", videos=(20, 9, 4, 33, 3, 12), passport=stranger)
    assert run(begun, other, "--steps", 6, "--resume") == 1
    assert "was trained on other shards" in line_of(capsys)
    assert run(tmp_path / "new", other, "--steps", 1, "--init", begun) == 1
    assert "start from a model of the same tokenizer" in line_of(capsys)
    assert contents(begun) == before
    goes_on(begun, data)


def test_weights_that_are_no_numbers(begun, data, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(newest_checkpoint(begun), broken)
    weights = load_file(broken / "model.safetensors")
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, broken / "model.safetensors")
    assert run(tmp_path / "new", data, "--steps", 3, "--init", broken) == 1
    assert f"{name} holds NaN or infinity; use a whole checkpoint" in line_of(capsys)
    assert not (tmp_path / "new").exists()


def test_a_batch_whose_loss_is_no_number(begun, data, monkeypatch, capsys):
    before, loss_of = contents(begun), parallel.next_token_loss

    def poisoned(*inputs):
        loss = loss_of(*inputs)
        return replace(loss, mean=loss.mean * float("nan"))

    monkeypatch.setattr(parallel, "next_token_loss", poisoned)
    assert run(begun, data, "--steps", 6, "--resume") == 1
    line = line_of(capsys)
    assert "loss nan, gradient norm nan at step 5" in line
    assert "step-00000004" in line
    assert (begun / "non-finite-step-5.json").exists()
    assert contents(begun) == before
    monkeypatch.undo()
    goes_on(begun, data)


def test_an_exploding_rate(begun, data, tmp_path, capsys):
    wild = ("--steps", 40, "--optimizer.peak-lr", 1e30, "--optimizer.warmup-steps", 0, "--save-every", 1)
    assert run(tmp_path / "wild", data, *wild) == 1
    line = line_of(capsys)
    assert "lower optimizer.peak_lr" in line
    assert newest_checkpoint(tmp_path / "wild") is not None


def test_killed_runs_are_bit_for_bit_those_of_undisturbed_ones(tmp_path):
    result = kill_training(tmp_path / "kills", times=2, seed=1, ranks=1, steps=60)
    assert result.wrong == []
    assert result.kills == 2
    assert result.runs >= 1
