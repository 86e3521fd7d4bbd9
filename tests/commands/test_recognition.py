"""`toto finetune` and `toto predict` from the outside: runs, classes by name, and a line for what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_words import refused, run
from conftest import make_photo, make_video
from PIL import Image

from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, save_model
from toto.recipes import RECOGNITION

QUICK = (
    "--epochs", 2, "--batch", 2, "--micro-batch", 2, "--head.heads", 2, "--frame-size", 32, "--validate-every", 2,
    "--stored-views", 0, "--validation", 0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=68, width=32, layers=1, heads=2, mlp_hidden=48))
    rows, cols = tokenizer.grid(32, 32)
    sequence = {"frames": 4, "stride": 2, "rows": rows, "cols": cols}
    save_model(folder, model, Card(passport=tokenizer.at(32, 32).to_dict(), sequence=sequence))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for label, value in (("dark", 30), ("light", 220)):
        for number in range(6):
            path = root / label / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((32, 40, 3), value + number, dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def trained(checkpoint, photos, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "run"
    words = ["--checkpoint", checkpoint, "--data", photos, "--tokenizer", tokenizer_folder, "--out", out]
    assert run("finetune", "images-small", *words, *QUICK) == 0
    return out


def test_a_run_says_what_it_reached_and_where_the_classifier_is(trained, photos, checkpoint, tokenizer_folder, capsys):
    capsys.readouterr()
    words = ["--checkpoint", checkpoint, "--data", photos, "--tokenizer", tokenizer_folder, "--out", trained]
    assert "already holds a run" in refused(capsys, "finetune", "images-small", *words, *QUICK)
    assert run("finetune", "images-small", *words, *QUICK, "--resume") == 0
    printed = capsys.readouterr().out
    assert "2 classes, in their order: dark, light" in printed
    assert "1 x 1 views of 4 decoded of 4 offered (0 failed, 0 left out)" in printed
    assert f"train: offered 8: 8 ok (ledger: {trained}/result.json)" in printed
    assert f"try `toto predict --checkpoint {trained} FILES`" in printed
    assert {path.name for path in (trained / "classifier").iterdir()} == {
        "classifier.json", "config.json", "heads.safetensors", "model.safetensors",
    }  # fmt: skip
    assert run("evaluate", "probe", "--checkpoint", trained / "classifier", "--data", photos, "--tokenizer",
               tokenizer_folder, "--probe.epochs", 1, "--probe.heads", 2) == 0  # fmt: skip


def test_files_are_named_by_class_and_bad_ones_counted(trained, photos, tokenizer_folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no image")
    make_video(tmp_path / "clip.mp4", frames=4, size=32)
    out = tmp_path / "said.json"
    words = ["predict", "--checkpoint", trained, "--tokenizer", tokenizer_folder, "--out", out]
    files = [photos / "dark" / "0.png", tmp_path / "broken.jpg", tmp_path / "clip.mp4", tmp_path / "gone.png"]
    capsys.readouterr()
    assert run(*words, *files) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(files[0])
    assert {line.split("%  ")[1] for line in printed[1:3]} == {"dark", "light"}
    assert f"offered 4: 1 ok, 3 corrupt (ledger: {out})" in printed[3]
    assert any("broken.jpg: " in line for line in printed)
    assert any("clip.mp4: is no image, which the classifier was made for" in line for line in printed)
    assert any("gone.png: no such file or folder" in line for line in printed)
    said = json.loads(out.read_text())
    assert [each["file"] for each in said["predictions"]] == [str(files[0])]
    assert sum(said["predictions"][0]["classes"].values()) == pytest.approx(1)
    assert len(said["failures"]) == 3
    assert run(*words[:-2], tmp_path / "broken.jpg") == 1
    assert run(*words[:-2], photos / "dark", "--top", 1) == 0


def test_videos_by_several_views(checkpoint, tokenizer_folder, tmp_path, capsys):
    for label in ("a", "b"):
        for number in range(5):
            make_video(
                tmp_path / "clips" / label / f"{number}.mp4", frames=16, size=32, number=number + 5 * (label == "b")
            )
    out = tmp_path / "run"
    words = ["--checkpoint", checkpoint, "--tokenizer", tokenizer_folder, "--data", tmp_path / "clips", "--out", out]
    assert run("finetune", "clips-small", *words, *QUICK, "--views.clips", 10, "--views.crops", 3) == 0
    assert "10 x 3 views of 4 decoded of 4 offered" in capsys.readouterr().out
    files = [tmp_path / "clips" / "a" / "0.mp4"]
    assert run("predict", "--checkpoint", out, "--tokenizer", tokenizer_folder, *files) == 0
    assert "10 x 3 views, offered 1: 1 ok" in capsys.readouterr().out
    assert run("predict", "--checkpoint", out, "--tokenizer", tokenizer_folder, *files, "--clips", 1, "--crops", 1) == 0
    assert "1 x 1 views" in capsys.readouterr().out


def test_columns_of_parquet_files_are_named(checkpoint, trained, photos, tokenizer_folder, tmp_path, capsys):
    files = sorted(photos.rglob("*.png"))
    columns = {"cover": [file.read_bytes() for file in files], "tone": [file.parent.name for file in files]}
    pq.write_table(pa.table(columns | {"thumb": columns["cover"]}), tmp_path / "t.parquet")
    words = ["finetune", "images-small", "--checkpoint", checkpoint, "--tokenizer", tokenizer_folder, *QUICK]
    words += ["--data", tmp_path / "t.parquet", "--label-column", "tone", "--out", tmp_path / "run", "--image-column"]
    assert "no column 'page' (columns: cover, tone, thumb)" in refused(capsys, *words, "page")
    assert run(*words, "cover") == 0
    assert "2 classes, in their order: dark, light" in capsys.readouterr().out
    assert "holds a run with other data" in refused(capsys, *words, "thumb", "--resume")
    told = ["predict", "--checkpoint", trained, "--tokenizer", tokenizer_folder, tmp_path / "t.parquet", files[0]]
    assert run(*told, "--image-column", "thumb") == 0
    assert "offered 13: 13 ok" in capsys.readouterr().out


def test_what_is_wrong_takes_one_line(checkpoint, trained, photos, tokenizer_folder, tmp_path, capsys):
    words = ["finetune", "images-small", "--checkpoint", checkpoint, "--out", tmp_path / "run", *QUICK, "--data"]
    assert "its tokens have" in refused(capsys, *words, photos, code=1)
    assert "unknown recipe 'nothing'" in refused(capsys, "finetune", "nothing")
    assert "would train on the split it tests on" in refused(capsys, *words, photos, "--test-split", "val")
    assert "12 of 12 items are training items, too" in refused(capsys, *words, photos, "--test", photos)
    (tmp_path / "again" / "dark").mkdir(parents=True)
    with Image.open(photos / "dark" / "3.png") as picture:
        picture.save(tmp_path / "again" / "dark" / "3.bmp")
    line = refused(capsys, *words, photos, "--test", tmp_path / "again")
    assert "1 of 1 items are training items, too (dark/3.bmp is dark/3.png): their pixels are equal" in line
    (tmp_path / "other" / "grey").mkdir(parents=True)
    make_photo(tmp_path / "other" / "grey" / "0.jpg")
    line = refused(capsys, *words, photos, "--test", tmp_path / "other")
    assert "classes grey are not among the training classes" in line
    assert "knows no classes; make a classifier" in refused(
        capsys, "predict", "--checkpoint", checkpoint, photos, code=1
    )
    assert "no such checkpoint" in refused(capsys, "predict", "--checkpoint", tmp_path / "no", photos, code=1)
    assert "its tokens have" in refused(capsys, "predict", "--checkpoint", trained, photos, code=1)
    assert "no files are given" in refused(capsys, "predict", "--checkpoint", trained)


def test_every_recipe_is_one_that_can_be_run():
    for name, recipe in RECOGNITION.items():
        assert recipe() == recipe(), name
    paper, full, kinetics = (RECOGNITION[name]() for name in ("imagenet", "imagenet-full", "kinetics"))
    assert (paper.epochs, paper.optimizer.peak_lr, paper.layer_decay, paper.frame_size) == (90, 6e-5, 0.9, 256)
    assert (paper.mode, paper.rope_base, full.mode) == ("probes", 50_000.0, "full")
    assert (kinetics.frames, kinetics.stride, kinetics.frame_size, kinetics.views.name) == (16, 4, 128, "10 x 3")
    assert RECOGNITION["kinetics-mlp"]().head.classifier == "mlp"
    assert RECOGNITION["frozen-average"]().next_token_weight == 0
