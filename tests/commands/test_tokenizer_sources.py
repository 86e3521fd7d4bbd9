"""`toto tokenizer train` and `inspect` on any source, with splits, and the ledger at the end."""

from __future__ import annotations

import json

import pytest
from command_words import refused, run
from conftest import make_photo, make_video

from toto.media.decode import read_media
from toto.media.ledger import count_by_status
from toto.tokens.shards import read_ledger
from toto.tokens.tokenizer import load_tokenizer
from toto.training.tokenizer_data import Source, load, load_squares

QUICK = (
    "--steps", 2, "--batch", 2, "--crops.size", 16, "--cooldown-crops.size", 16, "--heldout-size", 32,
    "--warmup-steps", 1, "--cooldown-steps", 1, "--model.encoder.widths", 8, 8, "--model.encoder.hidden", 8, 8,
    "--model.encoder.blocks", 1, 1, "--model.decoder.widths", 8, 8, "--model.decoder.hidden", 8, 8,
    "--model.decoder.blocks", 1, 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Windows of a video and photographs in two splits; one photograph is damaged, one is missing."""
    root = tmp_path_factory.mktemp("sources")
    make_video(root / "files" / "v.mp4", frames=40)
    for number in range(4):
        make_photo(root / "files" / f"{number}.jpg", number=number)
    (root / "files" / "3.jpg").write_text("x")
    rows = [
        {"path": "v.mp4", "start": 0.5, "end": 1.5, "split": "train", "label": "a"},
        {"path": "v.mp4", "start": 1.0, "end": 2.0, "split": "train", "label": "b"},
        *({"path": f"{n}.jpg", "split": "val" if n == 0 else "train"} for n in range(4)),
        {"path": "gone.jpg", "split": "train"},
        {"path": "lost.jpg", "split": "val"},
    ]
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "m.jsonl"


def test_windows_and_images_of_a_split_are_loaded_with_a_row_each(manifest):
    source = Source(name="m", where=str(manifest), stride=2, share=1, clips=manifest.parent / "files", split="train")
    loading = load(source)
    whole = read_media(manifest.parent / "files" / "v.mp4").frames
    assert count_by_status(loading.ledger) == {"ok": 4, "corrupt": 2}
    videos = [frames for frames in loading.items if len(frames) > 1]
    assert videos[0].equal(whole[6:18:2])
    assert videos[1].equal(whole[12:24:2])
    assert {row.id for row in loading.ledger if row.status == "corrupt"} == {"3.jpg", "gone.jpg"}
    squares, rows = load_squares(source, 32)
    assert squares.shape == (6 + 6 + 2, 32, 32, 3)
    assert rows == loading.ledger


def test_a_tokenizer_is_trained_on_one_split_and_held_against_another(manifest, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["tokenizer", "train", "fsq", "--out", out, "--data", manifest, "--clips", manifest.parent / "files"]
    assert run(*words, "--split", "train", "--heldout-split", "val", *QUICK) == 0
    printed = capsys.readouterr().out
    assert f"offered 8: 5 ok, 3 corrupt (ledger: {out / 'ledger.parquet'})" in printed
    assert "  corrupt   train/m.jsonl/3.jpg: not an image" in printed
    rows = {row.id: row.status for row in read_ledger(out)}
    assert {id for id in rows if id.startswith("heldout/")} == {"heldout/m.jsonl/0.jpg", "heldout/m.jsonl/lost.jpg"}
    assert rows["train/m.jsonl/v.mp4@0.5-1.5"] == "ok"
    load_tokenizer(out)
    line = refused(capsys, *words, "--heldout-split", "val", *QUICK)
    assert "would train on the split it looks at; name --split, too" in line
    assert "give --data" in refused(capsys, "tokenizer", "train", "fsq", "--out", out, "--split", "val")
    assert "give --heldout" in refused(capsys, *words, "--heldout-clips", tmp_path)
    line = refused(capsys, "tokenizer", "train", "fsq", "--out", out, "--data", tmp_path / "no")
    assert "no such file or folder" in line


def test_a_split_of_a_manifest_and_of_a_store_is_inspected(manifest, tokenizer_folder, tmp_path, capsys):
    out, it = tmp_path / "out", ["--tokenizer", tokenizer_folder, "--clips", manifest.parent / "files"]
    inspect = ["tokenizer", "inspect", "--size", 32, "--stride", 2, "--data"]
    assert run(*inspect, manifest, *it, "--split", "train", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "looked at 14 of 14 frames of 4 items" in printed
    assert f"{manifest}: offered 6: 4 ok, 2 corrupt (ledger: {out / 'ledger.parquet'})" in printed
    part = json.loads((out / "inspection.json").read_text())["parts"][0]["accounts"]
    assert [part[name] for name in ("offered", "read", "failed", "skipped")] == [6, 4, 2, 0]
    assert {row.id for row in read_ledger(out)} >= {"gone.jpg", "v.mp4@1-2"}
    store = tmp_path / "store"
    words = ["--size", 32, "--stride", 2, "--min-frames", 1, "--workers", 0]
    assert run("tokenize", manifest, *it, "--out", store, *words) == 0
    it = it[:2]
    assert run(*inspect, store, *it, "--split", "val") == 0
    printed = capsys.readouterr().out
    assert "looked at 1 of 1 frames of 1 items" in printed
    assert f"{store}: offered 8: 5 ok, 3 corrupt" in printed
    assert "splits with items here: train, val" in refused(capsys, *inspect, store, *it, "--split", "test")
    assert "names no clips elsewhere" in refused(capsys, *inspect, store, *it, "--clips", tmp_path)
    assert "give --data" in refused(capsys, "tokenizer", "inspect", *it, "--split", "val")
