"""Codes made as they are read: those that would have been stored, anew in every epoch, by any number of workers."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import make_video

from toto.__main__ import main
from toto.media.images import read_image
from toto.media.transforms import resize
from toto.model.config import ModelConfig
from toto.runtime.errors import ConfigError, MediaError, StoreError
from toto.runtime.metrics import read_metrics
from toto.runtime.workers import StoppedError
from toto.tokens import online as online_module
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.online import Encoders, OnlineStore, Pieces
from toto.tokens.shards import TokenStore, read_ledger
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.mixture import Mixture, sequences_of
from toto.training.source import Source, SourceConfig


@pytest.fixture(scope="module")
def media(media_folder, tmp_path_factory) -> Path:
    """Six wide and long-enough videos, four photographs, and a broken file."""
    folder = tmp_path_factory.mktemp("online") / "media"
    shutil.copytree(media_folder, folder)
    make_video(folder / "slow" / "long.mp4", number=20, frames=150)
    (folder / "slow" / "broken.mp4").write_bytes(b"\0" * 999)
    return folder


@pytest.fixture(scope="module")
def stores(media, tokenizer_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The same source online and stored."""
    out = tmp_path_factory.mktemp("stores")
    for name in ("online", "stored"):
        tokenize(
            TokenizeConfig(
                source=media,
                out=out / name,
                tokenizer=str(tokenizer_folder),
                size=32,
                min_frames=4,
                workers=0,
                online=name == "online",
            )
        )
    return out / "online", out / "stored"


@pytest.fixture(scope="module")
def encoders():
    """Two processes."""
    made = Encoders(workers=2)
    yield made
    made.close()


def mixture(path, *, workers=0, modality="video", encoders=None, **changes):
    sources = (SourceConfig(path=path, weight=1, modality=modality),)
    return Mixture(sources, frames=4, seed=3, encoders=encoders or Encoders(workers=workers), **changes)


def test_an_online_store_has_all_but_the_codes(stores):
    online, stored = (TokenStore(path) for path in stores)
    assert online.table.equals(stored.table)
    assert read_ledger(online.folder) == read_ledger(stored.folder)
    assert (online.frame_count, len(online), online.passport) == (stored.frame_count, len(stored), stored.passport)
    assert online.manifest["ledger"] == {"ok": 11, "corrupt": 1}
    assert not list(online.folder.glob("*.npy"))
    online.verify()
    with pytest.raises(StoreError, match="holds no codes, which training makes as it reads"):
        online.codes(0)


