"""Guards: spikes are said once, diverged runs are ended with a remedy, healthy ones never."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toto.model.config import ModelConfig
from toto.runtime.errors import ConfigError, DivergedError
from toto.training.config import DataConfig, TrainConfig
from toto.training.guard import Guard, GuardConfig
from toto.training.loop import train
from toto.training.optimizer import OptimizerConfig
from toto.training.source import SourceConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
LARGE = math.log(8196)
STRICT = GuardConfig(patience=50)


def new_guard(tmp_path, *, config=STRICT, blind=LARGE, warmup=0, changes=()):
    optimizer = OptimizerConfig(peak_lr=0.5, warmup_steps=warmup)
    return Guard(config, out=tmp_path, blind=blind, optimizer=optimizer, changes=changes)


def feed(guard, losses, *, first=1):
    for step, loss in enumerate(losses, start=first):
        guard.check(step, float(loss), 1.0, lambda: "clip_17")


def healthy(steps, *, start=LARGE, end=4.0, noise=0.1, seed=0):
    """A loss that falls like a power of the step, with the noise of small batches."""
    rng = np.random.default_rng(seed)
    return end + (start - end) * (1 + np.arange(steps) / 20) ** -0.5 + rng.normal(0, noise, steps)


def test_the_golden_curve_is_healthy(tmp_path, capfd):
    guard = new_guard(tmp_path, config=GuardConfig(patience=5), blind=math.log(36), warmup=5)
    feed(guard, json.loads(GOLDEN.read_text()).values())
    assert guard.spikes == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_noisy_healthy_curves_are_left_alone(tmp_path, noise, seed):
    guard = new_guard(tmp_path)
    feed(guard, healthy(3000, noise=noise, seed=seed))
    assert guard.spikes == 0


def test_sources_of_very_different_losses_are_no_spikes(tmp_path):
    """One sequence a step, a fifth of them images, five nats above the videos."""
    losses = healthy(3000, end=1.0) + 5.0 * (np.random.default_rng(1).random(3000) < 0.2)
    guard = new_guard(tmp_path)
    feed(guard, losses)
    assert guard.spikes <= 3


@pytest.mark.parametrize("jump", [1.0, 2.0])
def test_a_mixture_that_becomes_harder_is_no_divergence(tmp_path, jump):
    guard = new_guard(tmp_path)
    feed(guard, [*healthy(1000), *(healthy(2000, seed=1)[1000:] + jump)])
    assert guard.spikes <= 1


def test_a_known_change_of_the_data_may_raise_the_loss_by_anything(tmp_path):
    losses = [*healthy(1000, end=1.0), *(healthy(2000, start=1.5, end=1.0) + 6.0)]
    feed(new_guard(tmp_path, changes=[1000]), losses)
    with pytest.raises(DivergedError):
        feed(new_guard(tmp_path), losses)


def test_a_long_bad_beginning_is_healthy_while_it_comes_down(tmp_path):
    """A scale of the first weights that is far off: 30 nats, coming down over 2,000 steps."""
    feed(new_guard(tmp_path), np.interp(np.arange(3000), [0, 2000, 3000], [30, 6, 5]))


def test_pixel_errors_are_healthy(tmp_path):
    guard = new_guard(tmp_path, blind=1.0)
    feed(guard, healthy(2000, start=1.3, end=0.4, noise=0.03))
    assert guard.spikes == 0


def test_a_spike_is_said_once_and_counted(tmp_path, capfd):
    losses = healthy(400)
    losses[300:304] += [3.0, 3.5, 3.2, 2.9]
    guard = new_guard(tmp_path)
    feed(guard, losses)
    said = capfd.readouterr().err.splitlines()
    assert guard.spikes == len(said) == 1
    assert said[0].startswith("step 301: the loss jumped to ")
    assert said[0].endswith("items clip_17")
    far = healthy(600)
    far[200], far[400] = 9.0, 9.0
    guard = new_guard(tmp_path)
    feed(guard, far)
    assert guard.spikes == 2


@pytest.mark.parametrize(("level", "blind", "end"), [(8.2, LARGE, 4.0), (3.4, math.log(36), 1.2), (1.0, 1.0, 0.4)])
def test_a_run_that_falls_back_to_guessing_has_diverged(tmp_path, level, blind, end):
    (tmp_path / "checkpoints" / "step-00000500").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00001050").mkdir(parents=True)
    losses = np.concatenate([healthy(1000, start=blind, end=end, noise=0.02), np.full(400, level)])
    with pytest.raises(DivergedError) as error:
        feed(new_guard(tmp_path, blind=blind, warmup=100), losses)
    text = str(error.value)
    assert "lower optimizer.peak_lr (0.5) or raise optimizer.warmup_steps (100)" in text
    assert f"--init {tmp_path}/checkpoints/step-00000500" in text
    assert f"diverged: the median loss is {level:.3f}" in text
    assert "\n" not in text


def test_an_explosion_ends_a_run_at_once_and_a_wild_beginning_does_not(tmp_path):
    curve = np.concatenate([healthy(40), np.full(9, 30.0), healthy(200)[40:], np.full(10, 30.0)])
    with pytest.raises(
        DivergedError, match=r"exploded: the loss is 30\.000 at step 219, and was above 2 times the 9\.011"
    ):
        feed(new_guard(tmp_path, warmup=1000), curve)
    feed(new_guard(tmp_path), np.geomspace(100, 8, 200))


def test_without_stop_it_is_said_once(tmp_path, capfd):
    guard = new_guard(tmp_path, config=GuardConfig(patience=50, stop=False))
    feed(guard, np.concatenate([healthy(500, noise=0.0), np.full(2000, 8.5)]))
    assert [line for line in capfd.readouterr().err.splitlines() if "diverged" in line] != []
    assert guard.spikes == 1


def test_the_warm_up_is_not_judged(tmp_path):
    losses = np.full(400, 20.0)
    feed(new_guard(tmp_path, warmup=400), losses)
    with pytest.raises(DivergedError, match=r"a blind guess has 9\.011"):
        feed(new_guard(tmp_path), losses)


@pytest.mark.parametrize("stop", [10, 90, 305, 420, 470])
def test_a_run_that_goes_on_is_judged_alike(tmp_path, stop, capfd):
    losses = np.concatenate([healthy(400), np.full(400, 8.5)])
    losses[300:303] += 4

    def ends(guard, first):
        with pytest.raises(DivergedError) as error:
            feed(guard, losses[first:], first=first + 1)
        return str(error.value), guard.spikes

    expected = ends(new_guard(tmp_path), 0)
    before = new_guard(tmp_path)
    feed(before, losses[:stop])
    after = new_guard(tmp_path)
    after.restore(json.loads(json.dumps(before.state())))
    assert ends(after, stop) == expected


def test_options_are_checked():
    with pytest.raises(ConfigError, match="must be positive"):
        GuardConfig(spike=0)
    with pytest.raises(ConfigError, match="at least 1"):
        GuardConfig(patience=0)


def test_an_exploding_learning_rate_is_caught_and_a_good_one_is_not(video_store, tmp_path):
    good = TrainConfig(
        data=DataConfig(sources=(SourceConfig(path=video_store, weight=1),), frames=4),
        model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64),
        optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=5),
        steps=260,
        batch=4,
        micro_batch=4,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=1000,
        eval_every=1000,
    )
    exploding = replace(good, optimizer=OptimizerConfig(peak_lr=10.0, warmup_steps=5), steps=100)

    train(good, tmp_path / "good")
    with pytest.raises(DivergedError, match=r"exploded: .* lower optimizer.peak_lr \(10\)"):
        train(exploding, tmp_path / "exploding")
