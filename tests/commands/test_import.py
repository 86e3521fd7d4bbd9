"""`toto tokenizer import`: what fits becomes a tokenizer, what doesn't is one line, and nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from toto.__main__ import main
from toto.tokens.dvae import DVAE, DVAEConfig
from toto.tokens.tokenizer import load_tokenizer
from toto.tokens.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    vocab_size=64,
    code_width=16,
    z_channels=16,
    resolution=32,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(16,),
)


def published_name(name: str) -> str:
    return name.replace(".weight", ".w").replace(".bias", ".b")


@pytest.fixture
def dvae_files(tmp_path):
    """State dicts with the published names, and the network they are of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DVAE(DVAEConfig(vocab_size=64, n_hid=16, n_init=8, blocks=1))
    files = {}
    for side in ("encoder", "decoder"):
        state = getattr(network, side).state_dict()
        files[side] = {published_name(name): value.clone() for name, value in state.items()}
    return network, files


@pytest.fixture
def vqgan_files(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VQGAN(SMALL)
    plan = {
        "double_z": False,
        "z_channels": 16,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [16],
        "dropout": 0.0,
    }
    described = {"model": {"params": {"embed_dim": 16, "n_embed": 64, "ddconfig": plan}}}
    return network, {"state_dict": network.state_dict(), "epoch": 7}, described


def import_dvae(tmp_path, files, write=torch.save, *, ending="pkl"):
    for side, state in files.items():
        write(state, tmp_path / f"{side}.{ending}")
    words = [word for side in files for word in (f"--{side}", str(tmp_path / f"{side}.{ending}"))]
    return main(["tokenizer", "import", "--kind", "dvae", *words, "--out", str(tmp_path / "out")])


def import_vqgan(tmp_path, checkpoint, described):
    torch.save(checkpoint, tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(described if isinstance(described, str) else yaml.safe_dump(described))
    words = ["--checkpoint", str(tmp_path / "last.ckpt"), "--config", str(tmp_path / "model.yaml")]
    return main(["tokenizer", "import", "--kind", "vqgan", *words, "--out", str(tmp_path / "out")])


def pictures(size=32):
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("write", "ending"), [(torch.save, "pkl"), (safetensors.torch.save_file, "safetensors")], ids=["pickle", "safe"]
)
def test_a_dvae_from_state_dicts(tmp_path, capsys, dvae_files, write, ending):
    network, files = dvae_files
    assert import_dvae(tmp_path, files, write, ending=ending) == 0
    said = capsys.readouterr().out
    assert "encoder: SHA-256" in said
    assert "one of 64 codes for 8 x 8 pixels" in said
    tokenizer = load_tokenizer(tmp_path / "out")
    assert torch.equal(tokenizer.encode(pictures()), network.encode(pictures()))
    record = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert len(record["trained"]["sha256"]["encoder"]) == 64
    assert (tmp_path / "out" / "made.json").exists()


def test_a_vqgan_from_a_lightning_checkpoint(tmp_path, capsys, vqgan_files):
    network, checkpoint, described = vqgan_files
    checkpoint["state_dict"] |= {f"loss.perceptual_loss.net.{n}": torch.zeros(1) for n in range(3)}
    assert import_vqgan(tmp_path, checkpoint, described) == 0
    said = capsys.readouterr().out
    assert "left out, not the tokenizer's: epoch, loss.perceptual_loss (3)" in said
    tokenizer = load_tokenizer(tmp_path / "out")
    assert torch.equal(tokenizer.encode(pictures()), network.encode(pictures()))
    assert torch.equal(tokenizer.decode(tokenizer.encode(pictures())), network.decode(network.encode(pictures())))


class Gadget:
    """Calls os.system where a pickle is executed."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_gadgets_are_refused_by_name(tmp_path, capsys, dvae_files, vqgan_files, protocol):
    marker = tmp_path / "executed"
    _, files = dvae_files
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": Gadget(marker)}, protocol))
    words = ["--encoder", str(tmp_path / "plain.pkl"), "--decoder", str(tmp_path / "plain.pkl")]
    assert main(["tokenizer", "import", "--kind", "dvae", *words, "--out", str(tmp_path / "out")]) == 1
    assert "posix.system" in capsys.readouterr().err
    _, checkpoint, described = vqgan_files
    checkpoint["callbacks"] = {"nested": [Gadget(marker)]}
    torch.save(checkpoint, tmp_path / "x.ckpt", pickle_protocol=max(protocol, 2))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(described))
    words = ["--checkpoint", str(tmp_path / "x.ckpt"), "--config", str(tmp_path / "model.yaml")]
    assert main(["tokenizer", "import", "--kind", "vqgan", *words, "--out", str(tmp_path / "out")]) == 1
    assert "posix.system" in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    assert files


def damage(files, edit):
    edit(files)
    return files


def drop(files):
    del files["encoder"]["blocks.group_2.block_1.id_path.w"]
    files["decoder"]["stranger"] = torch.ones(2)
    files["decoder"]["blocks.output.conv.b"] = torch.ones(5)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (drop, ["id_path.weight is missing", "decoder.stranger is surplus", "conv.bias is [5], not [6]"]),
        (lambda files: files["encoder"]["blocks.input.b"].fill_(torch.nan), ["not finite: encoder.blocks.input.bias"]),
        (lambda files: files.update(encoder=files["decoder"]), ["don't fit"]),
        (lambda files: files["encoder"].pop("blocks.output.conv.w"), ["is no dVAE", "output.conv.weight"]),
        (lambda files: files["encoder"].update({"blocks.input.w": torch.zeros(())}), ["is no dVAE"]),
    ],
)
def test_weights_that_do_not_fit(tmp_path, capsys, dvae_files, edit, said):
    _, files = dvae_files
    edit(files)
    assert import_dvae(tmp_path, files) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in said), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda params: params.update(n_embed=65), "quantize.embedding.weight is [64, 16], not [65, 16]"),
        (lambda params: params["ddconfig"].update(ch_mult=[1, 2, 2]), "encoder.down.2.block.0.norm1.weight is missing"),
        (lambda params: params["ddconfig"].update(ch=48), "can't be normalised in 32 groups"),
        (lambda params: params["ddconfig"].update(double_z=True), "a variant that isn't supported (double_z True)"),
        (lambda params: params.pop("ddconfig"), "lacks 'ddconfig'"),
        (lambda params: params.update(n_embed="many"), "'many' is no whole number"),
        (lambda params: params["ddconfig"].update(ch_mult=[]), "aren't positive"),
        (lambda params: params["ddconfig"].update(ch_mult=3), "is no configuration of a VQGAN"),
    ],
)
def test_configurations_that_disagree_with_the_weights(tmp_path, capsys, vqgan_files, edit, said):
    _, checkpoint, described = vqgan_files
    edit(described["model"]["params"])
    assert import_vqgan(tmp_path, checkpoint, described) == 1
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[1, 2", "model: 3", "!!python/object/apply:os.system ['true']", "\x00"])
def test_files_that_are_no_configuration(tmp_path, capsys, vqgan_files, text):
    _, checkpoint, _ = vqgan_files
    assert import_vqgan(tmp_path, checkpoint, text) == 1
    line = capsys.readouterr().err
    assert "is no configuration of a VQGAN" in line
    assert line.count("\n") == 1


def test_options_that_do_not_go_together(tmp_path, capsys, dvae_files):
    _, files = dvae_files
    out = ["--out", str(tmp_path / "out")]
    assert main(["tokenizer", "import", "--kind", "dvae", "--encoder", "x", *out]) in (1, 2)
    assert "needs --decoder" in capsys.readouterr().err
    assert main(["tokenizer", "import", "--kind", "dvae", "--encoder", "x", "--decoder", "y", "--config", "z", *out])
    assert "doesn't take --config" in capsys.readouterr().err
    assert main(["tokenizer", "import", "--kind", "dvae", "--encoder", "x", "--decoder", "y", *out]) == 1
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert import_dvae(tmp_path, files) in (1, 2)
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
