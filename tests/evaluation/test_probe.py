"""Probes: what each layer and head finds, honest choices, and data that can't be probed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_photo, make_video

from toto.evaluation.backbones.pixels import PixelBackbone
from toto.evaluation.labelled import catalog_clips, extract, procedural_clips, split_by_share
from toto.evaluation.probe import Features, ProbeConfig, best_by_layer, chosen, train_probes
from toto.evaluation.read_out import probe
from toto.media.procedural import MOTIONS
from toto.runtime.errors import ConfigError

QUICK = ProbeConfig(epochs=8, batch=16, heads=2)


def separable(count: int, *, seed: int, classes: int = 3, width: int = 8) -> Features:
    """Layer 0 is noise; in layer 1 every token says the class; in layer 2 one token in ten does."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randn(3, count, 10, width, generator=generator)
    signal = torch.zeros(count, 10, width)
    signal[torch.arange(count), :, labels] = 2.0
    rare = torch.zeros(count, 10, width)
    place = torch.randint(0, 10, (count,), generator=generator)
    rare[torch.arange(count), place, labels] = 12.0
    rare[torch.arange(count), place, classes] = 12.0  # what attention can find it by
    return Features(by_layer={0: noise[0], 1: noise[1] + signal, 2: noise[2] + rare}, labels=labels)


def test_each_layer_and_head_finds_what_is_there():
    scores = train_probes(separable(150, seed=1), separable(90, seed=2), classes=3, config=replace(QUICK, epochs=30))
    accuracy = {(score.layer, score.pool): float(score.correct.float().mean()) for score in best_by_layer(scores)}
    assert accuracy[1, "average"] > 0.95
    assert accuracy[1, "attention"] > 0.9
    assert accuracy[0, "average"] < 0.6
    assert accuracy[2, "attention"] > accuracy[2, "average"] - 0.05
    assert chosen(scores, "average").layer in (1, 2)


def test_the_test_clips_choose_nothing():
    train, test = separable(60, seed=3), separable(30, seed=4)
    once = train_probes(train, test, classes=3, config=QUICK)
    shuffled = Features(by_layer=test.by_layer, labels=test.labels.roll(1))
    again = train_probes(train, shuffled, classes=3, config=QUICK)
    assert [(score.layer, score.pool, score.rate, score.validation) for score in once] == [
        (score.layer, score.pool, score.rate, score.validation) for score in again
    ]


def test_a_class_without_training_clips_is_refused():
    features = separable(30, seed=0)
    with pytest.raises(ConfigError, match=r"classes \[3\] have no training clip"):
        train_probes(features, features, classes=4, config=QUICK)
    lonely = Features(by_layer={0: torch.randn(3, 2, 8)}, labels=torch.tensor([0, 0, 1]))
    with pytest.raises(ConfigError, match="single training clip"):
        train_probes(lonely, lonely, classes=2, config=QUICK)
    with pytest.raises(ConfigError, match="3 heads don't divide"):
        train_probes(features, features, classes=3, config=replace(QUICK, heads=3))
    with pytest.raises(ConfigError, match=r"10 training labels lie beyond the 2 classes \(the first: 2\)"):
        train_probes(features, features, classes=2, config=QUICK)
    unlabelled = replace(features, labels=torch.where(features.labels == 1, -1, features.labels))
    with pytest.raises(ConfigError, match=r"10 test labels lie beyond the 3 classes \(the first: -1\)"):
        train_probes(features, unlabelled, classes=3, config=QUICK)
    empty = Features(by_layer={0: torch.zeros(0, 2, 8)}, labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no test clips"):
        train_probes(features, empty, classes=3, config=QUICK)


@pytest.mark.parametrize("standardise", ["training-set", "running"])
def test_fewer_clips_than_a_batch_and_a_last_batch_of_one(standardise):
    for count, batch in ((9, 64), (12, 8)):  # of twelve, nine are fitted: the last batch would be of one
        config = replace(QUICK, batch=batch, standardise=standardise, epochs=3)
        scores = train_probes(separable(count, seed=0), separable(3, seed=1), classes=3, config=config)
        assert len(scores) == 3 * 2 * 3
        assert all(0 <= score.validation <= 1 for score in scores)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_unreadable_clips_are_counted_never_replaced(tmp_path, batch):
    for label in ("a", "b"):
        for number in range(3):
            make_video(tmp_path / label / f"{number}.mp4", frames=20, size=32, number=number)
    (tmp_path / "a" / "1.mp4").write_text("broken")
    make_video(tmp_path / "b" / "2.mp4", frames=5, size=32)
    clips = catalog_clips(str(tmp_path), frames=4, stride=4)
    found = extract(PixelBackbone(size=16, frames=4), clips, batch=batch)
    assert found.features.labels.tolist() == [0, 0, 1, 1]
    assert len(found.features.by_layer[0]) == 4
    assert [(row.id, row.status) for row in found.unused] == [("a/1.mp4", "corrupt"), ("b/2.mp4", "short")]


def test_folders_that_are_no_classes_are_refused(tmp_path):
    make_photo(tmp_path / "a" / "x.jpg")
    make_photo(tmp_path / "loose.jpg")
    with pytest.raises(ConfigError, match=r"1 items have no label .*sort them by class"):
        catalog_clips(str(tmp_path), frames=4, stride=4)
    (tmp_path / "loose.jpg").unlink()
    make_video(tmp_path / "b" / "v.mp4", frames=4, size=32)
    with pytest.raises(ConfigError, match="images and videos"):
        catalog_clips(str(tmp_path), frames=4, stride=4)
    (tmp_path / "b" / "v.mp4").unlink()
    make_photo(tmp_path / "b" / "y.jpg")
    with pytest.raises(ConfigError, match="classes b are not among"):
        catalog_clips(str(tmp_path), frames=4, stride=4, classes=("a", "c"))


def test_a_split_holds_back_some_of_every_class_and_shares_nothing():
    clips = procedural_clips(0, 60, frames=4, size=16)
    train, test = split_by_share(clips, 0.3, seed=1)
    assert not set(train.ids) & set(test.ids)
    assert len(train.ids) + len(test.ids) == 60
    assert sorted(test.labels) == sorted(list(range(len(MOTIONS))) * 3)
    assert test.read(4).source == test.ids[4]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_share(clips, 1.5, seed=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rates": (1e-3, float("nan"))}, "--rates: must be positive, is nan"),
        ({"rates": (0.0,)}, "--rates: must be positive"),
        ({"rates": (float("inf"),)}, "--rates: must be positive"),
        ({"decays": (-1.0,)}, "--decays: must be 0 or more"),
    ],
)
def test_rates_and_decays_are_numbers_that_can_be(options, match):
    with pytest.raises(ConfigError, match=match):
        replace(QUICK, **options)


def test_classes_are_looked_at_before_anything_is_computed():
    clips = procedural_clips(0, 24, frames=2, size=16)
    alone = clips.subset([number for number, label in enumerate(clips.labels) if label != 2] + [clips.labels.index(2)])
    for train, match in (
        (alone, f"fewer than two training items of class {clips.classes[2]}"),
        (replace(clips, classes=clips.classes[:1], labels=(0,) * len(clips.labels)), "has one class"),
    ):
        with pytest.raises(ConfigError, match=match):
            probe(PixelBackbone(size=16, grid=4, frames=2), train, clips, config=QUICK)
