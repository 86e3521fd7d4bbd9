"""Errors of predicted patches and their baselines, and features of models that take patches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from toto.evaluation.features import Backbone, TotoBackbone, open_backbone
from toto.evaluation.likelihood import heldout_evaluation, model_bits, spread_windows
from toto.evaluation.patch_error import baseline_errors, measure_errors, model_errors
from toto.evaluation.read_out import bits, patch_errors
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError
from toto.tokens.patches import normalised, patchify
from toto.tokens.sequence import pack
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.source import SourceConfig, Window

MODEL = ModelConfig(
    vocab_size=36, width=32, layers=2, heads=2, mlp_hidden=48, inputs="patches", targets="pixels", patch_values=192
)

PARTS = ("", "_first_frame", "_later_frames")


def model_of(targets):
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(MODEL, targets=targets)).eval()


@pytest.fixture
def windows(pixel_store):
    return spread_windows(SourceConfig(path=pixel_store, weight=1), frames=4, most=100, pixels=True)


def test_model_errors_are_those_of_the_patches_by_frame(windows):
    model = model_of("pixels")
    errors = model_errors(model, windows, batch=3, precision="fp32")
    assert errors.shape == (19, 4)
    patches = patchify(windows[5].pixels[None], 3, 3)
    said = model(pack(windows[5].codes[None], "video"), patches=patches).logits[:, :36]
    by_hand = (said - normalised(patches)).square().mean(dim=2).view(4, 9).mean(dim=1)
    torch.testing.assert_close(errors[5], by_hand.double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model_errors(model, windows, batch=64, precision="fp32"), errors, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="no window"):
        model_errors(model, [])


def test_baselines_on_pixels_whose_answers_are_known():
    still = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8).expand(3, 24, 24, 3)
    cut = torch.cat([still[:2], 255 - still[:1]])  # the last frame is the negative: normalised, the opposite
    flat = torch.full_like(still, 9)
    codes = torch.zeros(3, 3, 3, dtype=torch.int64)
    mean, copy = baseline_errors(
        [Window(codes=codes, modality="video", source=0, origin=(), pixels=clip) for clip in (still, cut, flat)]
    )
    one = 191 / 192  # the variance is unbiased
    expected_mean = torch.tensor([[one] * 3, [one] * 3, [0.0] * 3]).double()
    torch.testing.assert_close(mean, expected_mean, atol=1e-4, rtol=0)
    expected_copy = torch.tensor([[one, 0, 0], [one, 0, 4 * one], [0.0] * 3]).double()
    torch.testing.assert_close(copy, expected_copy, atol=1e-3, rtol=0)


def test_all_three_are_measured_on_the_same_windows(windows):
    found = measure_errors(model_of("pixels"), windows[:5], precision="fp32")
    assert found.model.shape == found.mean.shape == found.copy.shape == (5, 4)
    assert found.copy[:, 0].equal(found.mean[:, 0])


def test_bits_of_a_model_that_takes_patches_and_predicts_codes(windows):
    model = model_of("codes")
    found = model_bits(model, windows, batch=5, precision="fp32")
    sequence = pack(windows[2].codes[None], "video")
    patches = patchify(windows[2].pixels[None], 3, 3)
    logp = model(sequence[:, :-1], patches=patches).logits.log_softmax(-1)[0]
    by_hand = -logp[torch.arange(36), sequence[0, 1:-1]].view(4, 9).mean(1) / math.log(2)
    torch.testing.assert_close(found[2], by_hand.double(), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(pixel_store, tmp_path_factory):
    found = {}
    for targets in ("pixels", "codes"):
        source = (SourceConfig(path=pixel_store, weight=1),)
        config = TrainConfig(
            data=DataConfig(sources=source, heldout=source, frames=4),
            model=dataclasses.replace(MODEL, targets=targets, patch_values=None, vocab_size=None),
            steps=2,
            batch=2,
            micro_batch=2,
            device="cpu",
            precision="fp32",
        )
        found[targets] = tmp_path_factory.mktemp("runs") / targets
        train(config, found[targets], evaluate=heldout_evaluation(config))
    return found


def heldout_row(run):
    text = (run / "metrics.jsonl").read_text()
    return {name for name in ("video_patch_error", "video_bits") if f'"heldout/{name}_later_frames"' in text}


def test_training_reports_the_measure_of_its_targets(runs):
    assert heldout_row(runs["pixels"]) == {"video_patch_error"}
    assert heldout_row(runs["codes"]) == {"video_bits"}


def test_records_hold_errors_and_baselines_with_intervals(runs, pixel_store, video_store):
    source = (SourceConfig(path=pixel_store, weight=1),)
    result = patch_errors(runs["pixels"], heldout=source, precision="fp32")
    assert result.task == "patches"
    assert result.protocol["windows"] == 19
    assert (result.offered, result.evaluated, result.failed, result.skipped) == (15, 5, 1, 9)
    errors = {f"{name}_error{part}" for name in ("model", "mean", "copy") for part in PARTS}
    assert errors | {"gain_over_copy_later_frames", "missing_share"} == set(result.metrics)
    assert result.metrics["missing_share"].value == pytest.approx(1 / 6)  # a video of 3 frames
    error = result.metrics["model_error"]
    assert error.low <= error.value <= error.high
    assert result.metrics["mean_error"].value == pytest.approx(0.995, abs=0.001)
    assert len(result.details["copy_by_frame"]) == 4
    measured = bits(runs["codes"], train=source, heldout=source, precision="fp32")
    assert measured.metrics["model_bits"].value > measured.metrics["unigram_bits"].value - 1
    with pytest.raises(ConfigError, match=r"holds codes without pixels; .*--keep-pixels"):
        patch_errors(runs["pixels"], heldout=(SourceConfig(path=video_store, weight=1),))


def test_each_task_names_the_other(runs, pixel_store):
    source = (SourceConfig(path=pixel_store, weight=1),)
    with pytest.raises(ConfigError, match="predicts pixels, not codes; use `toto evaluate patches`"):
        bits(runs["pixels"], train=source, heldout=source)
    with pytest.raises(ConfigError, match="predicts codes, not pixels; use `toto evaluate bits`"):
        patch_errors(runs["codes"], heldout=source)


@pytest.mark.parametrize("targets", ["pixels", "codes"])
def test_features_of_patch_models_need_no_codes(runs, tokenizer, targets):
    backbone = open_backbone(runs[targets], tokenizer, precision="fp32")  # a stranger to the checkpoint, and not asked
    assert isinstance(backbone, TotoBackbone)
    assert isinstance(backbone, Backbone)
    frames = torch.randint(0, 256, (2, 4, 24, 24, 3), dtype=torch.uint8)
    found = backbone.features(frames)
    assert {layer: tuple(states.shape) for layer, states in found.items()} == dict.fromkeys(range(3), (2, 36, 32))
    sequence = pack(torch.randint(0, 32, (2, 4, 3, 3)), "video")
    with torch.inference_mode():
        states = backbone.model(sequence, patches=patchify(frames, 3, 3), layers=[2]).hidden_states[2]
    torch.testing.assert_close(found[2], states[:, 1:-1])
    assert backbone.features(frames[:, :1])[1].shape == (2, 9, 32)  # an image
