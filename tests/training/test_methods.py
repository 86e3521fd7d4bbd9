"""The ways to train a tokenizer: their formulas against other people's, and that they learn."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence

from toto.__main__ import main
from toto.media.catalog import Item
from toto.media.ledger import count_by_status
from toto.recipes import TOKENIZERS, tokenizer_recipe
from toto.runtime.errors import ConfigError, InterruptedRunError
from toto.runtime.metrics import read_metrics
from toto.runtime.seed import stream
from toto.tokens import tokenizer as registry
from toto.tokens.dvae import DVAEConfig, squeezed
from toto.tokens.fsq import FSQ, FSQConfig
from toto.tokens.quality import reconstruction_report
from toto.tokens.tokenizer import load_tokenizer
from toto.tokens.vqgan import VQGANConfig
from toto.tokens.vqvae import StackConfig
from toto.training import tokenizer as training
from toto.training.adversary import Adversarial, Discriminator, balance, hinge
from toto.training.gumbel import Gumbel, along_cosine, gumbel_noise, kl_to_uniform, logit_laplace
from toto.training.learner import Moment, Reconstruction
from toto.training.tokenizer import Run, TokenizerTrainConfig, learning_rate, train_tokenizer
from toto.training.tokenizer_data import Crops, Source, frames_of, load, load_squares

STACK = StackConfig(widths=(16, 32), hidden=(16, 16), blocks=(1, 1))
SMALL_GAN = VQGANConfig(
    vocab_size=32,
    code_width=8,
    z_channels=16,
    resolution=16,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(8,),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split, numbers in (("train", range(6)), ("heldout", range(6, 8))):
        (folder / split).mkdir()
        for number in numbers:
            coarse = stream(number, "picture").integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 32)).save(folder / split / f"{number}.png")
    return folder


def run_of(recipe: TokenizerTrainConfig, pictures: Path, **changes: object) -> TokenizerTrainConfig:
    """A run of seconds."""
    crops = dataclasses.replace(recipe.crops, size=16, colour_share=0.0)
    return dataclasses.replace(
        recipe,
        crops=crops,
        cooldown_crops=crops,
        sources=(Source(name="pictures", where=str(pictures / "train"), stride=1, share=1.0),),
        heldout=(Source(name="heldout", where=str(pictures / "heldout"), stride=1, share=0.0),),
        heldout_size=32,
        batch=8,
        warmup_steps=5,
        average_decay=0.9,
        precision="fp32",
        report_every=1,
        evaluate_every=1000,
        save_every=1000,
        **changes,
    )


@pytest.fixture
def runs(pictures: Path) -> dict[str, TokenizerTrainConfig]:
    """A short run of each method."""
    gan = Adversarial(codebook="average", commitment=0.25, begin_step=5, dead_below=0.05, discriminator_start=None)
    dvae = tokenizer_recipe("dvae-small")
    common = {"steps": 90, "cooldown_steps": 30, "parts": 2}
    return {
        "fsq": run_of(
            tokenizer_recipe("fsq"),
            pictures,
            model=FSQConfig(levels=(5, 5, 5), encoder=STACK, decoder=STACK),
            **common,
        ),
        "dvae": run_of(
            dvae,
            pictures,
            model=DVAEConfig(vocab_size=32, n_hid=16, n_init=16, blocks=1),
            method=Gumbel(
                begin_step=80,
                sharpness=20,
                temperature_steps=40,
                kl_weight=0,
                kl_steps=1,
                noise_steps=40,
                dead_below=0.05,
            ),
            learning_rate=2e-3,
            **(common | {"steps": 160}),
        ),
        "vqgan": run_of(tokenizer_recipe("vqgan-small"), pictures, model=SMALL_GAN, method=gan, **common),
    }


@pytest.mark.parametrize("name", ["fsq", "dvae", "vqgan"])
def test_reconstruction_improves_and_codes_stay_alive(runs, tmp_path: Path, name: str) -> None:
    config = runs[name]
    held, _ = load_squares(config.heldout[0], 32)
    before = reconstruction_report(Run(config, torch.device("cpu")).tokenizer(), [held])
    made = train_tokenizer(config, out=tmp_path / "run", resume=False, device="cpu")
    after = reconstruction_report(load_tokenizer(tmp_path / "run"), [held])
    assert after.psnr_db > before.psnr_db + 1.5
    assert after.codes_used >= 8
    assert made.passport.kind == name
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert any("heldout/heldout/ssim" in row for row in read_metrics(tmp_path / "run"))


def test_a_stopped_adversary_goes_on_exactly(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discriminator, learnt codes, dead codes and their counts included."""
    method = Adversarial(dead_below=0.3, discriminator_start=3, discriminator_width=8, discriminator_layers=1)
    config = dataclasses.replace(runs["vqgan"], method=method, steps=9, cooldown_steps=2, learning_rate=1e-3)
    whole = train_tokenizer(config, out=tmp_path / "whole", resume=False, device="cpu")
    advance = training.Run.advance

    def interrupted(run: Run, *args: object) -> dict[str, float]:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(run, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", interrupted)
        with pytest.raises(InterruptedRunError):
            train_tokenizer(config, out=tmp_path / "cut", resume=False, device="cpu")
    assert train_tokenizer(config, out=tmp_path / "cut", resume=True, device="cpu").passport == whole.passport
    rows = [row for row in read_metrics(tmp_path / "whole") if "train/loss" in row]
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    assert ["train/balance" in row for row in rows] == [False] * 3 + [True] * 6
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_logit_laplace_is_torchs_transformed_laplace() -> None:
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 0.8 + 0.1
    location, log_scale = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    theirs = TransformedDistribution(Laplace(location, log_scale.exp()), [SigmoidTransform()]).log_prob(pixels)
    torch.testing.assert_close(logit_laplace(pixels, location, log_scale), theirs)


def test_divergence_is_torchs() -> None:
    logits = torch.randn(2, 7, 3, 3, dtype=torch.float64)
    shares = Categorical(logits=logits.movedim(1, -1))
    even = Categorical(logits=torch.zeros_like(logits).movedim(1, -1))
    torch.testing.assert_close(kl_to_uniform(logits), kl_divergence(shares, even))


def test_gumbel_noise_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    noise = gumbel_noise(torch.Size([100_000, 4]), torch.Generator().manual_seed(0))
    shares = torch.bincount((logits + noise).argmax(1), minlength=4) / 100_000
    torch.testing.assert_close(shares, torch.softmax(logits, 0), rtol=0, atol=0.005)


def test_relaxations_have_the_gradients_they_should() -> None:
    def relaxed(logits: torch.Tensor, location: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        pixels = torch.softmax((logits + 0.3) / 0.5, dim=1)[:, :3] * 0.8 + 0.1
        return logit_laplace(pixels, location, log_scale).mean() + kl_to_uniform(logits).mean()

    draws = torch.randn(3, 1, 5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [draws[0].requires_grad_(), draws[1, :, :3].requires_grad_(), draws[2, :, :3].requires_grad_()]
    assert torch.autograd.gradcheck(relaxed, inputs)


@pytest.mark.parametrize("name", ["dvae", "fsq", "vqgan"])
def test_gradients_are_those_of_the_loss(runs, name: str) -> None:
    """A small step along the gradient of the decoder changes the loss by the gradient's squared norm."""
    run = Run(runs[name], torch.device("cpu"))
    pixels = Crops(runs[name].sources, 0).batch(0, 4, runs[name].crops)

    def part():
        return run.learner.part(pixels, Moment(step=0, cooling=False), torch.Generator().manual_seed(3))

    before = part()
    moved = 0.0
    chosen = [
        (parameter, gradient)
        for (where, parameter), gradient in zip(run.model.named_parameters(), before.gradients, strict=False)
        if where.startswith("decoder")
    ]
    norm = math.sqrt(sum(float(gradient.square().sum()) for _, gradient in chosen))
    step = 1e-3 / norm
    with torch.no_grad():
        for parameter, gradient in chosen:
            parameter += step * gradient
            moved += step * float(gradient.square().sum())
    assert float(part().loss) - float(before.loss) == pytest.approx(moved, rel=0.05)


def test_codes_of_the_dvae_are_placed_on_cells_and_dead_ones_put_elsewhere(runs) -> None:
    """Right after placing, a cell's nearest code is itself or a twin, and the decoder gets what it got before."""
    config = dataclasses.replace(runs["dvae"], learning_rate=0.0)
    method = dataclasses.replace(config.method, begin_step=2, dead_below=0.5, decay=0.0)
    run, crops = Run(dataclasses.replace(config, method=method), torch.device("cpu")), Crops(config.sources, 0)
    with ThreadPoolExecutor(1) as pool:
        before = run.advance(crops, pool)
        assert "train/codes_revived" not in before
        run.advance(crops, pool)
        network = run.model
        cells = crops.batch(1, config.batch, config.crops)
        features = network.features(squeezed((cells + 1) / 2)).movedim(1, -1).flatten(0, 2)
        logits = network.encoder.last(features.T[None, :, :, None])[0, :, :, 0].T
        placed = network.encoder.last.weight[logits.argmax(1), :, 0, 0]
        scale = placed.norm() / features.norm()
        torch.testing.assert_close(placed, features * scale, rtol=1e-3, atol=1e-4)
        after = run.advance(crops, pool)
    assert after["train/codes_revived"] > 0
    assert (run.learner.count > 0).all()


def test_schedules_of_the_dvae() -> None:
    published = Gumbel()
    assert (published.temperature_at(0), published.temperature_at(150_000)) == (1.0, 1 / 16)
    assert (published.kl_weight_at(0), published.kl_weight_at(5_000), published.kl_weight_at(9**9)) == (0.0, 6.6, 6.6)
    assert along_cosine(0, 2, 0.5) == pytest.approx(1.0)
    dvae = tokenizer_recipe("dvae")
    assert learning_rate(dvae, 0) == pytest.approx(1e-4)
    assert learning_rate(dvae, 3_000_000) == pytest.approx(1.25e-6)


def test_levels_and_codes_of_fsq() -> None:
    """Every code stands for digits that spell it, and rounding keeps every digit within its levels."""
    config = FSQConfig(levels=(4, 5, 2), encoder=STACK, decoder=STACK)
    network = FSQ(config)
    pixels = torch.randn(3, 3, 32, 32) * 30
    digits = network.digits(pixels)
    codes = network.codes(digits)
    assert config.vocab_size == 40
    assert 0 <= int(codes.min()) <= int(codes.max()) < 40
    levels = torch.tensor(config.levels)
    values = digits.detach().round()
    assert ((values >= -(levels // 2)) & (values <= (levels - 1) // 2)).all()
    every = torch.arange(40).view(1, 5, 8)
    places = torch.tensor([1, 4, 20])
    spelt = every.unsqueeze(-1) // places % levels - levels // 2
    assert torch.equal(network.codes(spelt.float()), every)
    with pytest.raises(ConfigError, match="at least 2 levels"):
        FSQConfig(levels=(4, 1), encoder=STACK, decoder=STACK)


def test_adversary_is_taming_transformers() -> None:
    theirs = pytest.importorskip(
        "taming.modules.discriminator.model",
        reason="reference only: pip install --no-deps -r references.txt",
    )
    reference = theirs.NLayerDiscriminator(input_nc=3, ndf=8, n_layers=2).train()
    mine = Discriminator(8, 2)
    running = {"running_mean", "running_var", "num_batches_tracked"}
    weights = {name: value for name, value in reference.state_dict().items() if name.split(".")[-1] not in running}
    mine.load_state_dict(weights)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(mine(pixels), reference(pixels))


def test_hinge_and_balance() -> None:
    assert float(hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))) == pytest.approx((0.5 + 1.0) / 2)
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = balance((2 * layer).sum(), (layer * 0.5).sum(), layer)
    assert float(weight) == pytest.approx(4, rel=1e-3)
    assert not weight.requires_grad


def test_a_perceptual_loss_can_be_plugged_in(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("some_plugin")
    plugin.distance = lambda rebuilt, pixels: (rebuilt - pixels).square().mean((1, 2, 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_plugin", plugin)
    crops = Crops(runs["vqgan"].sources, 0)
    losses = []
    for name in (None, "some_plugin:distance"):
        method = dataclasses.replace(runs["vqgan"].method, perceptual=name)
        with ThreadPoolExecutor(1) as pool:
            run = Run(dataclasses.replace(runs["vqgan"], method=method), torch.device("cpu"))
            losses.append(run.advance(crops, pool)["train/loss"])
    assert losses[1] > losses[0] + 0.01
    with pytest.raises(ConfigError, match="can't import the perceptual loss 'nowhere:at_all'"):
        Adversarial(perceptual="nowhere:at_all").learner(run.model)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("dvae", "vqgan-1k", "vqgan-16k")])
def test_recipes_for_laptops_stand(name: str) -> None:
    recipe = tokenizer_recipe(name)
    assert recipe.name == name
    assert recipe.cooldown_steps < recipe.steps
    run = Run(recipe, torch.device("cpu"))
    assert run.tokenizer().vocab_size == recipe.model.vocab_size


def test_configurations_that_do_not_fit(runs, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the kind dvae has DVAEConfig"):
        Run(dataclasses.replace(runs["fsq"], kind="dvae"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="trains a dVAE, not a FSQ"):
        Run(dataclasses.replace(runs["fsq"], method=Gumbel()), torch.device("cpu"))
    with pytest.raises(ConfigError, match="no `relaxed"):
        Run(dataclasses.replace(runs["vqgan"], method=Reconstruction()), torch.device("cpu"))
    with pytest.raises(ConfigError, match="no frames to train on"):
        train_tokenizer(tokenizer_recipe("dvae"), out=tmp_path, resume=False, device="cpu")


def test_large_folders_stay_on_disk_and_bad_files_are_counted(pictures: Path, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted((pictures / "train").iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "0broken.png").write_bytes(b"no picture")
    source = Source(name="mixed", where=str(folder), stride=1, share=1.0)
    whole, lazy = load(source), load(source, room=10_000)
    assert "mixed: 1 of 7 items can't be read; the first: 0broken.png: not an image" in capfd.readouterr().err
    assert [isinstance(each, Item) for each in lazy.items] == [False, False, False, True, True, True]
    assert all(torch.equal(frames_of(a), frames_of(b)) for a, b in zip(whole.items, lazy.items, strict=True))
    assert count_by_status(whole.ledger) == count_by_status(lazy.ledger) == {"ok": 6, "corrupt": 1}


class ThirdParty:
    """Entry points as another distribution would register them."""

    def __init__(self, name: str, value: str, found: object):
        self.name, self.value, self.found = name, value, found

    def load(self) -> object:
        return self.found


def test_a_kind_and_a_recipe_of_another_distribution(runs, pictures, tmp_path, monkeypatch, capsys) -> None:
    from toto.tokens.fsq import FSQTokenizer

    class OtherTokenizer(FSQTokenizer.__bases__[0]):  # type: ignore[name-defined,misc]
        kind, preprocessing, network, architecture = "theirs", "theirs", FSQ, FSQConfig

    module = types.ModuleType("their_package")
    module.OtherTokenizer = OtherTokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_package", module)
    recipe = dataclasses.replace(runs["fsq"], name="theirs", kind="theirs", steps=4, cooldown_steps=1)
    points = {
        "toto.tokenizers": [ThirdParty("theirs", "their_package:OtherTokenizer", OtherTokenizer)],
        "toto.tokenizer_recipes": [ThirdParty("theirs", "their_package:recipe", lambda: recipe)],
    }

    def found(*, group: str, name: str | None = None) -> list[ThirdParty]:
        return [point for point in points[group] if name in (None, point.name)]

    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr("toto.recipes.entry_points", found)
    assert main(["tokenizer", "train", "theirs", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert load_tokenizer(tmp_path / "run").passport.kind == "theirs"
    points["toto.tokenizers"] = [ThirdParty("theirs", "their_package:Gone", None)]
    assert main(["tokenizer", "inspect", "--tokenizer", str(tmp_path / "run")]) == 1
    assert "which can't be imported" in capsys.readouterr().err


def test_the_verb_takes_values_of_the_recipe(pictures: Path, tmp_path: Path, capsys) -> None:
    words = ["tokenizer", "train", "--recipe", "fsq", "--out", str(tmp_path / "run")]
    words += ["--data", f"{pictures / 'train'}=2", "--heldout", str(pictures / "heldout"), "--heldout-size", "32"]
    words += ["--steps", "2", "--cooldown-steps", "1", "--batch", "2", "--crops.size", "16"]
    words += ["--cooldown-crops.size", "16", "--model.levels", "3", "3"]
    assert main(words) == 0
    assert load_tokenizer(tmp_path / "run").vocab_size == 9
    for bad, said in (
        (["--data", "a=b"], "weight 'b' is not a number"),
        (["--data", "a=0"], "not positive"),
        (["--model.levels", "1"], "at least 2 levels"),
        (["--steeps", "3"], "--steps"),
        (["--data", str(tmp_path / "none")], "no such file or folder"),
    ):
        assert main(["tokenizer", "train", "fsq", "--out", str(tmp_path / "other"), *bad]) in (1, 2)
        assert said in capsys.readouterr().err
