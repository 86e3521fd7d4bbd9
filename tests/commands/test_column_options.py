"""`--image-column` and `--label-column` of every verb that reads sources."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_words import refused, run
from conftest import make_photo

from toto.commands.doctor import DoctorOptions, examine
from toto.evaluation.result import load_result
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.online import Encoders, OnlineStore
from toto.tokens.shards import TokenStore


def write(path: Path, names: tuple[str, str, str], first: int = 0) -> Path:
    """A parquet file of twelve photographs, of which each is in there twice, the second time mirrored in the list."""
    made = [
        make_photo(path.parent / "made" / f"{first + n}.jpg", height=32, width=32, number=first + n) for n in range(12)
    ]
    contents = [file.read_bytes() for file in made]
    columns = [contents, contents[::-1], ["ab"[n % 2] for n in range(12)]]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("columns")
    write(root / "train.parquet", ("front", "back", "sort"))
    write(root / "test.parquet", ("before", "behind", "group"), first=20)
    return root


COLUMNS = ("--image-column", "front", "--label-column", "sort")
OTHERS = ("--test-image-column", "before", "--test-label-column", "group")
PROBE = ("evaluate", "image", "--checkpoint", "pixels:16/4", "--probe.epochs", 1, "--data")


def test_probes_name_columns_of_both_sides(data, tmp_path, capsys):
    words = [*PROBE, data / "train.parquet"]
    assert "name it with --image-column" in refused(capsys, *words)
    line = refused(capsys, *words, *COLUMNS, "--test", data / "test.parquet")
    assert "test.parquet: no column 'front' (columns: before, behind, group); check --image-column" in line
    out = tmp_path / "r.json"
    assert run(*words, *COLUMNS, "--test", data / "test.parquet", *OTHERS, "--out", out) == 0
    protocol = load_result(out).protocol
    assert protocol["train"] == f"{data / 'train.parquet'}, image column front, label column sort"
    assert protocol["test"] == f"{data / 'test.parquet'}, image column before, label column group"
    assert protocol["classes"] == ["a", "b"]
    assert run(*words, *COLUMNS) == 0  # a share of it, with the same columns
    assert "give --test" in refused(capsys, *words, *COLUMNS, *OTHERS)
    for number in range(4):
        make_photo(tmp_path / "folder" / "ab"[number % 2] / f"{number}.jpg", number=50 + number)
    assert run(*words, *COLUMNS, "--test", tmp_path / "folder") == 0  # which has no columns
    line = refused(capsys, *words, *COLUMNS, "--test", tmp_path / "folder", *OTHERS[:2])
    assert "imagefolder has no such column to name" in line


def test_features_of_another_column_are_other_features(data, tmp_path):
    cache = tmp_path / "cache"
    for column in ("front", "back", "front"):
        words = ("--image-column", column, "--label-column", "sort", "--cache", cache)
        assert run(*PROBE, data / "train.parquet", *words) == 0
    assert len(list(cache.glob("*/progress.json"))) == 2 * 2  # training and test features of two columns


def config(data, out, tokenizer_folder, **options):
    return TokenizeConfig(
        source=data / "train.parquet", out=out, tokenizer=str(tokenizer_folder), size=32, workers=0, **options
    )


def test_a_store_is_of_its_columns(data, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "store"
    words = ["tokenize", data / "train.parquet", "--tokenizer", tokenizer_folder, "--size", 32, "--workers", 0]
    assert run(*words, "--out", out, *COLUMNS) == 0
    store = TokenStore(out)
    assert store.manifest["classes"] == ["a", "b"]
    assert {name: store.manifest["job"][name] for name in ("image_column", "label_column")} == {
        "image_column": "front", "label_column": "sort",
    }  # fmt: skip
    made = json.loads((out / "made.json").read_text())["config"]
    assert (made["image_column"], made["label_column"]) == ("front", "sort")
    assert run(*words, "--out", out, *COLUMNS) == 0  # is finished
    line = refused(capsys, *words, "--out", out, "--image-column", "back", "--label-column", "sort")
    assert "holds another job (different: catalog_sha256, image_column)" in line
    line = refused(capsys, *words, "--out", out, "--image-column", "front")
    assert "label_column" in line
    other = tokenize(config(data, tmp_path / "other", tokenizer_folder, image_column="back"))
    assert other.codes(0).equal(store.codes(11))


def test_an_online_store_reads_its_column_again(data, tokenizer_folder, tmp_path):
    chosen = {"image_column": "back", "label_column": "sort"}
    online = tokenize(config(data, tmp_path / "online", tokenizer_folder, online=True, **chosen))
    assert OnlineStore(online, Encoders())._origin.catalog(where="here").items[0].part.column == "back"


def test_doctor_and_the_tokenizers_verbs_name_them(data, tokenizer_folder, tmp_path, capsys):
    source = data / "train.parquet"
    found = examine(
        DoctorOptions(
            source=source,
            image_column="front",
            label_column="sort",
            tokenizer=str(tokenizer_folder),
            size=32,
            workers=0,
        )
    )
    assert found["classes"] == {"a": 6, "b": 6}
    inspect = ["tokenizer", "inspect", "--tokenizer", tokenizer_folder, "--size", 32]
    assert run(*inspect, "--data", source, "--image-column", "front") == 0
    assert "offered 12: 12 ok" in capsys.readouterr().out
    assert "give --data" in refused(capsys, *inspect, "--image-column", "front")
    tokenize(config(data, tmp_path / "store", tokenizer_folder, image_column="front"))
    line = refused(capsys, *inspect, "--data", tmp_path / "store", "--image-column", "front")
    assert "a store has no columns to name" in line


def test_a_tokenizer_is_trained_on_a_column(data, tmp_path, capsys):
    stack = [f"--model.{side}.{name}" for side in ("encoder", "decoder") for name in ("widths", "hidden", "blocks")]
    sizes = [value for name in stack for value in ((name, 1, 1) if "blocks" in name else (name, 8, 8))]
    words = ["tokenizer", "train", "fsq", "--out", tmp_path / "run", "--steps", 2, "--batch", 2, "--crops.size", 16]
    words += ["--cooldown-crops.size", 16, "--heldout-size", 32, "--warmup-steps", 1, "--cooldown-steps", 1, *sizes]
    both = [*words, "--data", data / "train.parquet", "--heldout", data / "test.parquet", "--image-column", "front"]
    assert "test.parquet: no column 'front'" in refused(capsys, *both)
    assert run(*both, "--heldout-image-column", "before") == 0
    assert "offered 24: 24 ok" in capsys.readouterr().out
    assert "give --data" in refused(capsys, *words, "--image-column", "front")
    line = refused(capsys, *words, "--data", data / "train.parquet", "--heldout-image-column", "before")
    assert "--heldout-image-column: names no source of its own; give --heldout" in line
