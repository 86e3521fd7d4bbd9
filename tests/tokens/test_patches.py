"""Patches against MAE's own, and the pixels that a store keeps beside its codes."""

from __future__ import annotations

import io
import os
import signal

import numpy as np
import pytest
import torch
from conftest import PASSPORT, make_store, make_video
from hypothesis import given
from hypothesis import strategies as st

from toto.media.decode import read_media
from toto.media.transforms import square
from toto.runtime.errors import ConfigError, InterruptedRunError, StoreError
from toto.tokens import extract, parallel
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.passport import Passport
from toto.tokens.patches import normalised, patch_values, patchify, unpatchify
from toto.tokens.shards import TokenStore


def test_patches_come_in_raster_order_by_row_column_channel():
    frames = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).to(torch.uint8)
    patches = patchify(frames, 2, 3)
    assert patches.shape == (12, 12)
    second_row_last_cell_of_frame_1 = frames[1, 2:4, 4:6].flatten()
    torch.testing.assert_close(patches[11], second_row_last_cell_of_frame_1.float() / 127.5 - 1)
    torch.testing.assert_close(patches[6 + 1], frames[1, 0:2, 2:4].flatten().float() / 127.5 - 1)
    assert (patchify(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 2, 3), 1, 1)).unique(
        dim=1
    ).flatten().tolist() == [-1, 1]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_unpatchifying_gives_the_frames_back(frames, rows, cols, side, batched):
    shape = (*([2] if batched else []), frames, rows * side, cols * side, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert unpatchify(patchify(pixels, rows, cols), rows, cols).equal(pixels)


def test_patches_and_loss_equal_those_of_mae():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, norm_pix_loss=True,
        decoder_intermediate_size=16,
    )  # fmt: skip
    mae = transformers.ViTMAEForPreTraining(config)
    frames = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    frames[0, :8, :8] = 77  # a flat patch, where only the epsilon is left
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    ours = patchify(frames[:, None], 4, 4)
    torch.testing.assert_close(ours, mae.patchify(pixels))
    with torch.inference_mode():
        theirs = mae(pixels)
    errors = (theirs.logits - normalised(ours)).square().mean(dim=2)
    torch.testing.assert_close((errors * theirs.mask).sum() / theirs.mask.sum(), theirs.loss)
    assert normalised(ours)[0, 0].abs().max() < 1e-3


def test_normalised_patches_have_no_mean_and_one_deviation():
    patches = torch.rand(5, 192) * 2 - 1
    found = normalised(patches)
    torch.testing.assert_close(found.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(1), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised(0.3 * patches + 0.2), found, atol=1e-4, rtol=0)


def test_the_patch_is_the_cell_of_a_code():
    assert patch_values(PASSPORT) == 192
    with pytest.raises(ConfigError, match="no frame size"):
        patch_values(Passport(**{**vars(PASSPORT), "frame_size": None}))
    with pytest.raises(ConfigError, match="24 x 24 pixels don't fall into 3 x 4 squares"):
        patchify(torch.zeros(1, 24, 24, 3, dtype=torch.uint8), 3, 4)


def config(source, out, tokenizer_folder, **options):
    options = {"size": 32, "min_frames": 4, "workers": 0, "keep_pixels": True} | options
    return TokenizeConfig(source=source, out=out, tokenizer=str(tokenizer_folder), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "made.json"}


@pytest.fixture
def kept(media_folder, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "BYTES_IN_SHARD", 30_000)
    return tokenize(config(media_folder, tmp_path / "kept", tokenizer_folder))


def test_a_store_keeps_the_very_frames_that_were_tokenized(kept, media_folder, tokenizer):
    assert kept.has_pixels
    assert len(kept.manifest["shards"]) > 1
    for number in range(len(kept)):
        item = kept.item(number)
        frames = square(read_media(media_folder / item.id, stride=4 if item.kind == "video" else 1).frames, 32)
        assert kept.pixels(number).equal(frames)
        assert tokenizer.encode(kept.pixels(number)).equal(kept.codes(number))
    assert kept.pixels(2, 3, 2).equal(kept.pixels(2)[3:5])
    shard = kept.manifest["shards"][0]
    whole = io.BytesIO()
    np.save(whole, np.concatenate([kept.pixels(n) for n in range(len(kept))])[: shard["frames"]])
    assert (kept.folder / "pixels-00000.npy").read_bytes() == whole.getvalue()
    kept.verify()


def test_pixels_change_nothing_else_in_a_store(kept, media_folder, tokenizer_folder, tmp_path):
    plain = tokenize(config(media_folder, tmp_path / "plain", tokenizer_folder, keep_pixels=False))
    with_pixels, without = contents(kept.folder), contents(plain.folder)
    shared = {name: content for name, content in with_pixels.items() if not name.startswith(("pixels", "manifest"))}
    assert {name: content for name, content in without.items() if name != "manifest.json"} == shared
    assert not plain.has_pixels
    with pytest.raises(ConfigError, match=r"codes without pixels; make it again with `toto tokenize --keep-pixels`"):
        plain.pixels(0)
    for folder, wanted in ((kept.folder, False), (plain.folder, True)):
        with pytest.raises(ConfigError, match=r"another job \(different: keep_pixels\)"):
            tokenize(config(media_folder, folder, tokenizer_folder, keep_pixels=wanted))


def test_same_bytes_at_any_number_of_workers_and_after_a_signal(
    kept, media_folder, tokenizer_folder, tmp_path, monkeypatch
):
    tokenize(config(media_folder, tmp_path / "pool", tokenizer_folder, workers=2))
    assert contents(tmp_path / "pool") == contents(kept.folder)
    encode, calls = parallel.encode, []

    def encode_then_stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments, **options)

    monkeypatch.setattr(parallel, "encode", encode_then_stop)
    stopped = config(media_folder, tmp_path / "stopped", tokenizer_folder)
    with pytest.raises(InterruptedRunError):
        tokenize(stopped)
    tokenize(stopped)
    assert contents(tmp_path / "stopped") == contents(kept.folder)


def test_items_that_fail_leave_no_pixels(tmp_path, tokenizer_folder):
    source = tmp_path / "source"
    make_video(source / "good.mp4", size=32)
    make_video(source / "short.mp4", size=32, frames=5)
    (source / "cut.mp4").write_bytes((source / "good.mp4").read_bytes()[:-2000])
    store = tokenize(config(source, tmp_path / "out", tokenizer_folder, views=2))
    assert store.table.column("id").to_pylist() == ["good.mp4", "good.mp4#1"]
    assert store.pixels(1).shape == (store.item(1).frame_count, 32, 32, 3)
    assert sum(path.stat().st_size for path in store.folder.glob("pixels-*")) == store.frame_count * 32 * 32 * 3 + 128


def test_a_flipped_bit_a_missing_file_and_a_cut_file_are_found(tmp_path):
    store = TokenStore(make_store(tmp_path / "s", videos=(5,), pixels=True))
    path = store.folder / "pixels-00000.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"pixels-00000\.npy: damaged"):
        store.verify()
    path.write_bytes(whole[:-64])
    with pytest.raises(StoreError, match="pixels-00000"):
        TokenStore(store.folder).pixels(0)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        store.verify()
