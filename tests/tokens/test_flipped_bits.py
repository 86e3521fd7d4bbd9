"""A flipped bit in any file of a store is found, by `toto shards verify` and before anything reads the file."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
from conftest import make_store

from toto.__main__ import main
from toto.runtime.errors import StoreError, TotoError
from toto.tokens.shard_tools import items_of
from toto.tokens.shards import TokenStore, write_splits
from toto.training.mixture import Mixture, SourceConfig

FILES = ("frames-00000.npy", "pixels-00000.npy", "items.parquet", "ledger.parquet", "splits.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with every kind of file, made as tokenizing makes it: splits before the manifest."""
    folder = tmp_path_factory.mktemp("flips") / "store"
    make_store(folder, videos=(9, 6), pixels=True)
    write_splits(folder, {item.id: "train" for item in items_of(TokenStore(folder))})
    return make_store(folder, videos=(9, 6), pixels=True)


@pytest.fixture
def store(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_file_wherever_the_bit_lies(store, capsys, name):
    assert main(["shards", "verify", str(store)]) == 0
    rng = np.random.default_rng(0)
    size = (store / name).stat().st_size
    for place in (0, size - 1, *rng.integers(0, size, 6)):
        bit = int(rng.integers(8))
        flip(store / name, int(place), bit)
        capsys.readouterr()
        assert main(["shards", "verify", str(store)]) == 1
        assert f"{name} damaged" in capsys.readouterr().err
        flip(store / name, int(place), bit)
    assert main(["shards", "verify", str(store)]) == 0


@pytest.mark.parametrize(("name", "options"), [(FILES[0], {}), (FILES[1], {"pixels": True}), (FILES[2], {})])
def test_checks_find_it_before_a_batch_is_made(store, name, options):
    sources = (SourceConfig(path=store, weight=1),)
    Mixture(sources, frames=4, seed=0, verify="read", **options).batch(step=0, batch=2)
    flip(store / name, -2, 3)
    with pytest.raises(TotoError, match=f"{name}: damaged"):
        Mixture(sources, frames=4, seed=0, verify="read", **options).batch(step=0, batch=2)


def test_a_flipped_bit_of_the_manifest_is_found_as_the_store_is_opened(store):
    manifest = store / "manifest.json"
    whole = json.loads(manifest.read_text())
    rng = np.random.default_rng(1)
    for place in rng.integers(0, manifest.stat().st_size, 400):
        bit = int(rng.integers(8))
        flip(manifest, int(place), bit)
        with contextlib.suppress(TotoError):
            assert TokenStore(store).manifest == whole  # as where 1e5 becomes 1E5
        flip(manifest, int(place), bit)
    assert TokenStore(store).manifest == whole


def test_any_other_word_of_the_manifest_is_found(store):
    manifest = store / "manifest.json"
    said = json.loads(manifest.read_text())
    for name in said:
        for changed in ({**said, name: "another"}, {other: value for other, value in said.items() if other != name}):
            manifest.write_text(json.dumps(changed))
            if name == "sha256" and name not in changed:
                continue  # as in stores made before manifests had one
            with pytest.raises(StoreError):
                TokenStore(store)
