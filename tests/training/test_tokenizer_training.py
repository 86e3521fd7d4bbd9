"""Training of the small VQ-VAE: resumes exactly, stops well, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toto.recipes import tokenizer as recipes
from toto.runtime.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.metrics import read_metrics
from toto.runtime.seed import stream
from toto.tokens.tokenizer import embedded_folder, load_tokenizer
from toto.tokens.vqvae import StackConfig, VQVAEConfig
from toto.training import tokenizer as training
from toto.training.codebook import Codebook, straight_through
from toto.training.tokenizer import TokenizerTrainConfig, learning_rate, train_tokenizer
from toto.training.tokenizer_data import CropConfig, Crops, Source, change_colours, load_squares


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four smooth pictures to train on and one to look at."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, numbers in (("train", range(4)), ("heldout", range(4, 5))):
        (folder / split).mkdir()
        for number in numbers:
            coarse = stream(number, "picture").integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 32)).save(folder / split / f"{number}.png")
    return folder


@pytest.fixture
def config(pictures: Path) -> TokenizerTrainConfig:
    """A run of seconds; codes are placed after two steps, and the cool-down begins after six."""
    tiny = StackConfig(widths=(8, 16), hidden=(8, 8), blocks=(1, 1))
    return dataclasses.replace(
        recipes.embedded(),
        name="tiny",
        model=VQVAEConfig(vocab_size=32, code_width=4, encoder=tiny, decoder=tiny),
        method=dataclasses.replace(recipes.embedded().method, begin_step=2),
        crops=dataclasses.replace(recipes.embedded().crops, size=16),
        cooldown_crops=dataclasses.replace(recipes.embedded().cooldown_crops, size=16),
        sources=(Source(name="pictures", where=str(pictures / "train"), stride=1, share=1.0),),
        heldout=(Source(name="pictures", where=str(pictures / "heldout"), stride=1, share=0.0),),
        heldout_size=32,
        steps=8,
        batch=4,
        parts=2,
        warmup_steps=2,
        cooldown_steps=2,
        precision="fp32",
        report_every=1,
        evaluate_every=4,
        save_every=4,
    )


def test_a_run_writes_a_tokenizer_that_loads(config: TokenizerTrainConfig, tmp_path: Path) -> None:
    made = train_tokenizer(config, out=tmp_path, resume=False, device="cpu")
    loaded = load_tokenizer(tmp_path)
    frames, _ = load_squares(config.heldout[0], 32)
    assert loaded.passport == made.passport
    assert torch.equal(loaded.encode(frames), made.encode(frames))
    told = json.loads((tmp_path / "tokenizer.json").read_text())["trained"]
    assert (told["recipe"], told["steps"], told["frames"]) == ("tiny", 8, 4)
    assert told["heldout"]["pictures"]["psnr_db"] > 5
    assert json.loads((tmp_path / "made.json").read_text())["config"]["name"] == "tiny"
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "heldout/pictures/psnr_db" in row] == [4, 8]


def test_a_stopped_run_goes_on_exactly(
    config: TokenizerTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_tokenizer(config, out=tmp_path / "whole", resume=False, device="cpu")
    advance = training.Run.advance

    def interrupted(run: training.Run, *args: object) -> dict[str, float]:
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(run, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", interrupted)
        with pytest.raises(InterruptedRunError, match="SIGTERM after step 5"):
            train_tokenizer(config, out=tmp_path / "cut", resume=False, device="cpu")
    assert not (tmp_path / "cut" / "tokenizer.json").exists()
    continued = train_tokenizer(config, out=tmp_path / "cut", resume=True, device="cpu")
    assert continued.passport == whole.passport  # the weights' hash
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def test_a_run_can_be_made_longer_before_its_cooldown(
    config: TokenizerTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = dataclasses.replace(config, steps=10)
    whole = train_tokenizer(longer, out=tmp_path / "whole", resume=False, device="cpu")
    advance = training.Run.advance

    def interrupted(run: training.Run, *args: object) -> dict[str, float]:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(run, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", interrupted)
        with pytest.raises(InterruptedRunError):
            train_tokenizer(config, out=tmp_path / "cut", resume=False, device="cpu")
    assert train_tokenizer(longer, out=tmp_path / "cut", resume=True, device="cpu").passport == whole.passport
    with pytest.raises(ConfigError, match="another steps"):
        train_tokenizer(dataclasses.replace(config, steps=20), out=tmp_path / "cut", resume=True, device="cpu")


def test_parts_add_up_to_plain_gradient_descent(config: TokenizerTrainConfig) -> None:
    """Two parts side by side against `loss.backward()` over the whole batch and torch's AdamW."""
    run = training.Run(config, torch.device("cpu"))
    crops = Crops(config.sources, config.seed)
    plain = training.Run(config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(
        plain.model.parameters(), lr=learning_rate(config, 0), betas=config.betas, weight_decay=config.weight_decay
    )
    pixels = crops.batch(0, config.batch, config.crops)
    torch.nn.functional.mse_loss(plain.model.pixels(plain.model.latents(pixels)), pixels).backward()
    torch.nn.utils.clip_grad_norm_(plain.model.parameters(), config.clip)
    optimizer.step()
    with ThreadPoolExecutor(2) as pool:
        run.advance(crops, pool)
    for (name, mine), theirs in zip(run.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_batches_depend_on_seed_and_step_alone(config: TokenizerTrainConfig) -> None:
    crops, again = (Crops(config.sources, 3) for _ in range(2))
    crops.batch(0, 4, config.crops)
    batch = crops.batch(7, 4, config.crops)
    assert tuple(batch.shape) == (4, 3, 16, 16)
    assert -1 <= float(batch.min()) < float(batch.max()) <= 1
    assert torch.equal(batch, again.batch(7, 4, config.crops))
    assert not torch.equal(batch, again.batch(8, 4, config.crops))
    assert crops.frames == 4


def test_colours_are_left_alone_where_they_should() -> None:
    crops = CropConfig(size=16, zoom=0.5, native=0.0, colour_share=0.0, colour_mix=0.3, colour_shift=0.2)
    pixels = torch.rand(3, 3, 4, 4) * 2 - 1
    rng = stream(0, "colours")
    assert torch.allclose(change_colours(pixels, crops, rng), pixels)
    changed = change_colours(pixels, dataclasses.replace(crops, colour_share=1.0), rng)
    assert ((changed - pixels).abs().mean((1, 2, 3)) > 0.01).all()


def test_codes_follow_their_vectors_and_dead_ones_move() -> None:
    vectors = torch.zeros(4, 2)
    book = Codebook(vectors, begin_step=1, decay=0.5, dead_below=0.2, unit=True, follow=True)
    here = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1]]), dim=-1)
    assert book.update(here, torch.zeros(2, dtype=torch.int64), 0, stream(0)) == 4
    assert {tuple(row) for row in vectors.tolist()} <= {tuple(row) for row in here.tolist()}
    vectors.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]))
    moved = sum(book.update(here, torch.zeros(2, dtype=torch.int64), step, stream(step)) for step in range(1, 9))
    assert moved >= 3  # the three codes that nothing chooses
    assert vectors[0] @ torch.tensor([1.0, 0.0]) > 0.99
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))