def test_the_centre_from_frame_0_is_what_is_stored(stores):
    online, stored = (TokenStore(path) for path in stores)
    for item in range(len(stored)):
        have = stored.item(item).frame_count
        for start, count in {(0, have), (have // 3, min(4, have - have // 3))}:
            out = np.empty((1, count, 4, 4), np.uint16)
            piece = Pieces(items=np.array([[item]]), starts=np.array([[start]]))
            OnlineStore(online, Encoders()).read(piece, count, out, None)
            assert np.array_equal(out[0], stored.codes(item, start, count).numpy())
    for modality in ("video", "image"):
        ours, theirs = (
            Source(SourceConfig(path=path, weight=1, modality=modality), frames=4, seed=0, number=0) for path in stores
        )
        assert ours.draws_per_epoch == theirs.draws_per_epoch
        for number in range(2):
            assert ours.in_order(number).codes.equal(theirs.in_order(number).codes)
            assert ours.in_order(number).origin == theirs.in_order(number).origin


@pytest.mark.parametrize("modality", ["video", "image"])
def test_batches_do_not_depend_on_workers_ranks_or_what_was_read_before(stores, encoders, modality):
    whole = mixture(stores[0], modality=modality, pixels=True)
    batches = [whole.batch(step, 3) for step in range(3)]
    again = mixture(stores[0], modality=modality, pixels=True, encoders=encoders)
    for step in (2, 0):
        for world in (1, 2):
            for rank in range(world):
                part = again.batch(step, 3, slots=slice(rank, None, world))
                assert np.array_equal(part.codes, batches[step].codes[rank::world])
                assert np.array_equal(part.pixels, batches[step].pixels[rank::world])
    assert sequences_of(batches[1].windows()).equal(batches[1].sequences())
    alone = whole.sources[0].draw(int(batches[1].draw[2]))
    assert np.array_equal(alone.codes, batches[1].codes[2].astype(np.int64))
    assert np.array_equal(alone.pixels, batches[1].pixels[2])


def test_first_frames_and_crops_are_drawn_anew_for_each_item_and_epoch(stores):
    source = mixture(stores[0]).sources[0]
    epochs = [source.runs(np.arange(n, n + source.draws_per_epoch)) for n in range(0, 900, source.draws_per_epoch)]
    counts = source.store.column("frame_count")
    drawn = set()
    for runs in epochs:
        for item in np.unique(runs.items):
            mine = runs.items[:, 0] == item
            assert len(np.unique(runs.crops[mine])) == len(np.unique(runs.offsets[mine])) == 1
            ends = np.sort(runs.starts[mine, 0]) + 4
            assert (np.diff(ends) == 4).all()
            late = int(runs.offsets[mine][0, 0] > 0)  # a later first frame may cost the last one
            assert ends[-1] <= counts[item] - late
            drawn.add((int(item), int(runs.offsets[mine][0, 0])))
    videos = np.unique(epochs[0].items)
    fits = counts[videos] % 4 == 0
    assert fits.any()
    assert not fits.all()
    for item, fit in zip(videos.tolist(), fits.tolist(), strict=True):
        assert {offset for other, offset in drawn if other == item} == ({0} if fit else {0, 1, 2, 3})
    crops = [crop for runs in epochs for crop in {int(crop) for crop in runs.crops.ravel()}]
    assert len(set(crops)) == len(crops)
    images = mixture(stores[0], modality="image").sources[0].runs(np.arange(20))
    assert len(np.unique(images.crops)) == 80


def test_crops_are_squares_out_of_the_frame_at_any_place(stores, media):
    images = mixture(stores[0], modality="image", pixels=True).sources[0]
    lefts = set()
    for number in range(15):
        window = images.draw(number)
        for (name, _), crop in zip(window.origin, window.pixels, strict=True):
            whole = resize(read_image(media / name).frames, 32, 53)[0]
            lefts |= {left for left in range(22) if whole[:, left : left + 32].equal(crop)}
    assert len(lefts) > 15


def config_of(path, **changes):
    return TrainConfig(
        data=DataConfig(sources=(SourceConfig(path=path, weight=1),), frames=4, **changes),
        model=ModelConfig(width=32, layers=1, heads=2, mlp_hidden=48),
        steps=6,
        batch=2,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=3,
        keep=9,
    )


def losses(run):
    return {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}


def test_training_is_the_same_with_and_without_workers_and_after_a_resume(stores, tmp_path):
    train(config_of(stores[0], workers=0), tmp_path / "alone")
    train(config_of(stores[0], workers=2), tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    train(config_of(stores[0], workers=0), tmp_path / "two", resume=True)
    assert losses(tmp_path / "alone") == losses(tmp_path / "two")
    assert len(losses(tmp_path / "two")) == 6


def test_an_item_that_can_no_longer_be_read_is_named_with_its_step(media, stores, tmp_path, tokenizer_folder):
    folder = tmp_path / "media"
    shutil.copytree(media, folder)
    base = {"tokenizer": str(tokenizer_folder), "size": 32, "min_frames": 4, "workers": 0, "online": True}
    tokenize(TokenizeConfig(source=folder, out=tmp_path / "store", **base))
    whole = mixture(tmp_path / "store")
    whole.batch(0, 1)
    for video in folder.rglob("clip*.mp4"):
        video.write_bytes(b"\0" * video.stat().st_size)
    with pytest.raises(MediaError, match=r"clip\d.mp4: could be read when its store was made: .* \(at step 1\)"):
        whole.batch(0, 64)
    (folder / "fast" / "more.jpg").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=r"was made of other files than imagefolder:/.* holds now; make it again"):
        mixture(tmp_path / "store").batch(0, 1)


def test_a_decoder_that_crashes_ends_training_and_not_the_process(stores, tmp_path, monkeypatch):
    encoders = Encoders(workers=1)
    monkeypatch.setattr(online_module, "_make_here", crash)
    with pytest.raises(MediaError, match=r"the decoder crashed \(SIGSEGV\) \(at step 1\)"):
        mixture(stores[0], encoders=encoders).batch(0, 1)
    encoders.close()
    with pytest.raises(StoppedError):
        mixture(stores[0], encoders=encoders).batch(0, 1)


def crash(_task):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_from_the_shell(media, tokenizer_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(media.parent)
    words = ["tokenize", "media", "--out", tmp_path / "store", "--online", "--tokenizer", tokenizer_folder, "--size",
             32, "--min-frames", 4, "--workers", 0]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert "11 items" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # the source is known by its whole name
    words = ["train", "nano", "--out", "run", "--data", "store=0.5", "image:store=0.5", "--heldout", "store",
             "--steps", 2, "--batch", 2, "--micro-batch", 2, "--data.frames", 4, "--model.width", 32,
             "--model.layers", 1, "--model.heads", 2, "--model.mlp-hidden", 48, "--eval-sequences", 2,
             "--data.workers", 0]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert main(["shards", "cat", "store", "0"]) == 1
    assert main(["shards", "merge", "store", "--out", "merged"]) == 1
    assert capsys.readouterr().err.count("holds no codes") == 2
    with pytest.raises(ConfigError, match="leave --views out"):
        TokenizeConfig(source=media, out=tmp_path / "o", online=True, views=2)
    with pytest.raises(ConfigError, match="leave --keep-pixels out"):
        TokenizeConfig(source=media, out=tmp_path / "o", online=True, keep_pixels=True)
