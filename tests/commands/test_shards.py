"""`toto shards` as a person meets it."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from toto.__main__ import main
from toto.tokens.shards import TokenStore


@pytest.fixture(scope="module")
def shards(media_folder, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "shards"
    words = ["tokenize", media_folder, "--out", out, "--tokenizer", tokenizer_folder, "--size", 32, "--min-frames", 4]
    assert main([str(word) for word in [*words, "--workers", 0]]) == 0
    return out


@pytest.fixture
def run(capsys):
    """Run `toto shards`; its exit code, what it printed, and its last line of errors."""

    def call(*words):
        capsys.readouterr()
        code = main(["shards", *map(str, words)])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("toto: ")]
        assert len(errors) == (code != 0)
        assert "Traceback" not in printed.err
        return code, printed.out, errors[0] if errors else ""

    return call


def test_info_for_people_and_programs(run, shards):
    code, said, _ = run("info", shards)
    assert code == 0
    assert "10 (6 videos, 4 images)" in said
    assert "2: fast (5), slow (5)" in said
    assert "offered 10: 10 ok (ledger: " in said
    code, said, _ = run("info", shards, "--json")
    assert json.loads(said)[0]["items"] == 10


def test_verify_ends_with_1_and_names_the_file(run, shards, tmp_path):
    assert run("verify", shards)[0] == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    content = bytearray((damaged / "frames-00000.npy").read_bytes())
    content[200] ^= 1
    (damaged / "frames-00000.npy").write_bytes(content)
    code, said, error = run("verify", shards, damaged)
    assert code == 1
    assert "frames-00000.npy damaged" in error
    assert "2 of 3 files are whole" in said
    code, _, error = run("split", damaged, "--share", 0.5, "--out", tmp_path / "a", "--rest", tmp_path / "b")
    assert (code, "frames-00000.npy: damaged" in error) == (1, True)  # damage gets no new checksum
    code, _, error = run("export", damaged, "--to", "parquet", "--out", tmp_path / "a")
    assert (code, "frames-00000.npy: damaged" in error) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_cat_prints_and_decodes(run, shards, tokenizer_folder, tmp_path):
    store = TokenStore(shards)
    name = store.item(0).id
    code, said, _ = run("cat", shards, name, "--frames", "1:3")
    assert code == 0
    lines = said.splitlines()
    assert lines[0].startswith(f"{name}: frames 1 to 2 of")
    numbers = [[int(word) for word in line.split()] for line in lines if line[0] in " 0123456789"]
    assert numbers == store.codes(0, 1, 2).reshape(-1, store.grid[1]).tolist()
    for ending in ("png", "mp4"):
        out = tmp_path / f"x.{ending}"
        assert run("cat", shards, 0, "--out", out, "--tokenizer", tokenizer_folder)[0] == 0
        assert out.stat().st_size > 100
    assert Image.open(tmp_path / "x.png").size[0] > 64
    code, _, error = run("cat", shards, name, "--out", tmp_path / "y.png")
    assert (code, "weights_sha256" in error) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cat", "@", "nothing"], "holds no item 'nothing'; name an id such as"),
        (["cat", "@", "0", "--frames", "3:1"], "'3:1' is no range of"),
        (["cat", "@", "0", "--frames", "x"], "'x' is no range of"),
        (["cat", "@", "0", "--out", "x.gif"], "neither .png nor .mp4"),
        (["info", "nowhere"], "nowhere: no such shard folder"),
        (["info"], "names no store"),
        (["split", "@", "--out", "a", "--rest", "b"], "exactly one of --share"),
        (["split", "@", "--out", "a", "--rest", "b", "--share", "2"], "between 0 and 1"),
        (["split", "@", "--out", "a", "--rest", "b", "--labels", "green"], "holds no label 'green'"),
        (["split", "@", "--out", "a", "--rest", "b", "--ids", "missing.txt"], "missing.txt: no such file"),
        (["split", "@", "--out", "@", "--rest", "b", "--share", "0.5"], "is not empty"),
        (["merge", "@", "@", "--out", "a"], "is given twice"),
        (["merge", "@", "--out", "@"], "is not empty"),
        (["export", "@", "--to", "zip", "--out", "a"], "zip"),
        (["dance"], "unknown task 'dance'"),
    ],
)
def test_bad_words_are_one_line(run, shards, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(*(shards if word == "@" else word for word in words))
    assert code in (1, 2)
    assert said in error
    assert not list(tmp_path.iterdir())


def test_split_merge_and_export_from_the_shell(run, shards, tmp_path):
    parts = ["--out", tmp_path / "heldout", "--rest", tmp_path / "train"]
    code, said, _ = run("split", shards, "--share", 0.2, *parts)
    assert code == 0
    assert "heldout: 2 items" in said
    assert run("merge", tmp_path / "train", tmp_path / "heldout", "--out", tmp_path / "again")[0] == 0
    assert len(TokenStore(tmp_path / "again")) == 10
    (tmp_path / "ids.txt").write_text("slow/clip0.mp4\nfast/photo1.jpg\n")
    parts = ["--out", tmp_path / "two", "--rest", tmp_path / "eight"]
    code, said, _ = run("split", shards, "--ids", tmp_path / "ids.txt", *parts)
    assert "two: 2 items" in said
    made = json.loads((tmp_path / "two" / "made.json").read_text())
    assert made["config"]["ids"] == str(tmp_path / "ids.txt")
    assert run("export", shards, "--to", "webdataset", "--out", tmp_path / "tars")[0] == 0
    assert run("export", shards, "--to", "parquet", "--out", tmp_path / "tables", "--items-in-file", 4)[0] == 0
    assert len(list((tmp_path / "tables").glob("*.parquet"))) == 3
