"""The order: a pure function of (seed, step, slot), with exact ratios, also where weights change."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import closing
from fractions import Fraction

import numpy as np
import pytest
from conftest import PASSPORT, make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from toto.recipes.pretraining import base, sources_of_the_paper
from toto.runtime.errors import ConfigError, PassportError
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, TokenStore, finish_store, write_ledger, write_shard
from toto.training import mixture as mixture_module
from toto.training.mixture import Mixture, sequences_of
from toto.training.order import Turns, block_shares
from toto.training.permutation import drawn, permuted
from toto.training.prefetch import ReadAhead
from toto.training.source import Source, SourceConfig


def shuffle(count, seed):
    keys = np.full(count, seed, np.uint64)
    return permuted(np.arange(count), count, keys)


@given(st.integers(1, 400), st.integers(0, 2**63 - 1))
def test_a_permutation_visits_everything_once(count, seed):
    assert sorted(shuffle(count, seed).tolist()) == list(range(count))


def test_a_permutation_is_the_same_asked_for_one_number_or_many_and_of_several_keys_at_once():
    keys = np.array([3, 4, 3, 2**64 - 1], np.uint64)
    together = permuted(np.array([5, 5, 900, 0]), 1000, keys)
    alone = [int(permuted(np.array([n]), 1000, keys[[place]])[0]) for place, n in enumerate((5, 5, 900, 0))]
    assert together.tolist() == alone
    assert together[0] == shuffle(1000, 3)[5]
    assert together[0] != together[1]
    with pytest.raises(ValueError, match="not in 0"):
        permuted(np.array([1000]), 1000, keys[:1])


def test_the_order_is_pinned():
    """Runs that were begun with it must go on with it: change these numbers in a new major version only."""
    assert permuted(np.arange(10), 10, np.full(10, 7, np.uint64)).tolist() == [0, 4, 3, 2, 9, 5, 7, 1, 8, 6]
    sources, draws = Turns([(0, [0.75, 0.25]), (6, [0.5, 0.5])], seed=5).locate(np.arange(12))
    assert sources.tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1]
    assert draws.tolist() == [0, 0, 1, 2, 3, 4, 1, 5, 2, 6, 7, 3]


def test_permutations_differ_by_seed_and_scatter_neighbours():
    first = shuffle(1000, 1).tolist()
    assert first != shuffle(1000, 2).tolist()
    steps = [abs(a - b) for a, b in itertools.pairwise(first)]
    assert 250 < sum(steps) / len(steps) < 420  # a third of the range for independent draws
    assert abs(np.corrcoef(first, range(1000))[0, 1]) < 0.15


def test_every_arrangement_of_three_is_as_frequent():
    found = Counter(tuple(shuffle(3, int(seed))) for seed in drawn(1, np.arange(6000)))
    assert len(found) == 6
    assert max(found.values()) < 1.25 * min(found.values())


def test_draws_are_those_of_splitmix64():
    # the first three outputs of the published generator (Vigna, splitmix64.c) from state 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert drawn(1234567, np.arange(3)).tolist() == published


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.integers(0, 99))
def test_ratios_hold_exactly_over_every_block_and_draws_are_counted(weights, seed):
    shares = block_shares([float(weight) for weight in weights])
    length = sum(shares)
    sources, draws = Turns([(0, [float(weight) for weight in weights])], seed=seed).locate(np.arange(3 * length))
    for source, share in enumerate(shares):
        assert draws[sources == source].tolist() == list(range(3 * share))
        assert [(block == source).sum() for block in sources.reshape(3, length)] == [share] * 3


CHANGES = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)), max_size=4
)


@settings(deadline=None)
@given(CHANGES, st.integers(0, 99))
def test_a_change_of_weights_leaves_what_was_before_and_repeats_and_loses_no_draw(changes, seed):
    phases = [(0, [5.0, 5.0, 0.0])]
    for gap, weights in changes:
        phases.append((phases[-1][0] + gap, [float(weight) for weight in weights]))
    numbers = np.arange(phases[-1][0] + 70)
    sources, draws = Turns(phases, seed=seed).locate(numbers)
    for source in range(3):
        assert draws[sources == source].tolist() == list(range((sources == source).sum()))
    for count, (first, weights) in enumerate(phases):
        before = Turns(phases[: count or 1], seed=seed).locate(numbers)
        assert np.array_equal(sources[:first], before[0][:first])
        assert np.array_equal(draws[:first], before[1][:first])
        shares = block_shares(weights)
        end = phases[count + 1][0] if count + 1 < len(phases) else len(numbers)
        for begin in range(first, end - sum(shares) + 1, sum(shares)):
            assert tuple(np.bincount(sources[begin : begin + sum(shares)], minlength=3)) == shares


WEIGHTS = st.lists(st.integers(10**8, 10**12), min_size=2, max_size=5)


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.integers(0, 10**9), st.integers(0, 99))
def test_numbers_of_tokens_are_weights_too_and_hold_exactly_over_any_long_run(tokens, far, seed):
    tokens = [count + 10**9 for count in tokens]
    turns = Turns([(0, [float(count) for count in tokens])], seed=seed)
    block = 10_000 if block_shares(tokens) is None else sum(block_shares(tokens))
    first = far * block
    sources, draws = turns.locate(np.arange(first, first + block))
    for source, count in enumerate(tokens):
        for sequences, drawn_so_far in (
            (first, draws[sources == source].min()),
            (first + block, draws[sources == source].max() + 1),
        ):
            assert abs(Fraction(sequences * count, sum(tokens)) - int(drawn_so_far)) < 1
        mine = draws[sources == source]
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine)))


def test_weights_that_are_nearly_a_simple_ratio_are_it_and_others_are_not_rounded():
    assert block_shares([0.33333333, 0.66666667]) == block_shares([1 / 3, 2 / 3]) == (1, 2)
    assert block_shares([0.12345, 0.87655]) is None
    assert block_shares([2.5e12, 7.5e12]) == (1, 3)
    sources, _ = Turns([(0, [0.12345, 0.87655])], seed=0).locate(np.arange(100_000))
    assert np.bincount(sources).tolist() == [12345, 87655]
    with pytest.raises(ConfigError, match=r"a weight of 1 among 1e\+06 is less than one in 5,000; give it more"):
        Turns([(0, [1, 999_999])], seed=0)


def test_weights_without_a_simple_ratio_may_change_too():
    phases = [(0, [0.12345, 0.87655, 0]), (12_347, [1, 1, 2]), (12_350, [0.1, 0.2, 0.70001])]
    numbers = np.arange(40_000)
    sources, draws = Turns(phases, seed=1).locate(numbers)
    for source in range(3):
        assert draws[sources == source].tolist() == list(range((sources == source).sum()))


def test_the_papers_mixture_is_two_one_one_six(tmp_path):
    sources = sources_of_the_paper(tmp_path)
    assert block_shares([source.weight for source in sources]) == (2, 1, 1, 6)
    assert block_shares([20, 10, 10, 60]) == (2, 1, 1, 6)
    images = {"image": "image:", "video": ""}
    words = " ".join(f"{images[source.modality]}{source.path.name}={source.weight}" for source in sources)
    assert f"--data {words}" in (base.__doc__ or "")


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


def everything(batches):
    return [part for batch in batches for part in (batch.source, batch.draw, batch.codes)]


@pytest.fixture(scope="module")
def third_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "third", videos=(40, 17), seed=9)


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_any_number_of_ranks_and_workers_gives_the_same_batches(
    video_store, image_store, third_store, monkeypatch, workers
):
    """Also after resumes at other world sizes, over a re-weighting, and with a source that joins."""
    monkeypatch.setattr(mixture_module, "PLANNED_AT_ONCE", 24)  # threads cross the borders of plans
    sources = (
        SourceConfig(path=video_store, weight=0.5),
        SourceConfig(path=image_store, weight=0.5, modality="image"),
        SourceConfig(path=third_store, weight=0),
    )
    changes = ((5 * 6, (0.2, 0.8, 0.0)), (9 * 6, (0.25, 0.25, 0.5)))

    def opened():
        return Mixture(sources, frames=4, seed=5, changes=changes)

    expected = [opened().batch(step, 6) for step in range(16)]
    assert {int(source) for batch in expected[:9] for source in batch.source} == {0, 1}
    assert 2 in expected[9].source
    for world, begin, end in ((2, 0, 4), (3, 4, 8), (1, 8, 12), (3, 12, 16)):
        for rank in range(world):
            mixture = opened()

            def read(step, mixture=mixture, slots=slice(rank, None, world)):
                return mixture.batch(step, 6, slots=slots)

            with closing(ReadAhead(read, end=end, workers=workers)) as ahead:
                for step in range(begin, end):
                    part = ahead.take(step)
                    assert part.draw.tolist() == expected[step].draw[rank::world].tolist()
                    assert part.sequences().equal(expected[step].sequences()[rank::world])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_slots_of_a_step_and_may_be_more_or_fewer_after_a_resume(mixture, world):
    changed = Mixture(
        tuple(source.config for source in mixture.sources), frames=4, seed=5, changes=((3 * 6, (0.2, 0.8)),)
    )
    for step in range(7):  # the weights change after the third step
        whole = changed.batch(step, 6)
        again = Mixture(
            tuple(source.config for source in mixture.sources), frames=4, seed=5, changes=((3 * 6, (0.2, 0.8)),)
        )
        parts = [again.batch(step, 6, slots=slice(rank, None, world)) for rank in range(world)]
        for rank, part in enumerate(parts):
            assert len(part) == len(range(rank, 6, world))
            assert part.draw.tolist() == whole.draw[rank::world].tolist()
            assert part.sequences().equal(whole.sequences()[rank::world])
        plain = mixture.batch(step, 6)
        assert (step < 3) == plain.sequences().equal(whole.sequences())


def test_a_batch_is_its_windows(mixture, monkeypatch):
    batch = mixture.batch(2, 7)
    windows = mixture.windows(2, 7)
    assert batch.codes.dtype == np.uint16
    assert batch.sequences().equal(sequences_of(windows))
    assert batch.sequences(2).equal(sequences_of(windows, 2))
    for slot, window in enumerate(windows):
        alone = mixture.sources[window.source].draw(int(batch.draw[slot]))
        assert alone.origin == window.origin
        assert alone.codes.equal(window.codes)
    monkeypatch.setattr(mixture_module, "PLANNED_AT_ONCE", 1)  # however many sequences are planned together
    for then, now in zip(everything([batch]), everything([mixture.batch(2, 7)]), strict=True):
        assert np.array_equal(then, now)


def test_codes_at_the_end_of_the_range_survive(tmp_path):
    passport = Passport(**{**vars(PASSPORT), "vocab_size": 2**16})
    folder = make_store(tmp_path / "s", videos=(8,), passport=passport)
    kept = np.load(folder / "frames-00000.npy", mmap_mode="r+")
    kept[:] = 2**16 - 1
    sequences = Mixture((SourceConfig(path=folder, weight=1),), frames=4, seed=0).batch(0, 2).sequences()
    assert sequences[:, 1:-1].unique().tolist() == [2**16 + 3]


def test_stores_of_many_files_are_read_in_few_and_many_runs(tmp_path):
    folder = make_store(tmp_path / "s", videos=(8, 9, 16, 5, 12, 30))
    parted = tmp_path / "parted"
    part_files(folder, parted)
    one, many = (Mixture((SourceConfig(path=each, weight=1),), frames=4, seed=0) for each in (folder, parted))
    for step in range(8):
        for batch in (1, 3, 40):
            assert many.batch(step, batch).sequences().equal(one.batch(step, batch).sequences())
    last = many.sources[0].store
    with pytest.raises(Exception, match="frames 7 to 8 are not in one file"):
        last.read_runs(np.array([0, 7]), 2, np.empty((2, 2, 3, 3), np.uint16), np.arange(2))
    with pytest.raises(Exception, match="frames 99 to 100 are not in one file"):
        last.read_runs(np.array([99]), 2, np.empty((1, 2, 3, 3), np.uint16), np.arange(1))


def part_files(folder, out):
    """Copy a store with a file for each item."""
    store = TokenStore(folder)
    out.mkdir()
    shards = []
    for number in range(len(store)):
        shards.append(write_shard(out, number, [store.codes(number).numpy().astype(np.uint16)], store.grid))
    write_ledger(out, [])
    items = [store.item(number) for number in range(len(store))]
    finish_store(out, passport=store.passport, stride=store.stride, shards=shards, items=items, counts={}, job={})


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
    for window in mixture.windows(0, 40):
        store = mixture.sources[window.source].store
        names = store.table.column("id").to_pylist()
        if window.modality == "video":
            ((item, start),) = window.origin
            assert window.codes.equal(store.codes(names.index(item), start, 4))
        else:
            assert len(window.origin) == 4
            for place, (item, _) in enumerate(window.origin):
                assert window.codes[place : place + 1].equal(store.codes(names.index(item)))


def test_views_in_turn_give_every_input_one_view_an_epoch(tmp_path):
    names = ["a", "a#1", "a#2", "b", "c", "c#1", "odd#7"]
    store = make_views(tmp_path / "s", names, frames=[9, 8, 9, 8, 12, 11, 5])
    config = SourceConfig(path=store, weight=1)
    every = Source(config, frames=4, seed=1, number=0)
    turns = Source(config, frames=4, seed=1, number=0, views="in-turn")
    assert (every.draws_per_epoch, turns.draws_per_epoch) == (2 + 2 + 2 + 2 + 3 + 2 + 1, 2 + 2 + 2 + 1)
    for epoch in range(7):
        first = epoch * turns.draws_per_epoch
        origins = [origin for n in range(turns.draws_per_epoch) for origin in turns.origin(first + n)]
        shown = ["a", "a#1", "a#2"][epoch % 3], "b", ["c", "c#1"][epoch % 2], "odd#7"
        assert Counter(name for name, _ in origins) == {shown[0]: 2, shown[1]: 2, shown[2]: 2, shown[3]: 1}
        frames = [(name, start + place) for name, start in origins for place in range(4)]
        assert len(set(frames)) == len(frames)
    assert [turns.in_order(n).origin[0] for n in range(3)] == [("a", 0), ("a", 4), ("b", 0)]
    window = turns.draw(8)
    ((name, start),) = window.origin
    assert window.codes.equal(turns.store.codes(names.index(name), start, 4))
    plain = make_store(tmp_path / "plain", videos=(9, 20))
    one, other = (
        Source(SourceConfig(path=plain, weight=1), frames=4, seed=1, number=0, views=views)
        for views in ("all", "in-turn")
    )
    assert [one.origin(n) for n in range(30)] == [other.origin(n) for n in range(30)]  # without views, nothing changes


def make_views(folder, names, *, frames):
    """A store whose items have these ids."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    codes = [rng.integers(0, 32, (count, 3, 3)).astype(np.uint16) for count in frames]
    shard = write_shard(folder, 0, codes, (3, 3))
    write_ledger(folder, [])
    firsts = np.cumsum([0, *frames])
    items = [
        StoredItem(
            id=name, kind="video", label=None, first_frame=int(firsts[n]), frame_count=frames[n], fps=10, stride=4
        )
        for n, name in enumerate(names)
    ]
    finish_store(folder, passport=PASSPORT, stride=4, shards=[shard], items=items, counts={}, job={})
    return folder


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
