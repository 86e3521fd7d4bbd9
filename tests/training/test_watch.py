"""Losses by source, modality and frame: equal to plain means, over any ranks, and after going on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from toto.runtime.errors import CheckpointError
from toto.training.source import SourceConfig
from toto.training.watch import LossWatch, source_names

T, CELLS = 4, 9
SOURCES = (
    SourceConfig(path=Path("films"), weight=3),
    SourceConfig(path=Path("photos"), weight=1, modality="image"),
    SourceConfig(path=Path("talks"), weight=1),
)


def new_watch(sources=SOURCES, *, ends=True):
    return LossWatch(sources, frames=T, cells=CELLS, ends=ends, device="cpu")


def parts(seed, count, *, ends=True, frames=T, windows=3):
    """Losses of some parts of batches, with their windows' sources."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        source = rng.integers(0, 2, windows)
        shape = windows * (T // frames), frames * CELLS + ends
        yield torch.from_numpy(rng.gamma(2.0, size=shape).astype(np.float32)), source


@pytest.mark.parametrize("frames", [4, 2, 1])
@pytest.mark.parametrize("ends", [True, False])
def test_means_are_plain_means(ends, frames):
    watch = new_watch(ends=ends)
    by_source, by_frame = {0: [], 1: []}, {(s, f): [] for s in (0, 1) for f in range(T + 1)}
    for each, source in parts(0, 7, ends=ends, frames=frames):
        watch.add(each, source)
        for losses, number in zip(each.double().numpy(), np.repeat(source, T // frames), strict=True):
            by_source[number] += [*losses]
            for place, loss in enumerate(losses):
                by_frame[number, T if ends and place == len(losses) - 1 else place // CELLS].append(loss)
    row = watch.take()
    for number, (name, modality) in enumerate((("films", "video"), ("photos", "image"))):
        mean = np.mean(by_source[number])
        assert row[f"train/loss/source/{name}"] == pytest.approx(mean, rel=1e-12)
        assert row[f"train/loss/modality/{modality}"] == pytest.approx(mean, rel=1e-12)
        assert row[f"train/tokens/source/{name}"] == len(by_source[number])
    assert "train/loss/source/talks" not in row  # nothing was drawn from it
    assert row["train/tokens/source/talks"] == 0
    positions = watch.positions()
    for number, modality in enumerate(("video", "image")):
        for place, found in enumerate(positions[modality]):
            losses = by_frame[number, place]
            assert found == (pytest.approx(np.mean(losses), rel=1e-12) if losses else None)
    assert watch.positions() == {}


def test_rows_hold_what_came_since_the_last_and_positions_all_rows_between():
    watch, whole = new_watch(), new_watch()
    for seed in (0, 1):
        for each, source in parts(seed, 3):
            watch.add(each, source)
            whole.add(each, source)
        second = watch.take()
    only = new_watch()
    for each, source in parts(1, 3):
        only.add(each, source)
    alone, total = only.take(), whole.take()
    assert {k: v for k, v in second.items() if "loss" in k} == {k: v for k, v in alone.items() if "loss" in k}
    assert second["train/tokens/source/films"] == total["train/tokens/source/films"]
    found, expected = watch.positions(), whole.positions()
    for modality in ("video", "image"):
        assert found[modality] == pytest.approx(expected[modality], rel=1e-12)


def test_ranks_add_up_to_one_process():
    alone, ranks = new_watch(), [new_watch(), new_watch()]
    for number, (each, source) in enumerate(parts(3, 8)):
        alone.add(each, source)
        ranks[number % 2].add(each, source)
    totals = ranks[0].totals() + ranks[1].totals()
    rows = [rank.take(totals.clone()) for rank in ranks]
    expected = alone.take()
    for row in rows:
        assert row == pytest.approx(expected, rel=1e-12)
    assert ranks[0].positions()["video"] == pytest.approx(alone.positions()["video"], rel=1e-12)
    assert not ranks[1].totals().any()


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_goes_on_logs_the_same_rows(stop):
    def run(watch, numbers):
        rows = []
        for number in numbers:
            for each, source in parts(number, 2):
                watch.add(each, source)
            if number % 3 == 2:
                rows.append(watch.take())
            if number % 6 == 5:
                rows.append(watch.positions())
        return rows

    expected = run(new_watch(), range(12))
    first = new_watch()
    before = run(first, range(stop))
    known = json.loads(json.dumps(first.state()))
    second = new_watch()
    second.restore(known)
    assert before + run(second, range(stop, 12)) == expected


def test_of_several_ranks_one_takes_over_what_all_had_added_up():
    ranks = [new_watch(), new_watch()]
    for rank, (each, source) in zip(ranks, parts(5, 2), strict=True):
        rank.add(each, source)
    totals = ranks[0].totals() + ranks[1].totals()
    state = ranks[1].state(totals)
    later = [new_watch() for _ in range(3)]
    for number, watch in enumerate(later):
        watch.restore(state, first=number == 0)
    together = later[0].totals() + later[1].totals() + later[2].totals()
    assert together.equal(totals)


def test_sources_may_join_and_other_sequences_are_refused():
    before = new_watch(SOURCES[:2])
    for each, source in parts(0, 2):
        before.add(each, source)
    after = new_watch()
    after.restore(before.state())
    assert after.take()["train/loss/source/films"] == before.take()["train/loss/source/films"]
    longer = LossWatch(SOURCES, frames=8, cells=CELLS, ends=True, device="cpu")
    with pytest.raises(CheckpointError, match="don't fit"):
        longer.restore(before.state())


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["shards/films", "shards/photos"], ["films", "photos"]),
        (["a/train", "b/train"], ["a/train", "b/train"]),
        (["train", "x/train"], ["train", "x/train"]),
        (["films", "films"], ["films:video:1", "films:video:2"]),
    ],
)
def test_names_tell_sources_apart(paths, names):
    assert source_names([SourceConfig(path=Path(path), weight=1) for path in paths]) == names


def test_one_path_of_two_modalities_is_told_apart():
    sources = [SourceConfig(path=Path("x"), weight=1), SourceConfig(path=Path("x"), weight=1, modality="image")]
    assert source_names(sources) == ["x:video", "x:image"]
