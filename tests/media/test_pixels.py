"""Sampling, transforms, clips, the procedural corpus, the catalog and the embedded sample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import make_photo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from toto.media import procedural, sample, transforms
from toto.media.catalog import find_duplicates, list_source
from toto.media.clip import Clip
from toto.media.decode import read_media
from toto.media.ledger import LedgerRow, count_by_status, summary, unused
from toto.media.sampling import clip_indices, span, start_count, strided_count, tiling
from toto.media.transforms import crop_box, resize, shortest_side_to, square
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.seed import stream


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
def test_starts_are_exactly_those_whose_clip_fits(frame_count, length, stride):
    fitting = [start for start in range(frame_count) if clip_indices(start, length, stride)[-1] < frame_count]
    assert start_count(frame_count, length, stride) == len(fitting)
    assert span(length, stride) == clip_indices(0, length, stride)[-1] + 1


@given(st.integers(0, 200), st.integers(1, 9), st.integers(0, 20))
def test_strided_count_is_the_length_of_the_range(frame_count, stride, offset):
    assert strided_count(frame_count, stride, offset) == len(range(offset, frame_count, stride))


@given(st.integers(0, 200), st.integers(1, 20))
def test_tiling_uses_all_frames_but_the_left_over(frame_count, length):
    windows, left_over = tiling(frame_count, length)
    assert windows * length + left_over == frame_count
    assert 0 <= left_over < length or windows == 0


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_the_shorter_side_is_exact_and_the_longer_one_nearest(height, width, size):
    h, w = shortest_side_to(height, width, size)
    assert min(h, w) == size
    exact = max(height, width) * size / min(height, width)
    assert abs(max(h, w) - exact) <= 0.5


def test_resizing_equals_pillows_within_one_level(tmp_path):
    picture = read_media(make_photo(tmp_path / "a.jpg", height=160, width=240)).frames
    ours = resize(picture, 64, 96)[0].numpy().astype(int)
    theirs = np.array(Image.fromarray(picture[0].numpy()).resize((96, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 1


def test_one_crop_for_all_frames_and_every_place_can_be_drawn():
    frames = torch.arange(12, dtype=torch.uint8).view(1, 1, 12, 1).expand(3, 8, 12, 3).contiguous()
    cut = square(frames, 8, "random", stream(0, "crop"))
    assert cut.shape == (3, 8, 8, 3)
    assert cut[0].equal(cut[2])
    lefts = {crop_box(8, 12, 8, "random", stream(seed)).left for seed in range(60)}
    assert lefts == set(range(5))
    assert crop_box(8, 13, 8, "centre").left == 2


def test_a_clip_refuses_what_is_no_clip():
    good = {"indices": torch.arange(2), "timestamps": torch.arange(2.0).double(), "source": "here"}
    assert "2 frames of 4 x 5" in repr(Clip(frames=torch.zeros(2, 4, 5, 3, dtype=torch.uint8), **good))
    with pytest.raises(Exception, match=r"here|frames"):
        Clip(frames=torch.zeros(2, 4, 5, dtype=torch.uint8), **good)
    with pytest.raises(Exception, match=r"here|frames"):
        Clip(frames=torch.zeros(0, 4, 5, 3, dtype=torch.uint8), **good)


def test_procedural_clips_are_the_same_each_time_and_balanced():
    first, again = procedural.make_clip(3, 5), procedural.make_clip(3, 5)
    assert first.clip.frames.equal(again.clip.frames)
    assert not first.clip.frames.equal(procedural.make_clip(4, 5).clip.frames)
    labels = [procedural.make_clip(0, number, frames=4, size=32).label for number in range(12)]
    assert sorted(labels) == sorted(list(range(6)) * 2)


@pytest.mark.parametrize(("motion", "shift"), [("left", (0, -1)), ("right", (0, 1)), ("up", (-1, 0)), ("down", (1, 0))])
def test_the_label_says_where_the_shape_moves(motion, shift):
    label = procedural.MOTIONS.index(motion)
    made = procedural.make_clip(0, label, frames=2, size=64)
    before, after = made.whole_mask.float()
    moves = {
        step: float((torch.roll(before, (step * shift[0], step * shift[1]), (0, 1)) * after).sum())
        for step in range(-5, 6)
    }
    assert max(moves, key=moves.__getitem__) in (1, 2, 3, 4)


def test_masks_show_the_shape_and_occlusion_hides_part_of_it():
    made = [procedural.make_clip(0, number) for number in range(24)]
    assert all(bool((each.mask & ~each.whole_mask).any()) is False for each in made)
    assert any(min(each.visible) < 0.95 for each in made)
    assert any(min(each.visible) == 1.0 for each in made)
    shares = [float(each.whole_mask.float().mean()) for each in made]
    assert 0.03 < min(shares) <= max(shares) < 0.4


def test_the_catalog_lists_in_order_with_labels_and_finds_twins(tmp_path):
    for number, name in enumerate(("b/x.jpg", "a/y.jpg", "z.jpg", "a/deep/w.JPG")):
        make_photo(tmp_path / name, number=number)
    make_photo(tmp_path / "b/twin.jpg", number=0)
    (tmp_path / "a/notes.csv").write_text("x")
    (tmp_path / ".hidden.jpg").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    catalog = list_source(tmp_path)
    assert [item.id for item in catalog.items] == ["a/deep/w.JPG", "a/y.jpg", "b/twin.jpg", "b/x.jpg", "z.jpg"]
    assert [item.label for item in catalog.items] == ["a", "a", "b", "b", None]
    assert [row.id for row in catalog.skipped] == ["a/notes.csv"]
    assert find_duplicates(catalog.items) == {"b/x.jpg": "b/twin.jpg"}
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="1 files of other kinds"):
        list_source(tmp_path / "only")


def test_the_ledger_counts_everything_that_was_offered():
    rows = [LedgerRow(id=str(n), kind="video", status=status) for n, status in enumerate(["ok", "ok", "corrupt"])]
    assert summary(count_by_status(rows)) == "offered 3: 2 ok, 1 corrupt"
    assert summary({}, "a/ledger.parquet") == "offered 0: 0 ok (ledger: a/ledger.parquet)"
    assert unused(rows, most=0, rest_in="there") == ["  and 1 more in there"]
    assert unused(rows) == ["  corrupt   2: "]


def test_the_sample_is_whole_and_its_splits_share_nothing():
    for split, least in (("train", 30), ("heldout", 10)):
        assert len(sample.scenes(split)) >= least
        assert len(sample.photographs(split)) >= 5
    names = [{path.stem for path in sample.scenes(split)} for split in ("train", "heldout")]
    assert not names[0] & names[1]
    assert (sample.sample_folder() / "ATTRIBUTION.md").exists()
    size = sum(path.stat().st_size for path in sample.sample_folder().rglob("*"))
    assert size <= 15_000_000


def test_sample_scenes_decode_and_no_heldout_frame_is_a_training_frame():
    small = {
        split: [resize(read_media(path, stride=24).frames, 9, 16).float() for path in sample.scenes(split)]
        for split in ("train", "heldout")
    }
    train = torch.cat(small["train"]).flatten(1)
    nearest = torch.cdist(torch.cat(small["heldout"]).flatten(1), train, p=1).min(dim=1).values / train.shape[1]
    assert float(nearest.min()) > 2.0
    assert all(len(clip) >= 2 for clip in itertools.chain(*small.values()))
    with pytest.raises(MediaError):
        read_media(sample.sample_folder() / "ATTRIBUTION.md")


def test_a_crop_is_the_same_made_at_once_or_frame_by_frame(monkeypatch):
    frames = torch.randint(0, 256, (7, 24, 61, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = square(frames, 16)
    monkeypatch.setattr(transforms, "RESIZED_AT_ONCE", 2 * 16 * 41)
    assert square(frames, 16).equal(whole)
    monkeypatch.setattr(transforms, "RESIZED_AT_ONCE", 1)
    assert square(frames, 16).equal(whole)


def test_what_would_be_huge_once_resized_is_refused_before_memory_is_taken():
    narrow = torch.zeros(1, 8, 400_000, 3, dtype=torch.uint8)
    with pytest.raises(MediaError, match="too long and narrow: 6400000 x 128 pixels once resized"):
        square(narrow, 128)
    assert square(narrow, 8).shape == (1, 8, 8, 3)
