"""Every number says over what it is: records of both versions, bounds, and the inputs of stores."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_store

from toto.evaluation.likelihood import fit_baselines, spread_windows
from toto.evaluation.read_out import Denominators, missing_share
from toto.evaluation.result import Metric, Result, bootstrap, load_result
from toto.media.ledger import LedgerRow
from toto.runtime.errors import ConfigError, StoreError, TotoError
from toto.tokens.accounts import count_inputs
from toto.tokens.shard_tools import items_of
from toto.tokens.shards import TokenStore, finish_store, write_ledger, write_splits
from toto.training.source import SourceConfig

RESULT = Result(
    task="probe", protocol={}, metrics={"a": Metric(value=0.5, low=0.2, high=0.8, bound=0.4)},
    offered=13, evaluated=8, failed=2, skipped=3, model_sha256="x", passport={},
    ledger={"test": {"ok": 8, "corrupt": 2, "skipped": 3}},
)  # fmt: skip


def test_a_bound_counts_every_failure_wrong_and_leaves_the_interval_alone():
    right = np.array([1.0] * 7 + [0.0] * 3)
    bounded, plain = bootstrap(right, failed=2), bootstrap(right)
    assert bounded.bound == pytest.approx(7 / 12)
    assert plain.bound is None
    assert replace(bounded, bound=None) == plain
    assert bounded.low < bounded.value == 0.7 < bounded.high
    assert bootstrap(right, failed=0).bound == bounded.value


def test_denominators_add_up_or_the_record_is_refused(tmp_path):
    RESULT.save(tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == RESULT
    with pytest.raises(ConfigError, match="8 evaluated, 2 failed and 3 skipped are not the 12"):
        replace(RESULT, offered=12)
    counts = Denominators.of({"ok": 9, "short": 1, "duplicate": 1, "corrupt": 2, "skipped": 3}, evaluated=4)
    assert counts == Denominators(offered=16, evaluated=4, failed=3, skipped=9)
    assert missing_share({"ok": 9, "short": 1, "corrupt": 2, "skipped": 3}).value == 0.25
    assert missing_share({}).value == 0


def test_records_of_the_first_version_are_read_and_of_a_later_one_refused(tmp_path):
    old = {
        "task": "probe", "protocol": {"k": 1}, "metrics": {"a": {"value": 0.5, "low": 0.25, "high": 0.75}},
        "offered": 12, "evaluated": 10, "failed": 2, "model_sha256": "x", "passport": {}, "details": {},
        "versions": {"toto": "0"}, "version": 1,
    }  # fmt: skip
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    found = load_result(path)
    assert (found.offered, found.evaluated, found.failed, found.skipped, found.ledger) == (12, 10, 2, 0, {})
    assert found.metrics["a"] == Metric(value=0.5, low=0.25, high=0.75, bound=None)
    found.save(path)
    assert load_result(path) == found
    for changed in (old | {"version": 3}, old | {"version": 2}, old | {"skipped": 1}, {"version": []}, []):
        path.write_text(json.dumps(changed))
        with pytest.raises(TotoError, match="not a result record of version 1 to 2"):
            load_result(path)
    with pytest.raises(StoreError, match="no result record here"):
        load_result(tmp_path / "none.json")


def relabelled(folder, *, ids, splits, failed=()):
    """The store in a folder with other ids, splits, and further rows in its ledger."""
    store = TokenStore(folder)
    items = [replace(item, id=id) for item, id in zip(items_of(store), ids, strict=True)]
    inputs = dict.fromkeys(id.partition("#")[0] for id in ids)
    rows = [LedgerRow(id=id, kind="video", status="ok") for id in inputs]
    rows += [LedgerRow(id=f"bad{n}", kind="video", status=status, reason="x") for n, status in enumerate(failed)]
    write_ledger(folder, rows)
    write_splits(folder, dict(zip(ids, splits, strict=True)))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    shards = store.manifest["shards"]
    finish_store(folder, passport=store.passport, stride=4, shards=shards, items=items, counts=counts, job={})
    return TokenStore(folder)


@pytest.fixture
def split_store(tmp_path):
    """Six videos (two are views of one input), two images, three inputs that failed."""
    folder = make_store(tmp_path / "s", videos=(20, 20, 9, 3, 12, 33), images=2)
    ids = ["a.mp4", "a.mp4#1", "b.mp4", "c.mp4", "d#x.mp4", "e.mp4", "f.jpg", "g.jpg"]
    splits = ["train", "train", "train", "val", "val", "val", None, "val"]
    return relabelled(folder, ids=ids, splits=splits, failed=("corrupt", "corrupt", "short"))


def test_inputs_of_a_store_are_counted_as_a_reader_meets_them(split_store):
    assert sum(split_store.manifest["ledger"].values()) == 10
    assert count_inputs(split_store, "video", least=10) == {"ok": 3, "short": 3, "corrupt": 2, "skipped": 2}
    assert count_inputs(split_store, "image", least=1) == {"ok": 2, "short": 1, "corrupt": 2, "skipped": 5}
    val = count_inputs(split_store, "video", least=10, split="val")
    assert val == {"ok": 2, "short": 2, "corrupt": 2, "skipped": 4}
    with pytest.raises(ConfigError, match=r"no item of split 'test'; splits with items here: train, val"):
        count_inputs(split_store, "video", least=1, split="test")


def test_windows_and_baselines_of_one_split(split_store):
    source = SourceConfig(path=split_store.folder, weight=1)
    both = [window for split in ("train", "val") for window in spread_windows(source, frames=4, most=99, split=split)]
    origins = [window.origin for window in both]
    whole = [window.origin for window in spread_windows(source, frames=4, most=99)]
    assert sorted(origins) == sorted(whole)
    val = spread_windows(source, frames=4, most=99, split="val")
    assert {window.origin[0][0] for window in val} == {"d#x.mp4", "e.mp4"}
    images = spread_windows(replace(source, modality="image"), frames=2, most=9, split="val")
    assert {name for window in images for name, _ in window.origin} == {"g.jpg"}
    train, all_ = (fit_baselines([split_store], split=split) for split in ("train", None))
    assert not train.unigram.equal(all_.unigram)
    assert float(train.unigram.sum()) == pytest.approx(1)
