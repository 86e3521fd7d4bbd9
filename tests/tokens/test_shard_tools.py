"""Whole stores: merged, split and exported without a changed code, and checked."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import PASSPORT, make_store

from toto.media.ledger import LedgerRow
from toto.runtime.errors import ConfigError, InterruptedRunError, PassportError, StoreError
from toto.runtime.files import read_json, write_json
from toto.tokens import shard_tools
from toto.tokens.passport import Passport
from toto.tokens.shard_export import export
from toto.tokens.shard_tools import (
    chosen_by_id,
    chosen_by_label,
    chosen_by_share,
    damaged_files,
    describe,
    find_item,
    items_of,
    merge,
    split,
    whole_id,
)
from toto.tokens.shards import (
    TokenStore,
    finish_store,
    read_ledger,
    read_splits,
    sealed,
    write_ledger,
    write_splits,
)

JOB = LedgerRow(id="job", kind="", status="ok")  # any dataclass is a record of options


def labelled(folder, names, *, seed=0, pixels=False):
    """A store of videos of 4 to 9 frames with these (id, label), and an input that became no item."""
    lengths = [4 + number % 6 for number in range(len(names))]
    store = TokenStore(make_store(folder, videos=lengths, seed=seed, pixels=pixels))
    items = [replace(item, id=id, label=label) for item, (id, label) in zip(items_of(store), names, strict=True)]
    rows = [
        LedgerRow(id=id, kind="video", status="ok", frames=4) for id in dict.fromkeys(whole_id(n) for n, _ in names)
    ]
    write_ledger(folder, [*rows, LedgerRow(id="bad.mp4", kind="video", status="corrupt", reason="cut off")])
    counts = {"ok": len(rows), "corrupt": 1}
    finish_store(
        folder, passport=PASSPORT, stride=4, shards=store.manifest["shards"], items=items, counts=counts, job={}
    )
    return TokenStore(folder)


@pytest.fixture
def first(tmp_path):
    return labelled(tmp_path / "first", [("a.mp4", "x"), ("a.mp4#1", "x"), ("b.mp4", "y"), ("c.mp4", None)])


@pytest.fixture
def second(tmp_path):
    return labelled(tmp_path / "second", [("d.mp4", "y"), ("e.mp4", "z")], seed=1)


def content(store):
    return {item.id: (item.label, store.codes(n).tolist()) for n, item in enumerate(items_of(store))}


def test_a_merged_store_holds_everything_of_its_parts(first, second, tmp_path):
    made = merge([first, second], tmp_path / "made", config=JOB)
    made.verify()
    assert content(made) == content(first) | content(second)
    assert [shard["file"] for shard in made.manifest["shards"]] == ["frames-00000.npy", "frames-00001.npy"]
    assert made.manifest["ledger"] == {"ok": 5, "corrupt": 2}
    assert len(read_ledger(made.folder)) == 7
    assert made.manifest["classes"] == ["x", "y", "z"]
    assert (made.folder / "frames-00001.npy").stat().st_nlink == 2
    assert (made.folder / "made.json").exists()
    (tmp_path / "copied").mkdir()  # an empty folder may be there
    copied = merge([made], tmp_path / "copied", config=JOB, copy=True)
    assert (copied.folder / "frames-00001.npy").stat().st_nlink == 1
    assert content(copied) == content(made)


def test_splits_and_the_order_of_classes_are_carried_along(first, second, tmp_path):
    write_splits(first.folder, {item.id: "val" if place else "train" for place, item in enumerate(items_of(first))})
    manifest = read_json(first.folder / "manifest.json", what="manifest")
    write_json(first.folder / "manifest.json", sealed(manifest | {"classes": ["z", "x", "never"]}))
    first = TokenStore(first.folder)
    made = merge([first, second], tmp_path / "made", config=JOB)
    assert made.manifest["classes"][:3] == ["z", "x", "never"]
    splits = read_splits(made.folder)
    assert set(splits) == {item.id for item in items_of(made)}
    assert {splits[item.id] for item in items_of(second)} == {None}
    chosen = chosen_by_share(made, 0.5, seed=0)
    parts = split(made, chosen, tmp_path / "a", tmp_path / "b", config=JOB)
    for part in parts:
        assert part.manifest["classes"] == made.manifest["classes"]
        assert all(splits[name] == named for name, named in read_splits(part.folder).items())


def test_ids_that_occur_twice_are_refused_or_prefixed(first, tmp_path):
    (tmp_path / "other").mkdir()
    twin = labelled(tmp_path / "other" / "first", [("a.mp4", "x")], seed=5)
    with pytest.raises(ConfigError, match=r"item a\.mp4 occurs twice; add --prefix"):
        merge([first, twin], tmp_path / "made", config=JOB)
    made = merge([first, twin], tmp_path / "made", config=JOB, prefix=True)
    assert {"first-1/a.mp4", "first-2/a.mp4"} <= set(content(made))
    assert {"first-1/bad.mp4", "first-2/bad.mp4"} <= {row.id for row in read_ledger(made.folder)}


def test_stores_that_do_not_fit_are_refused(first, second, tmp_path):
    stranger = TokenStore(make_store(tmp_path / "s", videos=(4,), passport=Passport(**{**vars(PASSPORT), "kind": "q"})))
    with pytest.raises(PassportError, match="kind q"):
        merge([first, stranger], tmp_path / "made", config=JOB)
    with pytest.raises(ConfigError, match="given twice"):
        merge([first, first], tmp_path / "made", config=JOB)
    with pytest.raises(ConfigError, match="no store"):
        merge([], tmp_path / "made", config=JOB)
    second.stride = 2
    with pytest.raises(ConfigError, match="has stride 2"):
        merge([first, second], tmp_path / "made", config=JOB)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        merge([first], tmp_path / "full", config=JOB)
    assert not (tmp_path / "made").exists()


def test_pixels_are_carried_along(tmp_path):
    stores = [
        labelled(tmp_path / name, [(name, "x"), (name + "2", "y")], seed=n, pixels=True) for n, name in enumerate("ab")
    ]
    made = merge(stores, tmp_path / "made", config=JOB)
    made.verify()
    assert made.pixels(2).equal(stores[1].pixels(0))
    chosen, rest = split(made, chosen_by_label(made, ["y"]), tmp_path / "y", tmp_path / "x", config=JOB)
    chosen.verify()
    assert chosen.pixels(1).equal(stores[1].pixels(1))
    assert rest.pixels(1).equal(stores[1].pixels(0))
    plain = labelled(tmp_path / "plain", [("p", "x")])
    with pytest.raises(ConfigError, match="plain: holds no pixels, another store does; add --no-pixels"):
        merge([made, plain], tmp_path / "more", config=JOB)
    without = merge([made, plain], tmp_path / "more", config=JOB, pixels=False)
    assert not list(without.folder.glob("pixels*"))
    without.verify()


def test_the_parts_of_a_split_are_the_whole(first, second, tmp_path):
    whole = merge([first, second], tmp_path / "whole", config=JOB)
    chosen, rest = split(whole, chosen_by_label(whole, ["y", "z"]), tmp_path / "y", tmp_path / "rest", config=JOB)
    for part in (chosen, rest):
        part.verify()
    assert set(content(chosen)) == {"b.mp4", "d.mp4", "e.mp4"}
    assert content(chosen) | content(rest) == content(whole)
    assert [row.id for row in read_ledger(chosen.folder)] == ["b.mp4", "d.mp4", "e.mp4"]
    assert [row.id for row in read_ledger(rest.folder)] == ["a.mp4", "bad.mp4", "bad.mp4", "c.mp4"]
    assert rest.manifest["ledger"] == {"ok": 2, "corrupt": 2}
    again = merge([chosen, rest], tmp_path / "again", config=JOB)
    assert content(again) == content(whole)


def test_views_of_one_item_stay_together(first, tmp_path):
    for seed in range(8):
        chosen = chosen_by_share(first, 0.34, seed)
        assert chosen[0] == chosen[1]
        assert len({whole_id(item.id) for item, mine in zip(items_of(first), chosen, strict=True) if mine}) == 1
    assert len({tuple(chosen_by_share(first, 0.34, seed)) for seed in range(20)}) == 3
    assert chosen_by_share(first, 0.34, 3).tolist() == chosen_by_share(first, 0.34, 3).tolist()
    assert chosen_by_id(first, ["a.mp4"]).tolist() == [True, True, False, False]
    assert chosen_by_id(first, ["a.mp4#1", "c.mp4"]).tolist() == [True, True, False, True]


def test_choices_that_make_no_sense(first, tmp_path):
    with pytest.raises(ConfigError, match="holds no label 'q' "):
        chosen_by_label(first, ["q", "w"])
    with pytest.raises(ConfigError, match=r"holds no item 'q'; choose such as a\.mp4"):
        chosen_by_id(first, ["q"])
    with pytest.raises(ConfigError, match="without an item"):
        split(first, np.zeros(4, bool), tmp_path / "a", tmp_path / "b", config=JOB)
    with pytest.raises(ConfigError, match="named for both"):
        split(first, chosen_by_id(first, ["a.mp4"]), tmp_path / "a", tmp_path / "a", config=JOB)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("job", ["merge", "split", "export"])
def test_an_interrupted_job_leaves_nothing_and_can_be_run_again(first, second, tmp_path, monkeypatch, job):
    def work():
        if job == "merge":
            return merge([first, second], tmp_path / "out", config=JOB)
        if job == "split":
            chosen = chosen_by_id(first, ["a.mp4"])
            return split(first, chosen, tmp_path / "out", tmp_path / "rest", config=JOB)
        return export(first, tmp_path / "out", to="webdataset", items_in_file=2, config=JOB)

    before = sorted(tmp_path.iterdir())
    advance = shard_tools.Progress.advance
    with monkeypatch.context() as patch:
        patch.setattr(shard_tools.Progress, "advance", lambda *args, **named: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedRunError, match="stopped by SIGTERM; nothing was written"):
            work()
    assert shard_tools.Progress.advance is advance
    assert sorted(tmp_path.iterdir()) == before
    assert work()


def test_what_a_killed_job_left_is_removed(first, tmp_path):
    (tmp_path / ".made.999999999").mkdir()
    merge([first], tmp_path / "made", config=JOB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "made"]


def test_damage_is_found_by_name(first):
    assert damaged_files(first) == []
    path = first.folder / "frames-00000.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    (first.folder / "ledger.parquet").unlink()
    assert damaged_files(first) == ["frames-00000.npy damaged", "ledger.parquet missing"]
    TokenStore(first.folder).codes(0)
    with pytest.raises(StoreError, match="damaged"):
        TokenStore(first.folder, verify="read").codes(0)


def test_items_are_found_by_id_and_by_number(first):
    assert find_item(first, "b.mp4") == 2
    assert find_item(first, "3") == 3
    for wrong in ("4", "-1", "z.mp4"):
        with pytest.raises(ConfigError, match=r"holds no item .*such as a\.mp4, or 0 to 3"):
            find_item(first, wrong)


def test_a_description_counts(first):
    found = describe(first)
    assert (found["items"], found["frames"], found["tokens"]) == (4, 22, 22 * 9)
    assert found["classes"] == {"x": 2, "y": 1}
    assert found["kinds"] == {"video": 4, "image": 0}
    assert found["frames_in_an_item"] == {"least": 4, "median": 5.5, "most": 7}
    assert found["bytes"] == sum((first.folder / name).stat().st_size for name in first.checksums)
    json.dumps(found)


def test_webdataset_tars_hold_every_item_and_are_the_same_bytes_again(first, tmp_path):
    files = export(first, tmp_path / "tars", to="webdataset", items_in_file=3, config=JOB)
    again = export(first, tmp_path / "again", to="webdataset", items_in_file=3, config=JOB)
    assert [path.name for path in files] == ["shard-00000.tar", "shard-00001.tar"]
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    found = {}
    for path in files:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert all(len(name.split(".")) == 2 for name in names)  # WebDataset's keys end at the first dot
            for key in dict.fromkeys(name.split(".")[0] for name in names):
                item = json.load(tar.extractfile(f"{key}.json"))
                (tmp_path / "x.npy").write_bytes(tar.extractfile(f"{key}.npy").read())
                codes = np.load(tmp_path / "x.npy")
                assert codes.dtype == np.uint16
                found[item["id"]] = item["label"], codes.tolist()
    assert found == content(first)
    record = read_json(tmp_path / "tars" / "export.json", what="")
    assert Passport.from_dict(record["passport"], where="") == PASSPORT


def test_parquet_tables_hold_every_item(first, tmp_path, monkeypatch):
    monkeypatch.setattr("toto.tokens.shard_export.CODES_AT_ONCE", 80)
    files = export(first, tmp_path / "tables", to="parquet", items_in_file=3, config=JOB)
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    shaped = {
        row["id"]: (row["label"], np.array(row["codes"]).reshape(-1, row["rows"], row["cols"]).tolist()) for row in rows
    }
    assert shaped == content(first)
    assert str(pq.read_schema(files[0]).field("codes").type) == "list<element: uint16>"
    assert len(files) == 2
    assert pq.ParquetFile(files[0]).num_row_groups > 1
    with pytest.raises(ConfigError, match="at least 1"):
        export(first, tmp_path / "no", to="parquet", items_in_file=0, config=JOB)


def test_pixels_are_exported_in_tars(tmp_path):
    store = labelled(tmp_path / "s", [("a", "x")], pixels=True)
    (path,) = export(store, Path(tmp_path / "tars"), to="webdataset", items_in_file=3, config=JOB)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["000000000.npy", "000000000.pixels.npy", "000000000.json"]
