"""Sequences, passports, token grids and stores: the contracts between rooms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toto
from toto.runtime.errors import CheckpointError, PassportError, StoreError, TotoError
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.grid import TokenGrid
from toto.tokens.passport import Passport
from toto.tokens.sequence import pack, pack_prompt, sequence_length, sequence_vocabulary, unpack
from toto.tokens.shards import TokenStore
from toto.tokens.tokenizer import load_tokenizer

PASSPORT = Passport(
    kind="vqvae", weights_sha256="a" * 64, preprocessing="p", vocab_size=64, frame_size=(32, 32), grid=(4, 4)
)


def test_the_papers_context_is_4098_long():
    codes = torch.arange(2 * 16 * 256).view(2, 16, 16, 16) % 8192
    video = pack(codes, "video")
    assert video.shape == (2, 4098) == (2, sequence_length(16, 16, 16))
    assert video[0, 0] == 1
    assert pack(codes, "image")[1, 0] == 3
    assert (video[:, -1] == 2).all()
    assert video[:, 1:-1].equal(codes.flatten(1) + 4)
    assert sequence_vocabulary(8192) == 8196


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["image", "video"]))
def test_unpacking_gives_the_codes_back(frames, rows, cols, modality):
    codes = torch.randint(0, 9, (2, frames, rows, cols))
    assert unpack(pack(codes, modality), rows, cols).equal(codes)
    assert unpack(pack_prompt(codes, modality), rows, cols).equal(codes)


def test_what_is_no_sequence_is_refused():
    good = pack(torch.zeros(1, 2, 2, 2, dtype=torch.int64), "video")
    for place, value, message in ((0, 7, "start token"), (3, 2, "special id 2")):
        bad = good.clone()
        bad[0, place] = value
        with pytest.raises(TotoError, match=message):
            unpack(bad, 2, 2)
    with pytest.raises(TotoError, match="whole frames"):
        unpack(good[:, :-3], 2, 2)


def test_a_stranger_is_refused_by_name():
    other = Passport(**{**vars(PASSPORT), "weights_sha256": "b" * 64, "grid": (8, 8)})
    with pytest.raises(PassportError, match=r"shards: .*weights_sha256 bbbbbbbbbbbb.*grid \(8, 8\)"):
        PASSPORT.require_same(other, where="shards")
    larger = Passport(**{**vars(PASSPORT), "frame_size": (64, 64), "grid": (8, 8)})
    PASSPORT.require_tokenizer(larger, where="x")
    with pytest.raises(PassportError):
        PASSPORT.require_same(larger, where="x")


def test_a_passport_survives_json_and_refuses_odd_fields():
    plain = PASSPORT.to_dict()
    assert Passport.from_dict(plain, where="x") == PASSPORT
    with pytest.raises(PassportError, match="colour"):
        Passport.from_dict(plain | {"colour": 1}, where="x")


def test_a_grid_checks_its_codes():
    codes = torch.randint(0, 64, (3, 4, 4))
    assert "int64 [3, 4, 4]" in repr(TokenGrid(codes=codes, passport=PASSPORT, source="a"))
    with pytest.raises(PassportError, match=r"0 to 64|vocabulary has 64"):
        TokenGrid(codes=codes.clone().fill_(64), passport=PASSPORT, source="a")
    with pytest.raises(PassportError, match="passport says"):
        TokenGrid(codes=codes[:, :2], passport=PASSPORT, source="a")


@pytest.fixture
def store(media_folder, tmp_path, tokenizer_folder):
    config = TokenizeConfig(
        source=media_folder, out=tmp_path / "s", tokenizer=str(tokenizer_folder), size=32, min_frames=4, workers=0
    )
    return tokenize(config)


def test_frames_are_views_of_the_mapped_file(store):
    frames = store.frames(0, 5)
    assert frames.dtype == np.uint16
    assert not frames.flags.owndata
    assert not frames.flags.writeable  # of the file, not a copy
    with pytest.raises(StoreError, match="not in one file"):
        store.frames(store.frame_count - 1, 2)


def test_a_flipped_bit_a_missing_file_and_a_cut_file_are_found(store):
    path = store.folder / "frames-00000.npy"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(StoreError, match=r"frames-00000\.npy: damaged"):
        TokenStore(store.folder).verify()
    path.write_bytes(whole[:-64])
    with pytest.raises(StoreError, match="frames-00000"):
        TokenStore(store.folder).frames(0, 1)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        TokenStore(store.folder).verify()


def test_what_is_no_store_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="no such shard folder"):
        TokenStore(tmp_path / "nowhere")
    (store.folder / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not a toto-shards store"):
        TokenStore(store.folder)
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="damaged shard manifest"):
        TokenStore(store.folder)


def test_tokenizers_load_by_folder_and_refuse_others(tokenizer, tokenizer_folder, tmp_path):
    again = toto.load_tokenizer(tokenizer_folder)
    frames = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    assert again.encode(frames).equal(tokenizer.encode(frames))
    assert again.grid(16, 24) == (2, 3)
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "magic"}')
    with pytest.raises(CheckpointError, match="unknown kind of tokenizer 'magic'"):
        load_tokenizer(tmp_path)
