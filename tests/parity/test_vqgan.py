"""VQGAN against taming-transformers with the same weights, through the command that imports them."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

from toto.__main__ import main
from toto.tokens.tokenizer import load_tokenizer
from toto.tokens.vqgan import VQGAN, VQGANConfig

WANTED = "reference only: pip install --no-deps -r references.txt"
model = pytest.importorskip("taming.modules.diffusionmodules.model", reason=WANTED)
quantize = pytest.importorskip("taming.modules.vqvae.quantize", reason=WANTED)

SMALL = {
    "double_z": False,
    "z_channels": 64,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [4],
    "dropout": 0.0,
}
PUBLISHED = SMALL | {"z_channels": 256, "resolution": 256, "ch": 128, "attn_resolutions": [16]}


class Reference(nn.Module):
    """The parts of the published VQModel that make tokens."""

    def __init__(self, plan: dict, codes: int, width: int):
        super().__init__()
        self.encoder, self.decoder = model.Encoder(**plan), model.Decoder(**plan)
        self.quantize = quantize.VectorQuantizer2(codes, width, beta=0.25)
        self.quant_conv = nn.Conv2d(plan["z_channels"], width, 1)
        self.post_quant_conv = nn.Conv2d(width, plan["z_channels"], 1)


@pytest.mark.parametrize("codes", [1024, 16384])
@torch.no_grad()
def test_tokens_and_reconstructions_are_the_references(tmp_path, capsys, codes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(codes)
        reference = Reference(SMALL, codes, 32).eval()
        reference.quantize.embedding.weight.normal_(std=0.3)
        frames = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
        frames[1, :64] = 200
    leftovers = {"loss.discriminator.main.0.weight": torch.ones(3), "loss.perceptual_loss.lin0.weight": torch.ones(2)}
    checkpoint = {
        "epoch": 3,
        "global_step": 10,
        "state_dict": reference.state_dict() | leftovers,
        "optimizer_states": [],
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    described = {"model": {"target": "t", "params": {"embed_dim": 32, "n_embed": codes, "ddconfig": SMALL}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(described))
    files = ["--checkpoint", str(tmp_path / "last.ckpt"), "--config", str(tmp_path / "model.yaml")]
    assert main(["tokenizer", "import", "--kind", "vqgan", *files, "--out", str(tmp_path / "t")]) == 0
    said = capsys.readouterr().out
    for name in ("epoch", "optimizer_states", "loss.discriminator", "loss.perceptual_loss"):
        assert name in said
    tokenizer = load_tokenizer(tmp_path / "t")
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    chosen, _, (_, _, tokens) = reference.quantize(reference.quant_conv(reference.encoder(pixels)))
    tokens = tokens.view(2, 8, 8)
    assert len(tokens.unique()) > 30
    assert torch.equal(tokenizer.encode(frames), tokens)
    rebuilt = reference.decoder(reference.post_quant_conv(chosen))
    network = tokenizer._model
    torch.testing.assert_close(network.pixels(network.codebook[tokens]), rebuilt, rtol=0, atol=1e-4)
    expected = ((rebuilt.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (tokenizer.decode(tokens).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("codes", [1024, 16384])
def test_names_and_sizes_at_the_published_size(codes):
    with torch.device("meta"):
        reference, mine = Reference(PUBLISHED, codes, 256), VQGAN(VQGANConfig(vocab_size=codes))
    assert {name: value.shape for name, value in reference.state_dict().items()} == {
        name: value.shape for name, value in mine.state_dict().items()
    }
