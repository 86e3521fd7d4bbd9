"""Stores that are made at a URL: the bytes of one made on the disk, continued by whoever comes."""

from __future__ import annotations

import os
import signal

import fsspec
import pytest
from conftest import make_photo

from toto.runtime.errors import ConfigError, InterruptedRunError
from toto.runtime.places import Place, as_path
from toto.tokens import extract, parallel
from toto.tokens.extract import TokenizeConfig, tokenize


@pytest.fixture
def bucket(tmp_path):
    """The URL of a folder that nobody else uses."""
    url = f"memory://{tmp_path.name}"
    yield url
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def job(media_folder, tokenizer_folder, monkeypatch):
    """A function from the place of a store to its job."""
    monkeypatch.setattr(extract, "BYTES_IN_SHARD", 30_000)

    def made(out, **options):
        options = {"size": 32, "min_frames": 4, "workers": 0, "source": media_folder} | options
        return TokenizeConfig(out=as_path(str(out)), tokenizer=str(tokenizer_folder), **options)

    return made


def contents(url):
    place = Place.open(str(url))
    return {name: place.read_bytes(name) for name in place.list() if name != "made.json"}


@pytest.mark.parametrize("pixels", [False, True])
def test_a_store_at_a_url_has_the_bytes_of_one_on_the_disk(job, bucket, tmp_path, pixels):
    near = tokenize(job(tmp_path / "near", keep_pixels=pixels))
    far = tokenize(job(bucket, keep_pixels=pixels))
    assert contents(bucket) == contents(tmp_path / "near")
    assert len(near.manifest["shards"]) > 1
    assert far.codes(3).equal(near.codes(3))
    assert len(tokenize(job(bucket, keep_pixels=pixels))) == len(near)


def test_an_interrupted_store_at_a_url_is_continued(job, bucket, tmp_path, monkeypatch):
    tokenize(job(tmp_path / "near"))
    encode, calls = parallel.encode, []

    def encode_then_stop(*arguments, **options):
        calls.append(arguments[0])
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments, **options)

    monkeypatch.setattr(parallel, "encode", encode_then_stop)
    with pytest.raises(InterruptedRunError, match=f"^{bucket}: stopped by SIGTERM; run the same command again"):
        tokenize(job(bucket))
    assert "manifest.json" not in contents(bucket)
    assert "parts/00000.json" in contents(bucket)
    before = len(calls)
    tokenize(job(bucket))
    assert len(calls) - before < 10
    assert contents(bucket) == contents(tmp_path / "near")


def test_other_jobs_and_strangers_are_refused(job, bucket, tmp_path):
    tokenize(job(bucket))
    with pytest.raises(ConfigError, match=r"another job \(different: stride\)"):
        tokenize(job(bucket, stride=2))
    Place.open(f"{bucket}-2").write_bytes(b"hello", "notes.txt")
    with pytest.raises(ConfigError, match="is not empty and holds no tokenizing job"):
        tokenize(job(f"{bucket}-2"))
    make_photo(tmp_path / "one" / "photo.jpg")
    with pytest.raises(ConfigError, match="web address can't be written"):
        tokenize(job("http://127.0.0.1:9/store", source=tmp_path / "one"))
