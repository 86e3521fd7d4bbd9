"""The dVAE against the `DALL-E` package with the same weights, through the command that imports them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from toto.__main__ import main
from toto.tokens.dvae import DVAE, DVAEConfig, config_of, from_published, squeezed, unsqueezed
from toto.tokens.tokenizer import load_tokenizer

dall_e = pytest.importorskip("dall_e", reason="reference only: pip install --no-deps -r references.txt")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An encoder and a decoder of the reference, and their files as published: whole pickled modules."""
    folder = tmp_path_factory.mktemp("published")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = dall_e.Encoder(n_hid=64, vocab_size=512).eval()
        decoder = dall_e.Decoder(n_hid=64, vocab_size=512).eval()
    torch.save(encoder, folder / "encoder.pkl")
    torch.save(decoder, folder / "decoder.pkl")
    return encoder, decoder, folder


def pictures(size: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(size)
    coarse = torch.randint(0, 256, (2, 3, size // 8, size // 8), generator=rng).float()
    fine = torch.randint(-20, 21, (2, 3, size, size), generator=rng)
    whole = F.interpolate(coarse, size=(size, size), mode="bilinear") + fine
    return whole.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [128, 256])
@torch.no_grad()
def test_tokens_and_pixels_are_the_references(published, tmp_path, size):
    encoder, decoder, folder = published
    files = ["--encoder", str(folder / "encoder.pkl"), "--decoder", str(folder / "decoder.pkl")]
    assert main(["tokenizer", "import", "--kind", "dvae", *files, "--out", str(tmp_path / "t")]) == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    frames = pictures(size)
    tokens = encoder(dall_e.map_pixels(frames.permute(0, 3, 1, 2).float() / 255)).argmax(1)
    assert len(tokens.unique()) > 8
    assert torch.equal(tokenizer.encode(frames), tokens)
    one_hot = F.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
    values = decoder(one_hot)
    picture = dall_e.unmap_pixels(torch.sigmoid(values[:, :3]))
    network = tokenizer._model
    torch.testing.assert_close(network.picture(tokens), picture, rtol=0, atol=1e-5)
    torch.testing.assert_close(network.values(one_hot), values, rtol=0, atol=1e-4)
    expected = (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (tokenizer.decode(tokens).int() - expected.int()).abs().max() <= 1


def test_pixel_maps_are_the_references():
    pixels = torch.rand(1, 3, 4, 4)
    assert torch.equal(squeezed(pixels), dall_e.map_pixels(pixels))
    assert torch.equal(unsqueezed(pixels), dall_e.unmap_pixels(pixels))


def test_names_and_sizes_at_the_published_size():
    with torch.device("meta"):
        encoder, decoder, mine = dall_e.Encoder(), dall_e.Decoder(), DVAE(DVAEConfig())
    renamed = from_published(encoder.state_dict(), decoder.state_dict())
    assert config_of(renamed) == DVAEConfig()
    assert {name: value.shape for name, value in renamed.items()} == {
        name: value.shape for name, value in mine.state_dict().items()
    }
    assert sum(value.numel() for name, value in renamed.items() if name.startswith("encoder")) == 53_786_240
