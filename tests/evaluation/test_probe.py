"""Probes: AIM's head exactly, training together equal to training alone, and honest choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_photo, make_video

from toto.evaluation.labelled import catalog_clips, extract, procedural_clips, split_by_share
from toto.evaluation.probe import AttentionHead, Features, ProbeConfig, chosen, train_heads, train_probes
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


def test_the_attention_head_is_multi_head_attention_with_one_query():
    torch.manual_seed(0)
    head = AttentionHead(12, 5, heads=3)
    tokens = torch.randn(4, 7, 12)
    reference = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    reference.in_proj_weight.data = torch.cat([torch.eye(12), head.key.weight, head.value.weight])
    reference.out_proj.weight.data = torch.eye(12)
    pooled, _ = reference(head.query.reshape(1, 1, 12).expand(4, 1, 12), tokens, tokens)
    torch.testing.assert_close(head(tokens), head.linear(pooled[:, 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["average", "attention"])
def test_rates_trained_together_equal_rates_trained_alone(pool):
    features = separable(48, seed=0)
    tokens = features.by_layer[2] if pool == "attention" else features.by_layer[1].mean(1, keepdim=True)
    config = replace(QUICK, rates=(1e-3, 1e-2))
    together = train_heads(2, pool, tokens, features.labels, classes=3, config=config)
    for number, rate in enumerate(config.rates):
        (alone,) = train_heads(2, pool, tokens, features.labels, classes=3, config=replace(config, rates=(rate,)))
        for ours, theirs in zip(together[number].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_each_layer_and_head_finds_what_is_there():
    scores = train_probes(separable(150, seed=1), separable(90, seed=2), classes=3, config=replace(QUICK, epochs=30))
    accuracy = {(score.layer, score.pool): float(score.correct.float().mean()) for score in scores}
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


class CountingBackbone:
    """Features that say which clip they are of."""

    layers, frame_size, frames = (0,), 16, 4

    def features(self, frames):
        return {0: frames.float().mean(dim=(1, 2, 3))[:, None, :]}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_unreadable_clips_are_counted_never_replaced(tmp_path, batch):
    for label in ("a", "b"):
        for number in range(3):
            make_video(tmp_path / label / f"{number}.mp4", frames=20, size=32, number=number)
    (tmp_path / "a" / "1.mp4").write_text("broken")
    make_video(tmp_path / "b" / "2.mp4", frames=5, size=32)
    clips = catalog_clips(str(tmp_path), frames=4, stride=4)
    found = extract(CountingBackbone(), clips, batch=batch)
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
