"""Several processes train as one: the same losses, checkpoints that any number goes on from, a common end."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_jobs import Job

import toto
from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.config import ModelConfig
from toto.model.weights import newest_checkpoint
from toto.runtime.errors import ConfigError
from toto.runtime.metrics import read_metrics
from toto.training.checkpoint import require_whole
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.optimizer import OptimizerConfig
from toto.training.parallel import ParallelConfig
from toto.training.source import SourceConfig


@pytest.fixture
def config(video_store, image_store):
    sources = (SourceConfig(path=video_store, weight=3), SourceConfig(path=image_store, weight=1, modality="image"))
    return TrainConfig(
        data=DataConfig(sources=sources, frames=4),
        model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64),
        optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=5),
        steps=50,
        batch=6,
        micro_batch=1,
        precision="fp32",
        device="cpu",
        parallel=ParallelConfig(strategy="fsdp", timeout=60),
        log_every=1,
        save_every=25,
        eval_every=25,
    )


def torchrun(ranks: int, jobs: list[Job], folder: Path) -> subprocess.CompletedProcess:
    path = folder / "jobs.pkl"
    path.write_bytes(pickle.dumps(jobs))
    script = Path(__file__).with_name("rank_jobs.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, str(path)], env=environment, capture_output=True, text=True, timeout=300)


def run_ranks(ranks: int, jobs: list[Job], folder: Path) -> None:
    done = torchrun(ranks, jobs, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def rows(run, name):
    return {row["step"]: row[name] for row in read_metrics(run) if name in row}


def assert_same_run(found, expected):
    for name in ("train/loss", "train/grad_norm", "heldout/mean"):
        assert rows(found, name) == pytest.approx(rows(expected, name), rel=2e-5), name


def assert_same_weights(found, expected):
    ours, theirs = (toto.load_model(run).state_dict() for run in (found, expected))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def alone(config, out, **more):
    from rank_jobs import bits

    train(config, out, evaluate=bits, **more)


def test_two_processes_have_the_losses_of_one(config, tmp_path):
    alone(config, tmp_path / "one")
    short = replace(config, steps=12, save_every=6, eval_every=6)
    alone(short, tmp_path / "short")
    tied = replace(short, model=replace(short.model, tie_embeddings=True))
    alone(tied, tmp_path / "tied")
    bf16 = replace(short, precision="bf16")
    alone(bf16, tmp_path / "bf16")
    ways = {
        name: replace(short, parallel=ParallelConfig(timeout=60, **options))
        for name, options in {
            "ddp": {"strategy": "ddp"},
            "hsdp": {"strategy": "hsdp"},
            "selective": {"checkpointing": "selective", "strategy": "fsdp"},
            "full": {"checkpointing": "full", "strategy": "ddp"},
        }.items()
    }
    fsdp = ParallelConfig(timeout=60, strategy="fsdp")
    baselines = {
        "gpt2": replace(short, model=GPT2Config(width=32, layers=2, heads=2, mlp_hidden=64)),
        "mamba": replace(short, model=MambaConfig(width=32, layers=2)),
    }
    for name, each in baselines.items():
        alone(each, tmp_path / name)
    laid = {f"{name}-two": replace(each, parallel=fsdp) for name, each in baselines.items()}
    laid["gpt2-two"] = replace(laid["gpt2-two"], parallel=replace(fsdp, checkpointing="full"))
    others = {"two": config, "tied-two": tied, "bf16-two": bf16} | ways | laid
    run_ranks(2, [Job(config=each, out=tmp_path / name) for name, each in others.items()], tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert_same_run(tmp_path / "tied-two", tmp_path / "tied")
    assert rows(tmp_path / "bf16-two", "train/loss") == pytest.approx(rows(tmp_path / "bf16", "train/loss"), rel=5e-3)
    for name in baselines:
        assert_same_run(tmp_path / f"{name}-two", tmp_path / name)
    for name in ways:
        assert_same_run(tmp_path / name, tmp_path / "short")
        assert_same_weights(tmp_path / name, tmp_path / "short")
        sixth = Path("checkpoints", "step-00000006")  # written while the next steps were taken
        assert_same_weights(tmp_path / name / sixth, tmp_path / "short" / sixth)


def test_three_processes_and_checkpoints_that_any_number_goes_on_from(config, tmp_path):
    alone(config, tmp_path / "one")
    run_ranks(3, [Job(config=config, out=tmp_path / "three")], tmp_path)
    assert_same_run(tmp_path / "three", tmp_path / "one")
    config = replace(config, eval_every=10)
    alone(config, tmp_path / "whole")
    run = tmp_path / "run"
    alone_until = Job(config=config, out=run, send=(9, 0, signal.SIGTERM))
    for ranks, job in (
        (1, alone_until),
        (2, Job(config=config, out=run, resume=True, send=(19, 1, signal.SIGTERM))),
        (3, Job(config=config, out=run, resume=True, send=(29, 2, signal.SIGTERM))),
    ):
        run_ranks(ranks, [job], tmp_path)
        last = newest_checkpoint(run)
        assert int(last.name[-2:]) == 10 * ranks
        require_whole(last)
        named = json.loads((last / "checksums.json").read_text())
        assert len([name for name in named if name.endswith(".distcp")]) == ranks
    alone(config, run, resume=True)
    assert_same_run(run, tmp_path / "whole")
    assert_same_weights(run, tmp_path / "whole")


def test_a_dead_process_ends_the_job_with_a_line(config, tmp_path):
    began = time.monotonic()
    done = torchrun(2, [Job(config=config, out=tmp_path / "run", send=(30, 1, signal.SIGKILL))], tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - began < 200
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("toto (rank 0 of 2): ")]
    assert "another process of the job has ended" in line
    assert "start the same command with --resume" in line
    assert newest_checkpoint(tmp_path / "run").name == "step-00000025"
    alone(config, tmp_path / "run", resume=True)
    alone(config, tmp_path / "whole")
    assert rows(tmp_path / "run", "train/loss") == pytest.approx(rows(tmp_path / "whole", "train/loss"), rel=2e-5)


def test_an_error_that_all_have_is_told_by_each(config, tmp_path):
    alone(replace(config, steps=1), tmp_path / "run")
    done = torchrun(2, [Job(config=replace(config, steps=1), out=tmp_path / "run")], tmp_path)
    assert done.returncode != 0
    for rank in (0, 1):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"toto (rank {rank} of 2): ")]
        assert "already holds a run" in line


def test_what_wraps_blocks_is_refused_where_they_are_not_called(config, tmp_path):
    mamba = replace(config, model=MambaConfig(width=32, layers=2), parallel=ParallelConfig(checkpointing="full"))
    with pytest.raises(ConfigError, match="can't be wrapped; leave them out"):
        train(mamba, tmp_path / "run")


def test_a_batch_is_divided_among_processes(config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must be positive"):
        ParallelConfig(timeout=0)
    done = torchrun(2, [Job(config=replace(config, batch=5), out=tmp_path / "run")], tmp_path)
    assert "5 sequences are no multiple of 2 processes x 1" in done.stderr
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="start it with torchrun"):
        train(config, tmp_path / "other")
