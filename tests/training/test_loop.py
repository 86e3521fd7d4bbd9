"""The loop: it learns, resumes bit for bit after any end, and stops loudly when numbers go wrong."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toto
from toto.model.budget.flops import training_flops
from toto.model.config import ModelConfig
from toto.model.weights import checkpoints, load_card, load_model, newest_checkpoint
from toto.runtime.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.metrics import read_metrics
from toto.tokens.shards import TokenStore, sealed
from toto.training import loop, parallel
from toto.training.checkpoint import require_whole, restore_checkpoint
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from toto.training.source import SourceConfig

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def config(video_store, image_store):
    sources = (
        SourceConfig(path=video_store, weight=3),
        SourceConfig(path=image_store, weight=1, modality="image"),
    )
    return TrainConfig(
        data=DataConfig(sources=sources, frames=4),
        model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64),
        optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=5),
        steps=24,
        batch=4,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=6,
        eval_every=8,
    )


def losses(run):
    return {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}


@pytest.mark.parametrize(("precision", "curve", "within"), [("fp32", "losses", 2e-3), ("bf16", "losses-bf16", 1e-2)])
def test_a_golden_curve_of_100_steps(config, tmp_path, precision, curve, within):
    train(replace(config, steps=100, save_every=100, precision=precision), tmp_path / "run")
    found = losses(tmp_path / "run")
    golden = {int(step): loss for step, loss in json.loads((GOLDEN / f"{curve}.json").read_text()).items()}
    assert found == pytest.approx(golden, rel=within)
    assert found[100] < 0.7 * found[1]


def test_a_run_leaves_what_is_promised(config, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.training)
        return {"bits": 1.5}

    last = train(config, tmp_path / "run", evaluate=evaluate)
    assert last.name == "step-00000024"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000018", last.name]
    assert {"made.json", "metrics.jsonl", "positions.jsonl", "tensorboard", "checkpoints"} == {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert json.loads((tmp_path / "run" / "made.json").read_text())["config"]["model"]["vocab_size"] == 36
    assert seen == [False] * 3
    assert [row["heldout/bits"] for row in read_metrics(tmp_path / "run") if "heldout/bits" in row] == [1.5] * 3
    card = load_card(tmp_path / "run")
    assert card.training["step"] == 24
    assert card.training["tokens"] == 24 * 4 * (4 * 9 + 1)
    assert card.sequence == {"frames": 4, "rows": 3, "cols": 3, "stride": 4}
    assert toto.load_model(tmp_path / "run").config.vocab_size == 36


def test_micro_batches_do_not_change_the_step(config, tmp_path):
    train(replace(config, steps=3), tmp_path / "two")
    train(replace(config, steps=3, micro_batch=4), tmp_path / "four")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "four"), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch, precision):
    config = replace(config, precision=precision)
    train(config, tmp_path / "whole")
    step = loop._step

    def stop_at_ten(run, stop):
        if run.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, stop)

    monkeypatch.setattr(loop, "_step", stop_at_ten)
    with pytest.raises(InterruptedRunError, match=r"SIGTERM after step 10; add --resume"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(loop, "_step", step)
    assert newest_checkpoint(tmp_path / "run").name == "step-00000010"
    train(config, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = (toto.load_model(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_killed_process_goes_on_bit_for_bit(config, tmp_path):
    config = replace(config, steps=400, save_every=5)
    train(config, tmp_path / "whole")
    with (tmp_path / "config.pkl").open("wb") as handle:
        pickle.dump(config, handle)
    script = (
        "import pickle, sys, torch; from pathlib import Path; from toto.training.loop import train\n"
        "torch.set_num_threads(1)\n"
        "train(pickle.load(open(sys.argv[1], 'rb')), Path(sys.argv[2]), resume=True)"
    )
    out, kills = tmp_path / "run", 0
    for target in (20, 120, 10**9):
        words = [sys.executable, "-c", script, str(tmp_path / "config.pkl"), str(out)]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (len(losses(out)) >= target if out.exists() else False):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2
    assert losses(out) == losses(tmp_path / "whole")


def test_a_folder_with_a_run_is_neither_overwritten_nor_continued_as_another(config, tmp_path, video_store):
    train(replace(config, steps=6), tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        train(replace(config, steps=6), tmp_path / "run")
    faster = replace(config, steps=6, optimizer=OptimizerConfig(peak_lr=0.1, warmup_steps=5))
    with pytest.raises(ConfigError, match=r"optimizer\.peak_lr was 0\.005, is 0\.1"):
        train(faster, tmp_path / "run", resume=True)
    deeper = replace(config, steps=6, model=ModelConfig(width=32, layers=3, heads=2, mlp_hidden=64))
    with pytest.raises(ConfigError, match=r"model\.layers was 2, is 3"):
        train(deeper, tmp_path / "run", resume=True)


def test_shards_may_move_but_not_change(config, tmp_path, video_store):
    moved = tmp_path / "moved"
    shutil.copytree(video_store, moved)
    train(replace(config, steps=3), tmp_path / "run")
    sources = (replace(config.data.sources[0], path=moved), config.data.sources[1])
    other = replace(config, steps=3, data=replace(config.data, sources=sources))
    train(other, tmp_path / "run", resume=True)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(sealed(manifest | {"job": {"seed": 1}})))
    with pytest.raises(CheckpointError, match="other shards"):
        train(other, tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_stops_with_step_items_and_last_good_checkpoint(config, tmp_path, monkeypatch):
    loss_of = parallel.next_token_loss
    calls = []

    def poisoned(*inputs):
        calls.append(None)
        loss = loss_of(*inputs)
        return replace(loss, mean=loss.mean * float("nan")) if len(calls) == 15 else loss

    monkeypatch.setattr(parallel, "next_token_loss", poisoned)
    with pytest.raises(NonFiniteLossError) as error:
        train(config, tmp_path / "run")
    assert "at step 8" in str(error.value)
    assert "step-00000006" in str(error.value)
    report = json.loads((tmp_path / "run" / "non-finite-step-8.json").read_text())
    assert len(report["batch"]) == 4
    assert all(item.startswith(("video", "image")) for window in report["batch"] for item, _ in window["origin"])
    monkeypatch.setattr(parallel, "next_token_loss", loss_of)
    train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_trainer_state_executes_no_pickle(config, tmp_path):
    train(replace(config, steps=2, save_every=1), tmp_path / "run")
    checkpoint = newest_checkpoint(tmp_path / "run")

    class Gadget:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (checkpoint / "trainer" / ".metadata").write_bytes(pickle.dumps(Gadget()))
    model = load_model(checkpoint)
    with pytest.raises(CheckpointError, match=r"posix\.system, which is not allowed"):
        restore_checkpoint(checkpoint, model, make_optimizer(model, config.optimizer))
    assert not (tmp_path / "owned").exists()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["trainer/__0_0.distcp", "trainer/.metadata", "model.safetensors", "config.json"])
def test_of_a_damaged_newest_checkpoint_the_one_before_is_used_loudly(config, tmp_path, capsys, name):
    short = replace(config, steps=6, save_every=2)
    train(short, tmp_path / "whole")
    train(replace(short, steps=4), tmp_path / "first")
    run = tmp_path / "run"
    train(short, run)
    damage(run / "checkpoints" / "step-00000006" / name)
    capsys.readouterr()
    train(short, run, resume=True)
    said = capsys.readouterr().err
    assert "DAMAGED CHECKPOINT, NOT USED" in said
    assert name in said
    assert "going on from the one before" in said
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "damaged-step-00000006",
        "step-00000004",
        "step-00000006",
    ]
    assert losses(run) == losses(tmp_path / "whole")
    for path in checkpoints(run):
        damage(path / name)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged; begin anew"):
        train(short, run, resume=True)


def test_a_missing_file_is_damage_and_old_checkpoints_have_no_checksums(config, tmp_path):
    checkpoint = train(replace(config, steps=1), tmp_path / "run")
    require_whole(checkpoint)
    (checkpoint / "notes.txt").write_text("a user's own")
    require_whole(checkpoint)
    (checkpoint / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"damaged or missing: config\.json"):
        require_whole(checkpoint)
    (tmp_path / "config.json").rename(checkpoint / "config.json")
    (checkpoint / "checksums.json").unlink()
    require_whole(checkpoint)


def test_metrics_tell_speed_waiting_memory_and_bits(config, tmp_path):
    short = replace(config, steps=4, log_every=1, data=replace(config.data, short_steps=2, short_frames=1))
    train(short, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert len(rows) == 4
    model = load_model(tmp_path / "run").config
    cells = math.prod(TokenStore(config.data.sources[0].path).grid)
    for row in rows:
        assert row["train/bits_per_token"] == pytest.approx(row["train/loss"] / math.log(2))
        assert 0 <= row["speed/data_wait"] < 1
        assert 0.05 < row["memory/peak_gb"] < 64
        frames = 1 if row["step"] <= 2 else config.data.frames
        sequences = config.batch * config.data.frames // frames
        flops = training_flops(model, batch=sequences, positions=frames * cells + 1).total
        seconds = flops / row["speed/gflops"] / 1e9
        tokens = config.batch * (config.data.frames * cells + 1)
        assert row["speed/tokens_per_second"] * seconds == pytest.approx(tokens, rel=1e-3)


def test_checkpoints_of_every_so_many_steps_are_kept(config, tmp_path):
    train(replace(config, steps=9, save_every=1, keep=2, keep_every=3), tmp_path / "run")
    assert [int(path.name[-2:]) for path in checkpoints(tmp_path / "run")] == [3, 6, 8, 9]


def test_a_run_can_start_from_anothers_weights(config, tmp_path):
    train(replace(config, data=replace(config.data, frames=2)), tmp_path / "short")
    longer = replace(config, init=str(tmp_path / "short"))
    train(longer, tmp_path / "long")
    train(config, tmp_path / "anew")
    assert losses(tmp_path / "long")[1] < losses(tmp_path / "anew")[1] - 0.2
    wider = replace(longer, model=replace(config.model, mlp_hidden=80))
    with pytest.raises(ConfigError, match=r"another architecture \(mlp_hidden was 64, is 80"):
        train(wider, tmp_path / "wider")


def test_the_schedule_warms_up_and_ends_at_its_floor():
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=10, floor=0.1)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    torch_model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(torch_model, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": 3}, {"micro_batch": 0}, {"keep": 0}, {"keep_every": 7, "save_every": 2}]
)
def test_impossible_runs_are_refused(config, wrong):
    with pytest.raises(ConfigError):
        replace(config, **wrong)
