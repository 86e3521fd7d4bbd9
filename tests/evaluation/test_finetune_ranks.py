"""Several processes fine-tune as one: the same losses, scores and counts, checkpoints that any number goes on from."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_jobs import Job, run
from PIL import Image
from safetensors.torch import load_file

from toto.evaluation.classifier import HeadConfig, SharedBatchNorm
from toto.evaluation.finetune_config import Augmentation, FinetuneConfig
from toto.evaluation.finetune_ranks import parts_of
from toto.evaluation.result import load_result
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, save_model
from toto.runtime.errors import ConfigError
from toto.runtime.metrics import read_metrics
from toto.training.optimizer import OptimizerConfig

CONFIG = FinetuneConfig(
    head=HeadConfig(heads=2),
    epochs=3,
    batch=6,
    micro_batch=6,
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
    augmentation=Augmentation(area=(0.6, 1.0)),
    validation=0.25,
    validate_every=2,
    precision="fp32",
    device="cpu",
    log_every=1,
    save_every=2,
    timeout=60,
)
MODES = {
    "probes": CONFIG,
    "full": replace(CONFIG, mode="full", stored_views=2),
    "frozen": replace(CONFIG, next_token_weight=0.0, head=HeadConfig(pool="average", classifier="mlp")),
}


@pytest.fixture(scope="module")
def job(tokenizer, tokenizer_folder, tmp_path_factory):
    """A run in one process, of pictures of which one can't be read."""
    root = tmp_path_factory.mktemp("finetune-ranks")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for label, colour in {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}.items():
            (root / "pictures" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + rng.normal(0, 25, (20, 28, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "pictures" / part / label / f"{number}.png")
    (root / "pictures" / "train" / "green" / "3.png").write_bytes(b"no picture")
    side = 4 * tokenizer.downsampling
    card = Card(passport=tokenizer.at(side, side).to_dict(), sequence={"frames": 2, "stride": 2, "rows": 4, "cols": 4})
    torch.manual_seed(0)
    save_model(
        root / "model", Transformer(ModelConfig(vocab_size=68, width=32, layers=2, heads=2, mlp_hidden=48)), card
    )
    return Job(
        config=CONFIG,
        out=root / "out",
        checkpoint=str(root / "model"),
        tokenizer=tokenizer_folder,
        pictures=root / "pictures",
    )


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """Each mode's run in one process."""
    root = tmp_path_factory.mktemp("alone")
    for mode, config in MODES.items():
        run(replace(job, config=config, out=root / mode))
    return root


def torchrun(ranks: int, jobs: list[Job], folder: Path) -> subprocess.CompletedProcess:
    (folder / "jobs.pkl").write_bytes(pickle.dumps(jobs))
    script = Path(__file__).with_name("finetune_jobs.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, str(folder / "jobs.pkl")], env=environment, capture_output=True, text=True, timeout=300
    )


def of(config: FinetuneConfig, ranks: int) -> FinetuneConfig:
    """The same batches, in several processes."""
    return replace(config, micro_batch=config.micro_batch // ranks)


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = read_metrics(found), read_metrics(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("train/entropy", "train/next_token", "train/grad_norm", "validation/layer_2"):
            assert (name in mine) == (name in other), name
            assert mine.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), name
    ours, theirs = load_result(found / "result.json"), load_result(expected / "result.json")
    assert (ours.ledger, ours.details["failures"]) == (theirs.ledger, theirs.details["failures"])
    assert ours.protocol["layer"] == theirs.protocol["layer"]
    assert ours.metrics["top1"] == theirs.metrics["top1"]
    for file in ("model.safetensors", "heads.safetensors"):
        mine, other = (load_file(run / "classifier" / file) for run in (found, expected))
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=2e-3, atol=2e-4, msg=f"{file}: {name}")


def test_two_processes_have_the_losses_scores_and_counts_of_one(job, alone, tmp_path):
    jobs = [replace(job, config=of(config, 2), out=tmp_path / mode) for mode, config in MODES.items()]
    done = torchrun(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in MODES:
        assert_same_run(tmp_path / mode, alone / mode)
    assert "\n" not in done.stdout.strip() or done.stdout.count("held-back accuracy") == 2 * len(MODES)


def test_three_processes_go_on_from_one_and_one_from_them(job, alone, tmp_path):
    stopped = replace(job, out=tmp_path / "run", send=(2, 0, signal.SIGTERM))
    run(stopped)
    again = replace(job, config=of(CONFIG, 3), out=tmp_path / "run", resume=True, send=(5, 1, signal.SIGTERM))
    done = torchrun(3, [again], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_metrics(tmp_path / "run")[-1]["step"] < read_metrics(alone / "probes")[-1]["step"]
    run(replace(job, out=tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", alone / "probes")


def test_a_process_that_dies_ends_the_job_with_a_line(job, tmp_path):
    done = torchrun(
        2, [replace(job, config=of(CONFIG, 2), out=tmp_path / "run", send=(1, 1, signal.SIGKILL))], tmp_path
    )
    assert done.returncode != 0
    assert "another process of the job has ended" in done.stderr
    assert "Traceback" not in done.stderr.split("another process of the job has ended")[0]


def test_batches_that_processes_cannot_share_are_refused(job, tmp_path):
    done = torchrun(2, [replace(job, out=tmp_path / "run")], tmp_path)
    assert done.returncode != 0
    assert "--batch: 6 items are no multiple of 2 processes x 6" in done.stderr
    assert not (tmp_path / "run").exists()


def test_parts_leave_every_process_an_item():
    assert parts_of(10, 4, least=1) == [range(4), range(4, 8), range(8, 10)]
    assert parts_of(10, 4, least=3) == [range(4), range(4, 10)]
    assert parts_of(2, 4, least=3) == [range(2)]


def test_a_norm_that_is_shared_is_torchs_own(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        own, shared = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False), SharedBatchNorm(5, eps=1e-6, affine=False)
        shared.shared = True
        for seed in range(2):
            rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1
            given = [rows.clone().requires_grad_() for _ in range(2)]
            out = [norm(x) for norm, x in zip((own, shared), given, strict=True)]
            for each in out:
                each.pow(3).sum().backward()
            torch.testing.assert_close(out[1], out[0])
            torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared.state_dict(), own.state_dict())
        torch.testing.assert_close(shared.eval()(rows), own.eval()(rows))
    finally:
        torch.distributed.destroy_process_group()


def test_a_timeout_must_be_positive():
    with pytest.raises(ConfigError, match="--timeout"):
        replace(CONFIG, timeout=0)
