"""A run from another one's weights: what may change, what is refused, and what is said and kept of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pictured

import toto
from toto.model.baselines.config import MambaConfig
from toto.model.config import ModelConfig
from toto.model.weights import load_card, weights_sha256
from toto.recipes import PRETRAINING
from toto.runtime.errors import ConfigError, PassportError
from toto.runtime.metrics import read_metrics
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, finish_store, write_pixels, write_shard
from toto.training.config import DataConfig, TrainConfig
from toto.training.continuing import tokens_in_words
from toto.training.loop import train
from toto.training.optimizer import OptimizerConfig
from toto.training.source import SourceConfig

SIZES = (8, 16)


def store(folder: Path, side: int, *, pixels: bool = False, **passport) -> Path:
    """A store of videos whose codes are stripes that move; at any resolution they show the same of it."""
    folder.mkdir(parents=True)
    rows, cols, frames = np.arange(side)[:, None], np.arange(side)[None], np.arange(12)[:, None, None]
    codes = [((rows // (side // 4) + 2 * (cols // (side // 4)) + frames + n) % 7).astype(np.uint16) for n in range(6)]
    items = [
        StoredItem(id=f"v{n}", kind="video", label=None, first_frame=12 * n, frame_count=12, fps=10, stride=1)
        for n in range(6)
    ]
    shard = write_shard(folder, 0, codes, (side, side))
    if pixels:
        shard["pixels"] = write_pixels(folder, 0, map(pictured, codes), (72, 8 * side, 8 * side))
    known = {"kind": "dvae", "weights_sha256": "b" * 64, "preprocessing": "none", "vocab_size": 16, **passport}
    whole = Passport(**known, frame_size=(8 * side, 8 * side), grid=(side, side))
    finish_store(folder, passport=whole, stride=1, shards=[shard], items=items, counts={"ok": 6}, job={})
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("continuing")
    return {side: store(root / str(side), side, pixels=True) for side in SIZES}


def config(path, *, frames, steps, **changes) -> TrainConfig:
    made = TrainConfig(
        data=DataConfig(sources=(SourceConfig(path=path, weight=1),), frames=frames),
        model=ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5),
        steps=steps,
        batch=2,
        micro_batch=2,
        precision="fp32",
        device="cpu",
        log_every=1,
        save_every=steps,
        eval_every=steps,
    )
    return replace(made, **changes)


def losses(run):
    return [row["train/loss"] for row in read_metrics(run) if "train/loss" in row]


@pytest.fixture(scope="module")
def coarse(stores, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "coarse"
    train(config(stores[8], frames=4, steps=60), out)
    return out


def finer(stores, coarse, **changes) -> TrainConfig:
    made = config(stores[16], frames=2, steps=3, init=str(coarse), **changes)
    return replace(made, model=replace(made.model, rope_base=50_000.0))


def test_a_finer_grid_with_another_base_begins_far_below_a_new_model(stores, coarse, tmp_path, capsys):
    fine = finer(stores, coarse)
    capsys.readouterr()
    train(fine, tmp_path / "fine")
    said = capsys.readouterr().err
    train(replace(fine, init=None), tmp_path / "anew")
    assert losses(tmp_path / "fine")[0] < losses(tmp_path / "anew")[0] - 0.5
    assert f"from {coarse} (step 60, {60 * 2 * 257:,} tokens):" in said
    assert "kept: 0.0 M weights; 16 codes of tokenizer dvae (bbbbbbbbbbbb)" in said
    assert "rope_base 10,000 -> 50,000; frames of 8 x 8 -> 16 x 16 codes; 4 -> 2 frames; sequence 258 -> 514" in said
    assert "new: optimizer; schedule (3 steps, peak 0.01, warm-up 5); order of the data (seed 0); video source" in said
    assert said.index("kept:") < said.index("training:")
    assert "which it has seen" not in said
    assert toto.load_model(tmp_path / "fine").config.rope_base == 50_000


def test_the_run_and_its_checkpoints_name_all_models_before(stores, coarse, tmp_path, capsys):
    train(finer(stores, coarse), tmp_path / "second")
    third = replace(finer(stores, tmp_path / "second"), steps=2)
    train(third, tmp_path / "third")
    assert "which it has seen" in capsys.readouterr().err
    found = load_card(tmp_path / "third").training["ancestors"]
    assert found == json.loads((tmp_path / "third" / "continued.json").read_text())["ancestors"]
    assert [(one["step"], one["weights_sha256"]) for one in found] == [
        (60, weights_sha256(coarse)),
        (3, weights_sha256(tmp_path / "second")),
    ]
    assert "ancestors" not in load_card(coarse).training


def test_going_on_with_such_a_run_does_not_begin_again(stores, coarse, tmp_path, capsys):
    fine = replace(finer(stores, coarse), save_every=1)
    train(fine, tmp_path / "whole")
    newest = train(fine, tmp_path / "run")
    for path in newest.iterdir():
        if path.is_file():
            path.write_bytes(b"damaged")
    capsys.readouterr()
    train(fine, tmp_path / "run", resume=True)
    assert "kept:" not in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert load_card(tmp_path / "run").training["ancestors"] == load_card(tmp_path / "whole").training["ancestors"]


def test_weights_are_those_of_the_ancestor(stores, coarse, tmp_path):
    frozen = finer(stores, coarse, optimizer=OptimizerConfig(peak_lr=1e-12, warmup_steps=0, weight_decay=0.0))
    train(replace(frozen, steps=1), tmp_path / "run")
    before, after = (toto.load_model(run).state_dict() for run in (coarse, tmp_path / "run"))
    assert list(before) == list(after)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", 64, r"width was 32, is 64"),
        ("heads", 4, r"heads was 2, is 4"),
        ("layers", 3, r"layers was 2, is 3"),
        ("tie_embeddings", True, r"tie_embeddings was False, is True"),
    ],
)
def test_another_architecture_is_refused_by_name(stores, coarse, tmp_path, field, value, words):
    fine = finer(stores, coarse)
    with pytest.raises(ConfigError, match=rf"is of another architecture \({words}"):
        train(replace(fine, model=replace(fine.model, **{field: value})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_kind_is_refused_and_another_tokenizer(stores, coarse, tmp_path):
    with pytest.raises(ConfigError, match=r"kind was toto, is mamba"):
        train(replace(finer(stores, coarse), model=MambaConfig(width=32, layers=2)), tmp_path / "run")
    other = store(tmp_path / "other", 16, weights_sha256="c" * 64)
    with pytest.raises(PassportError, match=r"weights_sha256 bbbbbbbbbbbb.*start from a model of the same tokenizer"):
        train(config(other, frames=2, steps=1, init=str(coarse)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_patch_models_go_on_at_a_larger_grid(stores, tmp_path):
    small = config(stores[8], frames=2, steps=40)
    small = replace(small, model=replace(small.model, inputs="patches", targets="pixels"))
    train(small, tmp_path / "coarse")
    fine = replace(small, init=str(tmp_path / "coarse"), steps=2, data=config(stores[16], frames=1, steps=1).data)
    train(fine, tmp_path / "fine")
    train(replace(fine, init=None), tmp_path / "anew")
    assert losses(tmp_path / "fine")[0] < losses(tmp_path / "anew")[0] - 0.1


@pytest.mark.parametrize("name", ["base-32", "large-32", "1b-32", "nano-32"])
def test_recipes_keep_the_architecture_and_the_length(name):
    fine, before = PRETRAINING[name](), PRETRAINING[name.removesuffix("-32")]()
    assert replace(fine.model, rope_base=before.model.rope_base) == before.model
    assert fine.model.rope_base > before.model.rope_base
    assert 4 * fine.data.frames == before.data.frames
    assert fine.optimizer.peak_lr < before.optimizer.peak_lr


@pytest.mark.parametrize(
    ("tokens", "words"), [(950, "950"), (4_100_000, "4.1 M"), (52e9, "52 B"), (1_048_576_000_000, "1.05 T")]
)
def test_numbers_of_tokens(tokens, words):
    assert tokens_in_words(int(tokens)) == words
