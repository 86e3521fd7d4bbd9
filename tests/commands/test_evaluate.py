"""`toto evaluate` on any source: class order, denominators, the bound, and the ledger at the end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command_words import refused, run
from conftest import make_photo, make_video
from PIL import Image

from toto.evaluation.result import load_result

SMALL = (
    "--steps", 2, "--batch", 2, "--micro-batch", 2, "--data.frames", 4, "--model.width", 32, "--model.layers", 1,
    "--model.heads", 2, "--model.mlp-hidden", 48, "--eval-every", 9, "--save-every", 9, "--log-every", 1,
)  # fmt: skip
QUICK = ("--probe.epochs", 2, "--probe.heads", 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve videos for training and twelve for testing, of which two can't be read, and a JSON-lines manifest."""
    root = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(24):
        name, split = f"{number:02d}.mp4", "train" if number < 12 else "val"
        make_video(root / name, frames=24, size=32, number=number)
        rows.append({"path": name, "label": ["9", "10", "2"][number % 3], "split": split})
    (root / "15.mp4").write_text("broken")
    (root / "20.mp4").write_bytes((root / "20.mp4").read_bytes()[:-2000])
    rows.append({"path": "gone.mp4", "label": "2", "split": "train"})
    rows.append({"path": "notes.txt", "label": "2", "split": "val"})
    (root / "notes.txt").write_text("no video")
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def shards(clips, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "shards"
    words = ["--tokenizer", tokenizer_folder, "--size", 32, "--min-frames", 1, "--workers", 0]
    assert run("tokenize", clips / "m.jsonl", "--out", out, *words) == 0
    return out


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert run("train", "nano", "--out", out, "--data", shards, "--heldout", shards, *SMALL) == 0
    return out


def test_two_unreadable_clips_among_twelve(clips, trained, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "probe.json"
    words = ["--data", clips / "m.jsonl", "--split", "train", "--test-split", "val", "--tokenizer", tokenizer_folder]
    assert run("evaluate", "probe", "--checkpoint", trained, *words, *QUICK, "--out", out) == 0
    printed = capsys.readouterr().out
    result = load_result(out)
    assert (result.offered, result.evaluated, result.failed, result.skipped) == (13, 10, 2, 1)
    assert result.ledger == {"train": {"ok": 12, "corrupt": 1}, "test": {"ok": 10, "corrupt": 2, "skipped": 1}}
    assert result.protocol["classes"] == ["2", "9", "10"]
    for pool in ("average", "attention"):
        metric = result.metrics[f"{pool}_accuracy"]
        right = round(10 * metric.value)
        assert metric.value == pytest.approx(right / 10)
        assert metric.bound == pytest.approx(right / 12)
        rng = np.random.default_rng(0)
        draws = rng.multinomial(10, np.full(10, 0.1), size=2000)[:, :right].sum(1) / 10  # any ten with so many right
        low, high = np.percentile(draws, [2.5, 97.5])
        assert metric.low == pytest.approx(low, abs=0.11)
        assert metric.high == pytest.approx(high, abs=0.11)
    assert all(row["bound"] == pytest.approx(row["test"] * 10 / 12) for row in result.details["by_layer"])
    assert {row["id"] for row in result.details["failures"]} == {"gone.mp4", "15.mp4", "20.mp4", "notes.txt"}
    assert "3 classes, in their order: 2, 9, 10" in printed
    assert "accuracy is over 10 evaluated of 13 offered (2 failed, 1 left out)" in printed
    bounds = [f"{pool} pool {100 * result.metrics[f'{pool}_accuracy'].bound:.1f}" for pool in ("average", "attention")]
    assert f"with every failed clip counted wrong, at the chosen layers: {', '.join(bounds)}" in printed
    assert f"test: offered 13: 10 ok, 2 corrupt, 1 skipped (ledger: {out})" in printed
    assert f"train: offered 13: 12 ok, 1 corrupt (ledger: {out})" in printed
    assert "  corrupt   15.mp4: video can't be decoded" in printed


def test_bits_name_the_inputs_they_are_over_and_the_share_that_is_missing(trained, shards, tmp_path, capsys):
    out = tmp_path / "bits.json"
    words = ["evaluate", "bits", "--checkpoint", trained, "--train", shards, "--heldout", shards]
    assert run(*words, "--out", out) == 0
    whole = load_result(out)
    assert (whole.offered, whole.evaluated, whole.failed, whole.skipped) == (26, 22, 3, 1)
    assert whole.metrics["missing_share"].value == pytest.approx(3 / 25)
    assert whole.metrics["model_bits"].bound is None
    printed = capsys.readouterr().out
    assert "22 windows of 4 frames, of 22 evaluated of 26 offered (3 failed, 1 left out)" in printed
    assert "12.0 % of the inputs are missing" in printed
    assert f"heldout: offered 26: 22 ok, 3 corrupt, 1 skipped (ledger: {out})" in printed
    assert run(*words, "--train-split", "train", "--split", "val", "--windows", 4, "--out", out) == 0
    part = load_result(out)
    assert (part.evaluated, part.protocol["windows"], part.protocol["split"]) == (4, 4, "val")
    assert part.ledger["heldout"]["ok"] == 10
    assert part.metrics["missing_share"].value == pytest.approx(3 / 13)
    assert part.metrics["unigram_bits"] != whole.metrics["unigram_bits"]
    assert "no item of split 'test'; splits with items here: train, val" in refused(capsys, *words, "--split", "test")


def test_training_says_what_became_of_the_inputs(trained, shards, capsys):
    found = json.loads((trained / "inputs.json").read_text())
    assert [each["part"] for each in found] == ["train", "heldout"]
    assert found[0]["ledger"] == {"ok": 22, "corrupt": 3, "skipped": 1}
    capsys.readouterr()
    assert run("train", "nano", "--out", trained, "--data", shards, "--heldout", shards, *SMALL, "--resume") == 0
    line = f"train video:{shards}: offered 26: 22 ok, 3 corrupt, 1 skipped (ledger: {shards}/ledger.parquet)"
    assert line in capsys.readouterr().out


def test_calls_that_would_mislead_are_refused(clips, trained, tokenizer_folder, tmp_path, capsys):
    words = ["evaluate", "probe", "--checkpoint", trained, "--tokenizer", tokenizer_folder, *QUICK, "--data"]
    manifest = clips / "m.jsonl"
    assert "would train on the split it tests on" in refused(capsys, *words, manifest, "--test-split", "val")
    (tmp_path / "k.csv").write_text("12.mp4 7\n")
    line = refused(capsys, *words, manifest, "--clips", clips, "--test", tmp_path / "k.csv")
    assert line.endswith("classes 7 are not among the training classes")  # its clips were found with --clips, too
    for label in ("2", "9", "10"):
        make_photo(tmp_path / "photos" / label / "p.jpg")
    line = refused(capsys, *words, manifest, "--test", tmp_path / "photos")
    assert "holds images" in line
    assert "holds videos" in line


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of photographs, six to train on and four to test on, and a list of some in a CSV."""
    root = tmp_path_factory.mktemp("photos")
    for split, count, first in (("train", 6, 0), ("test", 4, 20)):
        for number in range(count):
            make_photo(root / split / "ab"[number % 2] / f"{number}.jpg", number=number + first)
    (root / "k.csv").write_text("".join(f"{number}.jpg {number % 2}\n" for number in range(6)))
    return root


def test_images_of_folders_with_the_grid_and_a_plot(photos, trained, tokenizer_folder, tmp_path, capsys):
    out, plot, cache = tmp_path / "image.json", tmp_path / "layers.png", tmp_path / "cache"
    words = ["evaluate", "image", "--checkpoint", trained, "--tokenizer", tokenizer_folder, *QUICK]
    words += ["--data", photos / "train", "--test", photos / "test", "--cache", cache]
    grid = ["--layers", 1, "--rates", 0.01, 0.1, "--decays", 0, 0.1, "--pools", "attention"]
    assert run(*words, *grid, "--out", out, "--plot", plot) == 0
    printed = capsys.readouterr().out
    result = load_result(out)
    assert result.task == "image"
    assert list(result.details["chosen_layer"].items()) == [("attention", 1)]
    assert len(result.details["grid"]) == 4
    assert len(result.details["by_layer"]) == 1
    assert "attention pool: layer 1, rate 0.0" in printed
    assert "average pool" not in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    before = (cache / "cache.json").stat().st_mtime_ns
    assert run(*words, *grid, "--out", tmp_path / "again.json") == 0  # from the cache
    assert (cache / "cache.json").stat().st_mtime_ns == before
    assert load_result(tmp_path / "again.json").details == result.details
    assert run(*words[:2], "--checkpoint", "pixels:16/4", *words[6:]) == 1
    assert "holds features of" in capsys.readouterr().err
    assert run(*words[:-2], "--features", "streamed", "--augment", "--plot", tmp_path / "p.svg") == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_data_that_would_mislead_is_refused(photos, clips, trained, tokenizer_folder, tmp_path, capsys):
    words = ["--checkpoint", trained, "--tokenizer", tokenizer_folder, *QUICK, "--data"]
    line = refused(capsys, "evaluate", "video", *words, photos / "train")
    assert line.endswith("holds images; use `toto evaluate image`")
    shutil.copytree(photos / "test", tmp_path / "test")
    shutil.copy(photos / "train" / "a" / "2.jpg", tmp_path / "test" / "b" / "copy.jpg")
    both = ["evaluate", "image", *words, photos / "train", "--test", tmp_path / "test"]
    line = refused(capsys, *both)
    assert "1 of 5 items are training items, too (b/copy.jpg is a/2.jpg)" in line
    assert "--allow-overlap" in line
    assert run(*both, "--allow-overlap") == 0
    with Image.open(photos / "train" / "a" / "2.jpg") as picture:
        picture.save(tmp_path / "test" / "b" / "copy.png")
    (tmp_path / "test" / "b" / "copy.jpg").unlink()
    for task in ("image", "probe"):
        line = refused(capsys, "evaluate", task, *both[2:])
        assert "1 of 5 items are training items, too (b/copy.png is a/2.jpg): their pixels are equal" in line
    assert run(*both, "--allow-overlap") == 0
    assert run("evaluate", "image", *words, photos / "train", "--test", photos / "test", "--limit", 2) == 0
    assert "accuracy is over 4 evaluated of 4 offered" in capsys.readouterr().out  # two of each of the two classes
    line = refused(capsys, "evaluate", "image", *words, photos / "train", "--augment")
    assert "add --features streamed" in line
    line = refused(capsys, "evaluate", "image", *words, photos / "train", "--plot", tmp_path / "p.pdf")
    assert "is no .svg or .png file" in line
    line = refused(capsys, "evaluate", "image", *words, photos / "train", "--layers", 9)
    assert "layers [9] asked" in line
    line = refused(capsys, "evaluate", "video", *words, clips / "m.jsonl", "--split", "nothing", "--test-split", "val")
    assert "no item of split 'nothing'" in line
