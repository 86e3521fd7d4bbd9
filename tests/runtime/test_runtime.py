"""Files that are whole or absent, randomness by name, signals, metrics that survive a kill, errors in one line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from toto.runtime.device import autocast, pick_device, use_bf16
from toto.runtime.errors import ConfigError, NonFiniteLossError, ShortMediaError, StoreError, TotoError
from toto.runtime.files import (
    folder_written_aside,
    read_json,
    remove_leftovers,
    sha256_of,
    write_json,
    written_aside,
)
from toto.runtime.interrupt import stop_on_signal
from toto.runtime.metrics import Metrics, read_metrics
from toto.runtime.progress import Progress, duration
from toto.runtime.provenance import write_provenance
from toto.runtime.seed import integer, stream


def test_errors_are_one_line_and_cross_processes():
    error = ShortMediaError("too\nshort", where="a.mp4", fix="use\n another")
    assert str(error) == "a.mp4: too short; use another"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made one line above
    assert (str(again), type(again), again.status) == (str(error), ShortMediaError, "short")
    assert issubclass(NonFiniteLossError, TotoError)


def fail_after(_work):
    raise RuntimeError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        fail_after(aside.write_text("half"))
    assert read_json(path, what="x") == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert len(sha256_of(path)) == 64
    path.write_text("{")
    with pytest.raises(StoreError, match="damaged thing"):
        read_json(path, what="thing")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with folder_written_aside(tmp_path / "out") as aside:
        (aside / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "x"
    with pytest.raises(RuntimeError), folder_written_aside(tmp_path / "other") as aside:
        fail_after((aside / "a").write_text("x"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.npy.{dead.pid}.npy", f".b.json.{os.getpid()}.json", ".hidden", "c.npy"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".step-1.{dead.pid}").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".b.json.{os.getpid()}.json", ".hidden", "c.npy"}
    remove_leftovers(tmp_path / "nowhere")


def test_streams_depend_on_their_names_alone():
    assert stream(1, "a", 2).integers(10**9) == stream(1, "a", 2).integers(10**9)
    assert len({int(stream(1, "a", number).integers(10**12)) for number in range(50)}) == 50
    assert integer(1, "a") != integer(1, "b")
    assert 0 <= integer(5) < 2**63


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_continued_metrics_drop_what_comes_again_and_a_line_cut_off(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    metrics = Metrics(tmp_path, continue_from=3)
    metrics.write(4, {"loss": 40.0})
    metrics.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_progress_says_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr("toto.runtime.progress.LINE_EVERY_SECONDS", 0.0)
    with Progress("working", total=10, unit="steps", done=4) as progress:
        progress.advance(2, note="loss 1")
        assert progress.done == 6
    first, last = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("working: 6/10 steps")
    assert "left  loss 1" in first
    assert last.startswith("working: 6/10")
    assert [duration(seconds) for seconds in (42, 185, 7800)] == ["42 s", "3 min 5 s", "2 h 10 min"]


def test_devices_and_precision():
    cpu = pick_device("cpu")
    assert cpu == torch.device("cpu")
    with pytest.raises(ConfigError, match="can't use this device"):
        pick_device("abacus")
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    with autocast("bf16", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("fp32", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product.dtype
    assert use_bf16("auto", cpu) in (True, False)


@pytest.mark.gpu
def test_a_gpu_is_chosen_where_there_is_one():
    assert pick_device().type == "cuda"


def test_an_output_folder_says_what_made_it(tmp_path):
    write_provenance(tmp_path, {"path": tmp_path, "sizes": (1, 2)})
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["config"] == {"path": str(tmp_path), "sizes": [1, 2]}
    assert {"toto", "python", "torch", "numpy", "av"} == set(made["versions"])
    write_provenance(tmp_path, {"path": tmp_path})
    with pytest.raises(ConfigError, match="another kind of job"):
        write_provenance(tmp_path, Progress)
