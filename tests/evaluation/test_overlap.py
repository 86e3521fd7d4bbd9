"""Test items that are training items: by bytes, wherever these lie."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_photo

from toto.evaluation.labelled import catalog_clips
from toto.evaluation.overlap import require_apart, shared_content
from toto.media.catalog import Item, Seconds
from toto.runtime.errors import ConfigError


def test_copies_under_other_names_are_found_in_files_and_rows(tmp_path):
    for number in range(6):
        make_photo(tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg", number=number)
        make_photo(tmp_path / "test" / "ab"[number % 2] / f"{number}.jpg", number=number + 10)
    train, test = (catalog_clips(str(tmp_path / name), frames=1, stride=1) for name in ("train", "test"))
    require_apart(train, test)
    shutil.copy(tmp_path / "train" / "b" / "3.jpg", tmp_path / "test" / "a" / "other.jpg")
    test = catalog_clips(str(tmp_path / "test"), frames=1, stride=1)
    assert shared_content(train.items, test.items) == {"a/other.jpg": "b/3.jpg"}
    with pytest.raises(ConfigError, match=r"1 of 7 items are training items, too \(a/other.jpg is b/3.jpg\)"):
        require_apart(train, test)
    rows = [(tmp_path / "train" / "a" / f"{number}.jpg").read_bytes() for number in (0, 2, 4)]
    pq.write_table(pa.table({"image": rows, "label": ["a", "b", "a"]}), tmp_path / "t.parquet")
    held = catalog_clips(str(tmp_path / "t.parquet"), frames=1, stride=1)
    assert sorted(shared_content(train.items, held.items).values()) == ["a/0.jpg", "a/2.jpg", "a/4.jpg"]
    assert shared_content(test.items, held.items) == {}


def test_other_seconds_of_a_video_are_another_item(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"some video")

    def window(id, start, end):
        return Item(id=id, path=tmp_path / "v.mp4", kind="video", label="a", part=Seconds(start=start, end=end))

    assert shared_content([window("a", 0, 1)], [window("b", 1, 2)]) == {}
    assert shared_content([window("a", 0, 1)], [window("b", 0, 1)]) == {"b": "a"}
    gone = Item(id="c", path=tmp_path / "gone.mp4", kind="video", label="a")
    assert shared_content([gone], [gone]) == {}
