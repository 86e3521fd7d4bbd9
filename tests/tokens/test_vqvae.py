"""The small VQ-VAE: its codes belong to single frames, its folder is held against its passport."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from toto.media import sample
from toto.media.decode import read_media
from toto.media.transforms import square
from toto.runtime.errors import CheckpointError, MediaError, PassportError, TotoError
from toto.runtime.files import sha256_of
from toto.tokens.neural import to_frames, to_pixels
from toto.tokens.quality import code_use, psnr, reconstruction_report
from toto.tokens.tokenizer import load_tokenizer
from toto.tokens.vqvae import VQVAE, StackConfig, VQVAEConfig, VQVAETokenizer

TINY = VQVAEConfig(
    vocab_size=40,
    code_width=4,
    encoder=StackConfig(widths=(8, 16), hidden=(8, 8), blocks=(1, 1)),
    decoder=StackConfig(widths=(8, 16), hidden=(8, 8), blocks=(1, 2)),
)


@pytest.fixture
def tiny() -> VQVAETokenizer:
    """A random VQ-VAE with a random codebook."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAE(TINY)
        model.codebook.copy_(torch.nn.functional.normalize(torch.randn(40, 4), dim=-1))
    return VQVAETokenizer.from_model(model, trained={"recipe": "none"})


@pytest.fixture(scope="module")
def embedded() -> VQVAETokenizer:
    found = load_tokenizer()
    assert isinstance(found, VQVAETokenizer)
    return found


def noise(count: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def test_shapes_and_range(tiny: VQVAETokenizer) -> None:
    frames = noise(3)
    codes = tiny.encode(frames)
    assert (codes.dtype, tuple(codes.shape)) == (torch.int64, (3, 4, 6))
    assert 0 <= int(codes.min()) <= int(codes.max()) < 40
    rebuilt = tiny.decode(codes)
    assert (rebuilt.dtype, rebuilt.shape) == (torch.uint8, frames.shape)
    assert tiny.encode(frames[:0]).shape == (0, 4, 6)
    assert tiny.at(128, 64).grid == (16, 8)


@pytest.mark.parametrize("size", [64, 128])
def test_codes_are_the_same_alone_and_in_a_batch(embedded: VQVAETokenizer, size: int) -> None:
    path = sample.scenes("heldout")[0]
    frames = square(read_media(path, stride=9, limit=7).frames, size)  # 7: the last chunk is filled up
    together = embedded.encode(frames)
    assert torch.equal(together, torch.cat([embedded.encode(frame[None]) for frame in frames]))
    assert torch.equal(together[2:6], embedded.encode(frames[2:6]))
    assert torch.equal(embedded.decode(together)[5:6], embedded.decode(together[5:6]))


def test_autocast_around_it_changes_nothing(tiny: VQVAETokenizer) -> None:
    frames = noise(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = tiny.encode(frames)
        rebuilt = tiny.decode(codes)
    assert torch.equal(codes, tiny.encode(frames))
    assert torch.equal(rebuilt, tiny.decode(codes))


def test_the_nearest_code_is_chosen(tiny: VQVAETokenizer) -> None:
    latents = tiny._model.latents(to_pixels(noise(2)))
    distances = torch.cdist(latents.flatten(0, 2), tiny._model.codebook)
    assert torch.equal(tiny._model.nearest(latents).flatten(), distances.argmin(1))
    assert torch.allclose(latents.norm(dim=-1), torch.ones(latents.shape[:3]))


def test_pixels_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_frames(to_pixels(levels)), levels)
    assert to_frames(torch.full((1, 3, 8, 8), 1.7)).unique().tolist() == [255]


def test_saved_and_loaded(tiny: VQVAETokenizer, tmp_path: Path) -> None:
    tiny.save(tmp_path / "it")
    loaded = load_tokenizer(tmp_path / "it")
    assert isinstance(loaded, VQVAETokenizer)
    assert (loaded.passport, loaded.config, loaded.trained) == (tiny.passport, TINY, {"recipe": "none"})
    assert torch.equal(loaded.encode(noise(2)), tiny.encode(noise(2)))
    weights = safetensors.torch.load_file(tmp_path / "it" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


@pytest.mark.parametrize("shape", [(2, 30, 32, 3), (2, 32, 0, 3), (2, 3, 32, 32), (32, 32, 3)])
def test_frames_that_are_none(embedded: VQVAETokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises((MediaError, TypeError)):  # under pytest the annotated shapes are checked first
        embedded.encode(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("code", [-1, 40])
def test_codes_out_of_range(tiny: VQVAETokenizer, code: int) -> None:
    with pytest.raises(PassportError, match=f"{code}.*vocabulary has 40"):
        tiny.decode(torch.full((1, 2, 2), code))


def change_json(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Edit the weights and put the new hash into the passport."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        edit(weights)
        safetensors.torch.save_file(weights, path)
        config = json.loads((folder / "tokenizer.json").read_text())
        config["passport"]["weights_sha256"] = sha256_of(path)
        (folder / "tokenizer.json").write_text(json.dumps(config))

    return change


def drop_and_reshape(weights: dict[str, Tensor]) -> None:
    del weights["encoder.1.bias"]
    weights["stranger"] = torch.zeros(1)
    weights["codebook"] = torch.zeros(39, 4)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights here"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "SHA-256 differs"),
        (
            change_weights(drop_and_reshape),
            r"encoder.1.bias is missing, stranger is surplus, codebook is \[39, 4\]",
        ),
        (change_weights(lambda weights: weights["decoder.0.bias"].fill_(torch.nan)), "not finite: decoder.0.bias"),
        (change_json(architecture={"vocab_size": 40}), "architecture of the tokenizer can't be read"),
        (change_json(architecture=None), "architecture of the tokenizer can't be read"),
        (change_json(architecture=dataclasses.asdict(TINY) | {"heads": 4}), "heads"),
        (change_json(architecture=dataclasses.asdict(TINY) | {"vocab_size": 41}), "the passport says"),
        (change_json(passport={"kind": "vqvae"}), "passport with missing"),
        (change_json(kind="vqgan-x"), "unknown kind"),
    ],
)
def test_damaged_folders(tiny: VQVAETokenizer, tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    tiny.save(tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(TotoError, match=said):
        load_tokenizer(tmp_path / "it")


def test_weights_that_are_no_safetensors(tiny: VQVAETokenizer, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a weight file")
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["passport"]["weights_sha256"] = sha256_of(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="can't be read"):
        VQVAETokenizer.from_folder(tmp_path, config, torch.device("cpu"))


def test_psnr_is_skimages() -> None:
    a, b = noise(3), (noise(3).int() + 9).clamp(max=255).to(torch.uint8)
    theirs = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(theirs)
    assert psnr(a, a).isinf().all()


def test_code_use() -> None:
    used, perplexity = code_use(torch.tensor([5, 0, 5, 0, 5, 5]))
    assert (used, perplexity) == (4, pytest.approx(4.0))


def test_report(tiny: VQVAETokenizer) -> None:
    clips = [noise(2), noise(3, 16, 16)]
    report = reconstruction_report(tiny, clips)
    each = torch.cat([psnr(frames, tiny.decode(tiny.encode(frames))) for frames in clips])
    assert (report.frames, report.tokens) == (5, 2 * 24 + 3 * 4)
    assert report.psnr_db == pytest.approx(float(each.mean()))
    assert report.psnr_of_mean_error_db <= report.psnr_db
    assert report.share_used == report.codes_used / 40
    assert 1 <= report.perplexity <= report.codes_used
    with pytest.raises(MediaError, match="no frames"):
        reconstruction_report(tiny, [])
