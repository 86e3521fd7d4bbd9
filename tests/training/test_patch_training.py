"""Training on patches: both modes learn, resume bit for bit, and take what a store holds."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import make_store

import toto
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import load_card
from toto.recipes import PRETRAINING
from toto.runtime.errors import ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.metrics import read_metrics
from toto.tokens.patches import normalised, patchify
from toto.tokens.shards import TokenStore
from toto.training import loop
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.mixture import Mixture, patches_of, sequences_of
from toto.training.objective import next_token_loss, patch_errors, token_losses
from toto.training.optimizer import OptimizerConfig
from toto.training.source import SourceConfig

MODES = ["pixels", "codes"]


@pytest.fixture
def config(pixel_store):
    sources = (
        SourceConfig(path=pixel_store, weight=3),
        SourceConfig(path=pixel_store, weight=1, modality="image"),
    )
    return TrainConfig(
        data=DataConfig(sources=sources, frames=4),
        model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64, inputs="patches", targets="pixels"),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5),
        steps=8,
        batch=4,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=4,
    )


def mode(config, targets):
    return replace(config, model=replace(config.model, targets=targets))


def losses(run):
    return {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}


def test_a_window_has_the_pixels_of_its_codes(config, pixel_store):
    store = TokenStore(pixel_store)
    names = store.table.column("id").to_pylist()
    mixture = Mixture(config.data.sources, frames=4, seed=0, pixels=True)
    windows = mixture.windows(0, 12)
    assert {window.modality for window in windows} == {"video", "image"}
    for window in windows:
        count = 4 // len(window.origin)
        for place, (item, start) in enumerate(window.origin):
            pixels = store.pixels(names.index(item), start, count)
            assert window.pixels[place * count : (place + 1) * count].equal(pixels)
    plain = Mixture(config.data.sources, frames=4, seed=0).windows(0, 12)
    assert all(a.codes.equal(b.codes) and b.pixels is None for a, b in zip(windows, plain, strict=True))
    assert patches_of(plain) is None


@pytest.mark.parametrize("frames", [None, 2, 1])
def test_patches_lie_where_their_codes_do_also_in_short_sequences(config, frames):
    windows = Mixture(config.data.sources, frames=4, seed=0, pixels=True).windows(0, 3)
    sequences, patches = sequences_of(windows, frames), patches_of(windows, frames)
    assert patches.shape == (*sequences[:, 1:-1].shape, 192)
    by_code = {}
    for code, patch in zip(sequences[:, 1:-1].flatten().tolist(), patches.flatten(0, 1), strict=True):
        assert by_code.setdefault(code, patch).equal(patch)  # in these stores a code is always the same texture


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=36, width=32, layers=2, heads=2, mlp_hidden=48, inputs="patches", targets="pixels",
            patch_values=192,
        )
    )  # fmt: skip


def test_the_error_is_that_of_the_next_patch_by_itself(model):
    sequences = torch.cat([torch.tensor([[1]]), torch.randint(4, 36, (1, 9)), torch.tensor([[2]])], dim=1)
    frames = torch.randint(0, 256, (1, 1, 24, 24, 3), dtype=torch.uint8)
    patches = patchify(frames, 3, 3)
    errors = patch_errors(model, sequences, patches)
    assert errors.shape == (1, 9)
    said = model(sequences, patches=patches).logits
    for place in (0, 5, 8):
        by_hand = (said[0, place] - normalised(patches[0, place])).square().mean()
        torch.testing.assert_close(errors[0, place], by_hand, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(next_token_loss(model, sequences, patches).mean, errors.mean())
    changed = patches.clone()
    changed[0, 8] = -changed[0, 8]
    assert patch_errors(model, sequences, changed)[0, :8].equal(errors[0, :8])  # the last patch is a target only
    with pytest.raises(ConfigError, match="predicts patches, and none are given"):
        next_token_loss(model, sequences)


def test_codes_are_classified_from_patches_with_the_end_included():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=36, width=32, layers=2, heads=2, mlp_hidden=48, inputs="patches", patch_values=192)
    )
    sequences = torch.cat([torch.tensor([[1]]), torch.randint(4, 36, (1, 9)), torch.tensor([[2]])], dim=1)
    patches = torch.randn(1, 9, 192)
    each = token_losses(model, sequences, patches)
    assert each.shape == (1, 10)
    torch.testing.assert_close(next_token_loss(model, sequences, patches).mean, each.mean())


@pytest.mark.parametrize("drift", [0, 1], ids=["still", "moving"])
def test_patch_patch_beats_the_mean_in_a_few_dozen_steps(config, tmp_path, drift):
    store = make_store(tmp_path / "s", videos=(40, 40), drift=drift, pixels=True)
    data = replace(config.data, sources=(SourceConfig(path=store, weight=1),))
    train(replace(config, data=data, steps=60), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(1, abs=0.1)
    assert sum(found[step] for step in range(56, 61)) / 5 < 0.6


def test_patch_codes_learns(config, tmp_path):
    train(replace(mode(config, "codes"), steps=60), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(3.58, abs=0.2)
    assert sum(found[step] for step in range(56, 61)) / 5 < 2.0


@pytest.mark.parametrize("targets", MODES)
def test_an_interrupted_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch, targets):
    config = replace(mode(config, targets), data=replace(config.data, short_steps=3, short_frames=2))
    train(config, tmp_path / "whole")
    step = loop._step

    def stop_at_five(run, stop):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, stop)

    monkeypatch.setattr(loop, "_step", stop_at_five)
    with pytest.raises(InterruptedRunError, match="SIGTERM after step 5"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(loop, "_step", step)
    train(config, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = (toto.load_model(tmp_path / name) for name in ("run", "whole"))
    assert all(ours.state_dict()[name].equal(weight) for name, weight in theirs.state_dict().items())
    assert ours.config.patch_values == 192
    predicted = 36 if targets == "pixels" else 37
    assert load_card(tmp_path / "run").training["tokens"] == 8 * 4 * predicted


def test_micro_batches_do_not_change_the_step(config, tmp_path):
    train(replace(config, steps=3), tmp_path / "two")
    train(replace(config, steps=3, micro_batch=4), tmp_path / "four")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "four"), rel=1e-5)


def test_a_run_can_start_from_anothers_weights_of_the_same_mode(config, tmp_path):
    train(replace(config, steps=30), tmp_path / "first")
    train(replace(config, init=str(tmp_path / "first"), steps=2), tmp_path / "second")
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1] - 0.2
    other = replace(mode(config, "codes"), init=str(tmp_path / "first"))
    with pytest.raises(ConfigError, match="targets was pixels, is codes"):
        train(other, tmp_path / "third")


def test_a_store_without_pixels_is_refused(config, video_store, tmp_path):
    data = replace(config.data, sources=(SourceConfig(path=video_store, weight=1),))
    with pytest.raises(ConfigError, match=r"codes without pixels; .*--keep-pixels"):
        train(replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops(config, tmp_path):
    rate = OptimizerConfig(peak_lr=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match="lower optimizer"):
        train(replace(config, optimizer=rate), tmp_path / "run")


def test_runs_whose_record_is_older_than_patches_go_on(config, tmp_path):
    tokens = replace(config, model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64))
    train(replace(tokens, steps=4), tmp_path / "run")
    made = json.loads((tmp_path / "run" / "made.json").read_text())
    for name in ("inputs", "targets", "patch_values"):
        del made["config"]["model"][name]
    (tmp_path / "run" / "made.json").write_text(json.dumps(made))
    train(replace(tokens, steps=4), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"model\.inputs was tokens, is patches"):
        train(replace(config, steps=4), tmp_path / "run", resume=True)


def test_table_3_is_400_epochs_of_imagenet_in_three_modes():
    runs = {name: PRETRAINING[name]() for name in PRETRAINING if name.startswith("table3")}
    modes = {name: (run.model.inputs, run.model.targets) for name, run in runs.items()}
    assert modes == {
        "table3-tokens": ("tokens", "codes"),
        "table3-patch-patch": ("patches", "pixels"),
        "table3-patch-dvae": ("patches", "codes"),
    }
    for run in runs.values():
        images = run.steps * run.batch * run.data.frames
        assert 0 <= images - 400 * 1_281_167 < run.batch * run.data.frames
        assert (run.steps, run.model.width, run.model.layers) == (125_114, 1024, 16)
