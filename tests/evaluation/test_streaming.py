"""Streamed features: the same scores as kept ones, other views in every epoch, and clips that can't be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from toto.evaluation.backbones.pixels import PixelBackbone
from toto.evaluation.finetune_config import Augmentation
from toto.evaluation.labelled import extract, procedural_clips
from toto.evaluation.probe import ProbeConfig, train_probes
from toto.evaluation.read_out import ProbeData, probe
from toto.evaluation.streaming import StreamedFeatures
from toto.runtime.errors import ConfigError, MediaError

CONFIG = ProbeConfig(epochs=3, batch=8, heads=2, rates=(1e-2, 1e-1))


def backbone():
    return PixelBackbone(size=16, grid=4, frames=2)


def some_clips(seed, count, *, broken=()):
    """Procedural clips, some of which can't be read."""
    clips = procedural_clips(seed, count, frames=2, size=16)

    def read(number):
        if number in broken:
            raise MediaError("is broken", where=clips.ids[number])
        return clips.read(number)

    return replace(clips, read=read)


@pytest.mark.parametrize("standardise", ["training-set", "running"])
def test_streamed_and_kept_features_give_the_same_scores(standardise):
    config, train, test = replace(CONFIG, standardise=standardise), some_clips(1, 36), some_clips(2, 12)
    kept = [extract(backbone(), clips, batch=5).features for clips in (train, test)]
    streamed = [StreamedFeatures(backbone=backbone(), clips=clips, batch=3) for clips in (train, test)]
    pairs = zip(*(train_probes(*sides, classes=6, config=config) for sides in (kept, streamed)), strict=True)
    for ours, theirs in pairs:
        assert (ours.layer, ours.pool, ours.rate, ours.validation) == (
            theirs.layer, theirs.pool, theirs.rate, theirs.validation,
        )  # fmt: skip
        assert torch.equal(ours.correct, theirs.correct)


def test_every_epoch_shows_another_part_and_measuring_shows_the_centre():
    source = StreamedFeatures(backbone=backbone(), clips=some_clips(1, 6), augmentation=Augmentation())
    numbers = [torch.arange(6)]

    def features(epoch):
        (batch,) = source.batches(numbers, epoch)
        return batch.by_layer[0]

    assert torch.equal(features(1), features(1))
    assert not torch.equal(features(1), features(2))
    centre = extract(backbone(), some_clips(1, 6), batch=6).features.by_layer[0]
    assert torch.equal(features(None), centre)


def test_streamed_clips_that_cannot_be_read_are_counted_never_replaced():
    train, test = some_clips(1, 36, broken=(0, 7)), some_clips(2, 12, broken=(3,))
    found = probe(backbone(), train, test, config=CONFIG, data=ProbeData(features="streamed", batch=4))
    assert (found.offered, found.evaluated, found.failed) == (12, 11, 1)
    assert found.ledger == {"train": {"ok": 34, "corrupt": 2}, "test": {"ok": 11, "corrupt": 1}}
    assert found.protocol["train_clips"] == 34
    assert [row["id"] for row in found.details["failures"]] == ["procedural/1/0", "procedural/1/7", "procedural/2/3"]
    with pytest.raises(ConfigError, match="no clip of a split could be read"):
        probe(backbone(), train, some_clips(2, 6, broken=range(6)), config=CONFIG, data=ProbeData(features="streamed"))


def test_the_whole_grid_is_in_the_record_and_the_best_of_it_by_layer():
    config = replace(CONFIG, decays=(0.0, 0.1))
    result = probe(backbone(), some_clips(1, 36), some_clips(2, 12), config=config)
    grid = result.details["grid"]
    assert len(grid) == 2 * 2 * 2
    assert {(row["rate"], row["decay"]) for row in grid} == set(config.settings)
    for row in result.details["by_layer"]:
        same = [point for point in grid if point["pool"] == row["pool"]]
        assert row["validation"] == max(point["validation"] for point in same)
        assert row["low"] <= row["test"] <= row["high"]
        assert row["test"] <= row["top5"] <= 1
        assert result.metrics[f"{row['pool']}_accuracy"].value == row["test"]
        assert result.metrics[f"{row['pool']}_top5"].value == row["top5"]


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="kept features are of one view"):
        ProbeData(augmentation=Augmentation())
    with pytest.raises(ConfigError, match="rates"):
        ProbeConfig(rates=())
    with pytest.raises(ConfigError, match="epochs"):
        ProbeConfig(epochs=0)
    with pytest.raises(ConfigError, match=r"layers \[7\] asked"):
        probe(backbone(), some_clips(1, 12), some_clips(2, 6), config=replace(CONFIG, layers=(7,)))
