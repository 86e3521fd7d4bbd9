"""The order: a pure function of (seed, step, slot), with exact ratios."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from conftest import PASSPORT, make_store
from hypothesis import given
from hypothesis import strategies as st

from toto.runtime.errors import ConfigError, PassportError
from toto.tokens.passport import Passport
from toto.training.mixture import Mixture, SourceConfig, block_shares, locate, sequences_of
from toto.training.permutation import permuted


@given(st.integers(1, 400), st.integers(0, 2**62))
def test_a_permutation_visits_everything_once(count, seed):
    assert sorted(permuted(index, count, seed) for index in range(count)) == list(range(count))


def test_permutations_differ_by_seed_and_scatter_neighbours():
    first = [permuted(index, 1000, 1) for index in range(1000)]
    assert first != [permuted(index, 1000, 2) for index in range(1000)]
    steps = [abs(a - b) for a, b in itertools.pairwise(first)]
    assert 250 < sum(steps) / len(steps) < 420  # a third of the range for independent draws


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 99))
def test_ratios_hold_exactly_over_every_block_and_draws_are_counted(weights, seed):
    shares = block_shares([float(weight) for weight in weights])
    places = [locate(number, shares, seed) for number in range(3 * sum(shares))]
    for source, share in enumerate(shares):
        assert [draw for which, draw in places if which == source] == list(range(3 * share))


def test_the_papers_mixture_is_two_one_one_six():
    assert block_shares([0.2, 0.1, 0.1, 0.6]) == (2, 1, 1, 6)
    assert block_shares([20, 10, 10, 60]) == (2, 1, 1, 6)


@pytest.fixture
def mixture(video_store, image_store):
    sources = (
        SourceConfig(path=video_store, weight=0.75),
        SourceConfig(path=image_store, weight=0.25, modality="image"),
    )
    return Mixture(sources, frames=4, seed=5)


def test_any_batch_can_be_asked_for_first(mixture, video_store, image_store):
    in_turn = [mixture.windows(step, 4) for step in range(20)]
    again = Mixture(tuple(source.config for source in mixture.sources), frames=4, seed=5)
    for step in (17, 3, 11):
        assert sequences_of(again.windows(step, 4)).equal(sequences_of(in_turn[step]))
    flat = [window for batch in in_turn for window in batch]
    assert sequences_of(again.windows(7, 8)).equal(sequences_of(flat[56:64]))  # the batch size only cuts the order
    other = Mixture(tuple(source.config for source in mixture.sources), frames=4, seed=6)
    assert not sequences_of(other.windows(0, 8)).equal(sequences_of(flat[:8]))


def test_an_epoch_holds_every_window_once_and_the_next_one_others(mixture):
    videos = mixture.sources[0]
    assert str(videos).endswith("19 windows of 4 in an epoch, 1 videos shorter than 4 frames left out")
    assert videos.draws_per_epoch == 20 // 4 + 9 // 4 + 1 + 33 // 4 + 0 + 12 // 4
    epochs = [
        [videos.draw(epoch * videos.draws_per_epoch + draw).origin for draw in range(videos.draws_per_epoch)]
        for epoch in range(6)
    ]
    for epoch in epochs:
        seen = Counter(frame for ((item, start),) in epoch for frame in ((item, start + i) for i in range(4)))
        assert max(seen.values()) == 1  # no frame twice in an epoch
        assert Counter(item for ((item, _),) in epoch) == {
            "video0": 5,
            "video1": 2,
            "video2": 1,
            "video3": 8,
            "video5": 3,
        }
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # windows start elsewhere
    assert epochs[0] != epochs[1]


def test_a_window_holds_the_frames_its_origin_names(mixture):
    for number in range(40):
        window = mixture.window(number)
        store = mixture.sources[window.source].store
        names = store.table.column("id").to_pylist()
        if window.modality == "video":
            ((item, start),) = window.origin
            assert window.codes.equal(store.codes(names.index(item), start, 4))
        else:
            assert len(window.origin) == 4
            for place, (item, _) in enumerate(window.origin):
                assert window.codes[place : place + 1].equal(store.codes(names.index(item)))


def test_short_sequences_are_the_same_windows_cut(mixture):
    windows = mixture.windows(3, 4)
    short = sequences_of(windows, 2)
    assert short.shape == (8, 2 * 9 + 2)
    assert short[:, 1:-1].reshape(4, -1).equal(sequences_of(windows)[:, 1:-1])
    assert short[::2, 0].equal(short[1::2, 0])


def test_image_groups_go_through_all_images_before_one_comes_again(mixture):
    images = mixture.sources[1]
    drawn = [item for number in range(11) for item, _ in images.draw(number).origin]
    for epoch in range(4):
        assert len(set(drawn[11 * epoch : 11 * (epoch + 1)])) == 11
    assert drawn[:11] != drawn[11:22]


def test_mixtures_that_make_no_sense_are_refused(video_store, image_store, tmp_path):
    with pytest.raises(ConfigError, match="no source"):
        Mixture((), frames=4, seed=0)
    with pytest.raises(ConfigError, match="not positive"):
        Mixture((SourceConfig(path=video_store, weight=0.0),), frames=4, seed=0)
    with pytest.raises(ConfigError, match="holds no video of 40 frames"):
        Mixture((SourceConfig(path=video_store, weight=1.0),), frames=40, seed=0)
    with pytest.raises(ConfigError, match="holds no image"):
        Mixture((SourceConfig(path=video_store, weight=1.0, modality="image"),), frames=4, seed=0)
    stranger = make_store(
        tmp_path / "x", videos=(9,), passport=Passport(**{**vars(PASSPORT), "weights_sha256": "b" * 64})
    )
    with pytest.raises(PassportError, match="weights_sha256 bbbbbbbbbbbb"):
        Mixture((SourceConfig(path=video_store, weight=1.0), SourceConfig(path=stranger, weight=1.0)), frames=4, seed=0)
