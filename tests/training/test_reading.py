"""Reading while training: changes of the mixture, checks, and the thread that reads ahead."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import make_store

from toto.__main__ import main
from toto.commands.parsing import parse_change, parse_source
from toto.model.config import ModelConfig
from toto.runtime.errors import ConfigError, StoreError
from toto.runtime.files import read_json, write_json
from toto.runtime.metrics import read_metrics
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.mixture import Mixture, MixtureChange
from toto.training.prefetch import ReadAhead
from toto.training.source import SourceConfig


@pytest.fixture(scope="module")
def third_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "third", videos=(40, 17), seed=9)


@pytest.fixture
def config(video_store, image_store):
    sources = (
        SourceConfig(path=video_store, weight=0.5),
        SourceConfig(path=image_store, weight=0.5, modality="image"),
    )
    return TrainConfig(
        data=DataConfig(sources=sources, frames=4),
        model=ModelConfig(width=32, layers=1, heads=2, mlp_hidden=48),
        steps=8,
        batch=4,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=4,
    )


def losses(run):
    return {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def stopped_after(config, step, out):
    """Train, and forget all checkpoints after `step`."""
    train(replace(config, keep=9), out)
    for number in range(step + 1, config.steps + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{number:08d}", ignore_errors=True)


def test_a_change_leaves_the_steps_before_it_alone(config, tmp_path):
    train(config, tmp_path / "plain")
    train(with_data(config, schedule=(MixtureChange(step=5, weights=(0.1, 0.9)),)), tmp_path / "changed")
    plain, changed = losses(tmp_path / "plain"), losses(tmp_path / "changed")
    assert next(step for step in plain if plain[step] != changed[step]) == 6  # steps are logged when they are done


def test_a_run_that_is_resumed_with_a_later_change_goes_on_as_one_that_knew_it(config, tmp_path, third_store):
    new = SourceConfig(path=third_store, weight=0)
    grown = with_data(
        config, sources=(*config.data.sources, new), schedule=(MixtureChange(step=5, weights=(0.2, 0.2, 0.6)),)
    )
    train(grown, tmp_path / "whole")
    stopped_after(config, 4, tmp_path / "run")
    train(grown, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(read_json(tmp_path / "run" / "made.json", what="")["config"]["data"]["schedule"]) == 1
    assert read_json(tmp_path / "run" / "made-before-step-5.json", what="")["config"]["data"]["schedule"] == []
    train(grown, tmp_path / "run", resume=True)  # and again
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"sources"):  # the source has been drawn from by now
        train(config, tmp_path / "run", resume=True)


def test_a_change_before_the_resumed_step_is_refused(config, tmp_path, third_store):
    stopped_after(config, 4, tmp_path / "run")
    for step in (2, 3):
        late = with_data(config, schedule=(MixtureChange(step=step, weights=(0.2, 0.8)),))
        with pytest.raises(
            ConfigError, match=r"data\.schedule before step 4 was \[\], is \[{'step': \d.*; use the same"
        ):
            train(late, tmp_path / "run", resume=True)
    at_once = with_data(config, schedule=(MixtureChange(step=4, weights=(0.2, 0.8)),))
    train(at_once, tmp_path / "run", resume=True)
    train(at_once, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_schedules_that_make_no_sense(config, video_store):
    change = MixtureChange(step=5, weights=(0.5, 0.5))
    with pytest.raises(ConfigError, match="don't rise"):
        with_data(config, schedule=(change, change))
    with pytest.raises(ConfigError, match="don't rise"):
        with_data(config, schedule=(replace(change, step=0),))
    with pytest.raises(ConfigError, match="1 weights for 2 sources at step 5"):
        with_data(config, schedule=(replace(change, weights=(1.0,)),))
    sources = (SourceConfig(path=video_store, weight=1), SourceConfig(path=video_store, weight=0))
    with pytest.raises(ConfigError, match="not positive; leave the source out"):
        Mixture(sources, frames=4, seed=0)
    with pytest.raises(ConfigError, match=r"weight -1\.0"):
        Mixture(sources, frames=4, seed=0, changes=((9, (2.0, -1.0)),))


def test_changes_as_words():
    sources = tuple(parse_source(text) for text in ("a=0.5", "image:a=0.5", "b=0"))
    first = parse_change(("1000", "b=0.6", "image:a=0.2"), sources, before=None)
    assert first == MixtureChange(step=1000, weights=(0.5, 0.2, 0.6))
    assert parse_change(("2000", "a=0"), sources, before=first).weights == (0, 0.2, 0.6)
    for words, said in (
        (("b=0.6", "1000"), "needs a step"),
        (("1000",), "needs a step"),
        (("1000", "c=1"), "c=1 is no source of --data; add it"),
        (("1000", "a"), "a has no weight"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_change(words, sources, before=None)


def test_a_schedule_from_the_shell(video_store, image_store, third_store, tmp_path, capsys):
    words = [
        "train", "nano", "--out", tmp_path / "run", "--data", f"{video_store}=0.5", f"image:{image_store}=0.5",
        f"{third_store}=0", "--data-at", 2, f"{third_store}=0.5", "--data-at", 4, f"{video_store}=0", "--steps", 6,
        "--batch", 2, "--micro-batch", 2, "--data.frames", 4, "--model.width", 32, "--model.layers", 1,
        "--model.heads", 2, "--model.mlp-hidden", 48, "--data.checks",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    data = read_json(tmp_path / "run" / "made.json", what="")["config"]["data"]
    assert data["checks"] is True
    assert data["schedule"] == [{"step": 2, "weights": [0.5, 0.5, 0.5]}, {"step": 4, "weights": [0.0, 0.5, 0.5]}]


def test_a_flipped_bit_stops_training_before_it_is_read(config, tmp_path, video_store):
    damaged = tmp_path / "damaged"
    shutil.copytree(video_store, damaged)
    sources = (replace(config.data.sources[0], path=damaged), config.data.sources[1])
    checked = with_data(config, sources=sources, checks=True)
    train(replace(checked, steps=1), tmp_path / "good")
    flip(damaged / "frames-00000.npy")
    with pytest.raises(StoreError, match=r"frames-00000\.npy: damaged \(checksum"):
        train(checked, tmp_path / "run")
    assert losses(tmp_path / "run") == {}
    train(with_data(checked, checks=False), tmp_path / "unchecked")
    assert len(losses(tmp_path / "unchecked")) == 8
    flip(damaged / "frames-00000.npy")
    flip(damaged / "items.parquet")
    with pytest.raises(StoreError, match=r"items\.parquet: damaged"):
        Mixture(sources, frames=4, seed=0, verify="read")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_what_is_read_ahead_is_what_was_asked_for():
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step * 10

    for workers in (0, 1, 3):
        made.clear()
        ahead = ReadAhead(make, end=9, workers=workers)
        assert [ahead.take(step) for step in (0, 1, 2, 7, 8, 9)] == [0, 10, 20, 70, 80, 90]
        ahead.close()
        steps = [step for step, _ in made]
        assert max(steps) == 9
        assert len(set(steps)) == len(steps)
        assert {main for _, main in made} == {not workers}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_as_many_batches_are_made_at_once_as_there_are_workers():
    together = threading.Barrier(3, timeout=20)

    def make(step):
        if 0 < step < 4:
            together.wait()  # they wait for each other
        time.sleep(0.02)
        return step

    with closing(ReadAhead(make, end=9, workers=3)) as ahead:
        assert [ahead.take(step) for step in range(9)] == list(range(9))


def test_the_number_of_workers_may_change_in_a_run(config, tmp_path):
    train(with_data(config, workers=3), tmp_path / "whole")
    stopped_after(with_data(config, workers=2), 4, tmp_path / "run")
    record = read_json(tmp_path / "run" / "made.json", what="")
    del record["config"]["data"]["views"]  # as a run that is older than this option
    write_json(tmp_path / "run" / "made.json", record)
    train(with_data(config, workers=0), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"data\.views was all, is in-turn"):
        train(with_data(config, views="in-turn"), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="must not be negative"):
        with_data(config, workers=-1)


def test_an_error_ahead_is_raised_at_its_own_step_and_closing_waits_for_nothing_more():
    def make(step):
        if step == 1:
            raise StoreError("damaged")
        time.sleep(0.01)
        return step

    ahead = ReadAhead(make, end=5)
    assert ahead.take(0) == 0
    with pytest.raises(StoreError, match="damaged"):
        ahead.take(1)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