def test_codes_become_the_means_of_their_vectors() -> None:
    """Without unit length: exponential averages of sums and counts (van den Oord et al., 2017, appendix A)."""
    vectors = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    book = Codebook(vectors, begin_step=0, decay=0.5, dead_below=0.0, unit=False, follow=True)
    book.update(torch.tensor([[3.0, 0.0], [5.0, 2.0]]), torch.tensor([0, 0]), 0, stream(0))
    assert torch.allclose(vectors, torch.tensor([[(1 + 8) / 3, 2 / 3], [5.0, 5.0]]))


def test_gradients_pass_straight_through() -> None:
    latents = torch.tensor([0.6, 0.8]).view(1, 1, 1, 2).requires_grad_()
    vectors = straight_through(latents, torch.tensor([0.0, 1.0]))
    assert torch.allclose(vectors, torch.tensor([0.0, 1.0]))
    (vectors * torch.tensor([3.0, 5.0])).sum().backward()
    assert torch.equal(latents.grad, torch.tensor([3.0, 5.0]).view(1, 1, 1, 2))


def test_learning_rate_rises_stays_and_falls(config: TokenizerTrainConfig) -> None:
    run = dataclasses.replace(config, learning_rate=1.0, warmup_steps=4, steps=20, cooldown_steps=4)
    rates = [learning_rate(run, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:17] == [1.0] * 13
    assert rates[17:] == pytest.approx([0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])


def test_runs_that_are_refused(config: TokenizerTrainConfig, tmp_path: Path) -> None:
    train_tokenizer(dataclasses.replace(config, steps=4), out=tmp_path, resume=False, device="cpu")
    with pytest.raises(ConfigError, match="holds a run already"):
        train_tokenizer(config, out=tmp_path, resume=False, device="cpu")
    other = dataclasses.replace(config, steps=4, seed=5, batch=2)
    with pytest.raises(ConfigError, match="another batch, seed"):
        train_tokenizer(other, out=tmp_path, resume=True, device="cpu")
    (tmp_path / training.STATE_FILE).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="state can't be read"):
        train_tokenizer(config, out=tmp_path, resume=True, device="cpu")
    with pytest.raises(ConfigError, match="equal parts"):
        train_tokenizer(dataclasses.replace(config, parts=3), out=tmp_path / "parts", resume=False, device="cpu")
    (tmp_path / "empty").mkdir()
    empty = (Source(name="none", where=str(tmp_path / "empty"), stride=1, share=1.0),)
    with pytest.raises(ConfigError, match="no image or video"):
        train_tokenizer(dataclasses.replace(config, sources=empty), out=tmp_path / "new", resume=False, device="cpu")


def test_a_loss_that_is_not_finite_stops_the_run(config: TokenizerTrainConfig, tmp_path: Path) -> None:
    wild = dataclasses.replace(config, learning_rate=1e30, clip=1e30)
    with pytest.raises(NonFiniteLossError, match=r"step \d+; lower learning_rate"):
        train_tokenizer(wild, out=tmp_path, resume=False, device="cpu")
    assert not (tmp_path / "tokenizer.json").exists()


def test_collapse_is_announced(config: TokenizerTrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = VQVAEConfig(vocab_size=8, code_width=4, encoder=config.model.encoder, decoder=config.model.decoder)
    train_tokenizer(
        dataclasses.replace(config, model=few, collapse_below=1.1), out=tmp_path, resume=False, device="cpu"
    )
    assert "of 8 codes occur in pictures; raise method.dead_below" in capfd.readouterr().err


def test_the_recipe_stands() -> None:
    recipe = recipes.embedded()
    assert recipe.cooldown_steps < recipe.steps
    assert {source.where for source in recipe.sources} == {"sample:scenes/train", "sample:photographs/train"}
    told = json.loads((embedded_folder() / "tokenizer.json").read_text())
    assert told["architecture"] == json.loads(json.dumps(dataclasses.asdict(recipe.model)))
    assert (told["trained"]["recipe"], told["trained"]["steps"]) == (recipe.name, recipe.steps)
