"""What a worker gets at once, and what becomes of images that shared a worker with one that killed it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import make_photo, make_video

from toto.media.catalog import Item, Seconds
from toto.tokens import encoding, parallel
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.parallel import tasks
from toto.tokens.shards import read_ledger


def image(number):
    return Item(id=f"{number:03d}.jpg", path=Path(f"{number:03d}.jpg"), kind="image", label=None)


def video(name, *window):
    part = Seconds(start=window[0], end=window[1]) if window else None
    return Item(id=f"{name}{window or ''}", path=Path(f"{name}.mp4"), kind="video", label=None, part=part)


def names(found):
    return [[item.id for item in task] for task in found]


def test_items_go_together_windows_of_one_video_always_duplicates_never(monkeypatch):
    monkeypatch.setattr(parallel, "IMAGES_AT_ONCE", 4)
    monkeypatch.setattr(parallel, "VIDEOS_AT_ONCE", 2)
    shard = [*map(image, range(3)), video("a"), video("b", 0, 1), video("b", 1, 2), *map(image, range(3, 9))]
    found = list(tasks(shard, {"005.jpg": "000.jpg"}))
    assert names(found) == [
        ["000.jpg", "001.jpg", "002.jpg"],
        ["a", "b(0, 1)", "b(1, 2)"],
        ["003.jpg", "004.jpg"],
        ["005.jpg"],
        ["006.jpg", "007.jpg", "008.jpg"],
    ]
    assert [item for task in found for item in task] == shard


def test_large_videos_go_alone(monkeypatch, tmp_path):
    items = []
    for name, size in (("a", 500), ("b", 400), ("c", 200), ("d", 5000)):
        (tmp_path / name).write_bytes(bytes(size))
        items.append(Item(id=name, path=tmp_path / name, kind="video", label=None))
    monkeypatch.setattr(parallel, "BYTES_AT_ONCE", 1000)
    assert names(tasks(items, {})) == [["a", "b"], ["c"], ["d"]]


def test_few_items_are_shared_out_among_all_workers():
    shard = [*map(image, range(20)), video("a"), video("b")]
    assert len(list(tasks(shard, {}))) == 1
    found = list(tasks(shard, {}, least=8))
    assert 6 <= len(found) <= 12
    assert [item for task in found for item in task] == shard
    assert names(tasks([video("a"), video("b")], {}, least=8)) == [["a"], ["b"]]


START = parallel._start


def start_with_a_bad_decoder(work):
    START(work)
    decode = encoding.stream_item

    def read(item, **options):
        if "segfault" in item.id:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in item.id:
            time.sleep(3600)
        return decode(item, **options)

    encoding.stream_item = read


def start_and_be_killed_once(work):
    START(work)
    decode = encoding.stream_item

    def read(item, **options):
        marker = item.path.parent.parent / "killed"
        if item.id == "5.jpg" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(item, **options)

    encoding.stream_item = read


def ledger(store):
    return {row.id: (row.status, row.reason) for row in read_ledger(store.folder) if row.status != "ok"}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "made.json"}


def test_of_many_images_the_bad_ones_alone_are_lost(tmp_path, tokenizer_folder, monkeypatch):
    source = tmp_path / "source"
    for number in range(9):
        name = {3: "3-segfault", 6: "6-hang"}.get(number, str(number))
        make_photo(source / f"{name}.jpg", number=number)
    options = {"source": source, "tokenizer": str(tokenizer_folder), "size": 32, "time_limit": 1.0}
    monkeypatch.setattr(parallel, "_start", start_with_a_bad_decoder)
    store = tokenize(TokenizeConfig(out=tmp_path / "out", workers=1, keep_pixels=True, **options))
    assert ledger(store) == {
        "3-segfault.jpg": ("corrupt", "the decoder crashed (SIGSEGV)"),
        "6-hang.jpg": ("corrupt", "took longer than 1 s"),
    }
    assert len(store) == 7


def test_the_work_of_a_worker_that_somebody_killed_is_done_again(tmp_path, tokenizer_folder, monkeypatch):
    source = tmp_path / "source"
    for number in range(9):
        make_photo(source / f"{number}.jpg", number=number)
    make_video(source / "v.mp4")
    options = {"source": source, "tokenizer": str(tokenizer_folder), "size": 32, "min_frames": 4}
    whole = tokenize(TokenizeConfig(out=tmp_path / "whole", workers=0, **options))
    monkeypatch.setattr(parallel, "_start", start_and_be_killed_once)
    store = tokenize(TokenizeConfig(out=tmp_path / "out", workers=2, **options))
    assert (tmp_path / "killed").exists()
    assert contents(store.folder) == contents(whole.folder)


@pytest.mark.parametrize("views", [1, 2])
def test_images_encoded_together_have_the_codes_they_have_alone(tmp_path, tokenizer_folder, monkeypatch, views):
    for number in range(7):
        make_photo(tmp_path / "source" / f"{number}.jpg", number=number)
    (tmp_path / "source" / "4.jpg").write_bytes(b"nothing")
    options = {"source": tmp_path / "source", "tokenizer": str(tokenizer_folder), "size": 32, "workers": 0}
    together = tokenize(TokenizeConfig(out=tmp_path / "together", views=views, **options))
    monkeypatch.setattr(parallel, "IMAGES_AT_ONCE", 1)
    monkeypatch.setattr(encoding, "FRAMES_AT_ONCE", 1)
    alone = tokenize(TokenizeConfig(out=tmp_path / "alone", views=views, **options))
    assert contents(together.folder) == contents(alone.folder)
    assert len(together) == 6 * views
