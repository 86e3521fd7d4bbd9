"""Ray, for real: a cluster of two actors on this machine, and what becomes of work whose actor dies."""

from __future__ import annotations

import builtins
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray_jobs
from conftest import make_photo, make_video

from toto.__main__ import main
from toto.runtime.errors import ConfigError
from toto.runtime.ray_workers import RayWorkers
from toto.runtime.workers import Lost
from toto.tokens.extract import TokenizeConfig, tokenize

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """A cluster that the tests of this module share."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), path])
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield "local"
    ray.shutdown()
    os.environ["PYTHONPATH"] = path


@pytest.fixture
def pool(cluster):
    with RayWorkers(ray_jobs.start, ray_jobs.work, (100,), address=cluster, count=2, what="the decoder") as found:
        yield found


def test_results_come_in_the_order_of_the_tasks_and_losses_cost_their_task(pool, tmp_path):
    tasks = [0, 1, "crash", 2, (str(tmp_path / "once"), 3), 4, "hang", 5, -1]
    limit = {"hang": 1.0}.get
    known = {-1: 7}.get
    found = list(pool.in_order(tasks, limit=lambda task: limit(task, 60.0), known=known))
    assert [task for task, _ in found] == tasks
    assert [one.reason for _, one in found if isinstance(one, Lost)] == [
        "the decoder crashed (SIGSEGV)",
        "took longer than 1 s",
    ]
    assert [one for _, one in found if not isinstance(one, Lost)] == [100, 101, 102, 103, 104, 105, 7]
    assert (tmp_path / "once").exists()


def test_a_mistake_is_raised(pool):
    with pytest.raises(RuntimeError, match="ValueError: a mistake"):
        list(pool.in_order([1, "mistake"]))
    assert [one for _, one in pool.in_order([5])] == [105]


def test_a_store_made_on_a_cluster_is_that_of_one_process_though_an_actor_is_killed(
    cluster, tmp_path, tokenizer_folder
):
    source = tmp_path / "source"
    for number in range(16):
        make_video(source / f"{number:02d}.mp4", number=number, frames=60)
        make_photo(source / f"{number:02d}.jpg", number=number)
    (source / "broken.jpg").write_bytes(b"nothing")
    options = {"source": source, "tokenizer": str(tokenizer_folder), "size": 32, "min_frames": 4, "keep_pixels": True}
    alone = tokenize(TokenizeConfig(out=tmp_path / "alone", workers=0, **options))
    killed = []
    watch = threading.Thread(target=_kill_one_actor, args=(killed, time.monotonic() + 60))
    watch.start()
    far = tokenize(TokenizeConfig(out=tmp_path / "far", workers=2, ray=cluster, **options))
    watch.join()
    assert len(killed) == 1
    for path in alone.folder.iterdir():
        if path.name != "made.json":
            assert (far.folder / path.name).read_bytes() == path.read_bytes(), path.name


def _kill_one_actor(killed, until):
    """Kill the first actor that is seen at work."""
    while time.monotonic() < until and not killed:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::_Actor.run"):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(process.name)
                break
        time.sleep(0.01)


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path, tokenizer_folder):
    make_photo(tmp_path / "photo.jpg")
    real = builtins.__import__

    def without_ray(name, *arguments, **options):
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ConfigError, match=r"needs the package ray.*pip install 'toto-video\[ray\]'"):
        tokenize(
            TokenizeConfig(
                source=tmp_path / "photo.jpg",
                out=tmp_path / "out",
                tokenizer=str(tokenizer_folder),
                size=32,
                ray="local",
            )
        )


def test_no_workers_on_a_cluster_is_refused(tmp_path, capsys):
    words = ["tokenize", str(tmp_path), "--out", str(tmp_path / "out"), "--ray", "local", "--workers", "0"]
    assert main(words) != 0
    assert "--workers 0: a cluster needs at least one worker" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch):
    def nobody(**_):
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    wanted = (
        r"^--ray auto: no Ray cluster answers \(Could not find any running Ray instance.\); start one with `ray start"
    )
    with (
        pytest.raises(ConfigError, match=wanted),
        RayWorkers(ray_jobs.start, ray_jobs.work, (0,), address="auto", count=1),
    ):
        pass
