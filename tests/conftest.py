"""Fixtures: small media files made here, a random tokenizer, and stores made from them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toto.media.encode import write_video
from toto.media.ledger import LedgerRow
from toto.media.procedural import make_clip
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, finish_store, write_ledger, write_pixels, write_shard
from toto.tokens.vqvae import VQVAE, StackConfig, VQVAEConfig, VQVAETokenizer


def pytest_collection_modifyitems(items):
    """Skip what only a GPU can show where there is none, unless one is promised."""
    if torch.cuda.is_available() or os.environ.get("TOTO_REQUIRE_GPU"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; set TOTO_REQUIRE_GPU=1 to fail instead"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run two at a time: one thread each, the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> VQVAETokenizer:
    """A random VQ-VAE of 64 codes whose codes vary with the picture."""
    stack = StackConfig(widths=(8, 8), hidden=(8, 8), blocks=(1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAE(VQVAEConfig(vocab_size=64, code_width=8, encoder=stack, decoder=stack))
        model.codebook.copy_(torch.nn.functional.normalize(torch.randn(64, 8), dim=-1))
    return VQVAETokenizer.from_model(model, trained={})


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def make_video(path: Path, *, frames: int = 40, size: int = 64, number: int = 0, rate: float = 12) -> Path:
    """An H.264 file of a procedural clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, make_clip(7, number, frames=frames, size=size).clip.frames, rate=rate)
    return path


def make_photo(path: Path, *, height: int = 48, width: int = 80, number: int = 0) -> Path:
    """A JPEG of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)
    return path


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory) -> Path:
    """Two classes with three videos and two photographs each."""
    root = tmp_path_factory.mktemp("media")
    for label, name in enumerate(("slow", "fast")):
        for number in range(3):
            make_video(root / name / f"clip{number}.mp4", number=6 * label + number, frames=40 + 3 * number)
        for number in range(2):
            make_photo(root / name / f"photo{number}.jpg", number=10 * label + number)
    return root


PASSPORT = Passport(
    kind="vqvae", weights_sha256="a" * 64, preprocessing="none", vocab_size=32, frame_size=(24, 24), grid=(3, 3)
)


TEXTURES = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)


def pictured(codes) -> np.ndarray:
    """Frames that show each code `[T, rows, cols]` as a texture of 8 x 8 pixels."""
    frames, rows, cols = codes.shape
    return TEXTURES[codes].swapaxes(2, 3).reshape(frames, 8 * rows, 8 * cols, 3)


def make_store(
    folder: Path,
    *,
    videos=(),
    images: int = 0,
    passport: Passport = PASSPORT,
    seed: int = 0,
    drift: int = 1,
    pixels: bool = False,
) -> Path:
    """A store of drifting codes: in each video, row r shows `first + r + drift x frame` (mod 7), with some noise.

    With `pixels`, every code is a texture.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    codes, items, first = [], [], 0
    for number, frames in enumerate([*videos, *[1] * images]):
        kind = "video" if number < len(videos) else "image"
        clean = (rng.integers(7) + drift * np.arange(frames)[:, None, None] + np.arange(3)[None, :, None]) % 7
        clip = np.where(rng.random((frames, 3, 3)) < 0.1, rng.integers(0, 32, (frames, 3, 3)), clean)
        codes.append(clip.astype(np.uint16))
        items.append(
            StoredItem(
                id=f"{kind}{number}", kind=kind, label=None, first_frame=first, frame_count=frames, fps=10, stride=4
            )
        )
        first += frames
    shard = write_shard(folder, 0, codes, (3, 3))
    if pixels:
        shard["pixels"] = write_pixels(folder, 0, map(pictured, codes), (first, 24, 24))
    ledger = [LedgerRow(id=item.id, kind=item.kind, status="ok", frames=item.frame_count) for item in items]
    write_ledger(folder, ledger)
    finish_store(folder, passport=passport, stride=4, shards=[shard], items=items, counts={"ok": len(items)}, job={})
    return folder


@pytest.fixture(scope="session")
def video_store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "videos", videos=(20, 9, 4, 33, 3, 12))


@pytest.fixture(scope="session")
def image_store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "images", images=11, seed=1)


@pytest.fixture(scope="session")
def pixel_store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "pixels", videos=(20, 9, 4, 33, 3, 12), images=9, pixels=True)
