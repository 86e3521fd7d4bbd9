"""Test items that are training items: by bytes and by pixels, wherever these lie."""

from __future__ import annotations

import io
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_photo, make_video
from PIL import Image

from toto.evaluation import overlap
from toto.evaluation.labelled import catalog_clips
from toto.evaluation.overlap import OPENING, require_apart, shared_content, shared_pixels
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


@pytest.mark.parametrize(("kind", "said"), [("image", "0 GB"), ("video", "2 videos")])
def test_pixels_of_very_large_sets_are_not_decoded_beforehand(kind, said, tmp_path, monkeypatch, capsys):
    make = make_photo if kind == "image" else make_video
    suffix = "jpg" if kind == "image" else "mp4"
    make(tmp_path / "train" / "a" / f"0.{suffix}", number=1)
    (tmp_path / "test" / "a").mkdir(parents=True)
    file = tmp_path / "test" / "a" / f"1.{suffix}"
    file.write_bytes(
        (tmp_path / "train" / "a" / f"0.{suffix}").read_bytes() + b"\0"
    )  # another file that shows the same
    sides = [catalog_clips(str(tmp_path / name), frames=1, stride=1) for name in ("train", "test")]
    with pytest.raises(ConfigError, match="their pixels are equal"):
        require_apart(*sides)
    monkeypatch.setattr(overlap, "MOST_BYTES", 100)
    monkeypatch.setattr(overlap, "MOST_VIDEOS", 1)
    capsys.readouterr()
    require_apart(*sides)
    line = f"{said} of training and test items: their bytes differ, and their pixels are not compared"
    assert line in capsys.readouterr().err


def test_other_seconds_of_a_video_are_another_item(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"some video")

    def window(id, start, end):
        return Item(id=id, path=tmp_path / "v.mp4", kind="video", label="a", part=Seconds(start=start, end=end))

    assert shared_content([window("a", 0, 1)], [window("b", 1, 2)]) == {}
    assert shared_content([window("a", 0, 1)], [window("b", 0, 1)]) == {"b": "a"}
    gone = Item(id="c", path=tmp_path / "gone.mp4", kind="video", label="a")
    assert shared_content([gone], [gone]) == {}


def labelled(path, **options):
    return catalog_clips(str(path), frames=1, stride=1, **options)


@pytest.fixture(params=[0, 10**9], ids=["by their sizes first", "decoded at once"])
def photos(request, tmp_path, monkeypatch):
    """Two classes of photographs to train on, and others to test on; large ones or small ones."""
    monkeypatch.setattr(overlap, "SMALL", request.param)
    for number in range(4):
        make_photo(tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg", number=number)
        make_photo(tmp_path / "test" / "ab"[number % 2] / f"{number}.jpg", number=number + 10)
    (tmp_path / "train" / "a" / "broken.jpg").write_text("broken")
    (tmp_path / "test" / "a" / "damaged.jpg").write_text("damaged")
    return tmp_path


def lying(picture, path):
    """The picture with its rows and columns exchanged, and the orientation that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def commented(file, path):
    """The JPEG with a comment, which moves no pixel."""
    content = Path(file).read_bytes()
    path.write_bytes(content[:2] + b"\xff\xfe\x00\x07taken" + content[2:])


AGAIN = {
    "png": lambda picture, path: picture.save(path.with_suffix(".png")),
    "webp": lambda picture, path: picture.save(path.with_suffix(".webp"), lossless=True),
    "alpha": lambda picture, path: picture.convert("RGBA").save(path.with_suffix(".png")),
    "lying": lambda picture, path: lying(picture, path.with_suffix(".png")),
    "comment": lambda picture, path: commented(picture.filename, path),
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_picture_that_was_stored_again_is_found(photos, how):
    train = labelled(photos / "train")
    require_apart(train, labelled(photos / "test"))
    with Image.open(photos / "train" / "b" / "3.jpg") as picture:
        AGAIN[how](picture, photos / "test" / "a" / "again.jpg")
    test = labelled(photos / "test")
    ((found, original),) = shared_pixels(train.items, test.items).items()
    assert (found.partition(".")[0], original) == ("a/again", "b/3.jpg")
    assert shared_content(train.items, test.items) == {}
    with pytest.raises(
        ConfigError, match=r"1 of 6 items are training items, too \(a/again.* is b/3.jpg\): their pixels"
    ):
        require_apart(train, test)


def test_a_picture_that_changed_a_little_is_another_one(photos):
    with Image.open(photos / "train" / "b" / "3.jpg") as picture:
        pixels = np.array(picture)
    Image.fromarray(pixels).save(photos / "test" / "a" / "lossy.jpg", quality=90)
    Image.fromarray(pixels.reshape(pixels.shape[1], pixels.shape[0], 3)).save(photos / "test" / "a" / "rows.png")
    pixels[7, 7, 0] ^= 1
    Image.fromarray(pixels).save(photos / "test" / "a" / "one.png")
    assert shared_pixels(labelled(photos / "train").items, labelled(photos / "test").items) == {}


def test_pixels_are_found_in_parquet_files_and_twice(photos):
    rows = []
    for number in (1, 1, 2):
        kept = io.BytesIO()
        with Image.open(photos / "train" / "ab"[number % 2] / f"{number}.jpg") as picture:
            picture.save(kept, "PNG", compress_level=len(rows))
        rows.append(kept.getvalue())
    pq.write_table(pa.table({"image": rows, "label": ["b", "b", "a"]}), photos / "t.parquet")
    held = labelled(photos / "t.parquet")
    with pytest.raises(ConfigError, match=r"3 of 3 items .*t.parquet/00000000 is b/1.jpg\): their pixels are equal"):
        require_apart(labelled(photos / "train"), held)


def test_pictures_of_sizes_that_the_other_side_has_not_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "SMALL", 0)
    for number in range(6):
        for side in ("train", "test"):
            wide = 80 + number // 4 if side == "train" else 80 + 8 * number
            make_photo(
                tmp_path / side / "ab"[number % 2] / f"{number}.jpg", width=wide, number=2 * number + (side == "test")
            )
    decoded = []
    stream = overlap.stream_item
    monkeypatch.setattr(overlap, "stream_item", lambda item, **how: decoded.append(item.id) or stream(item, **how))
    require_apart(labelled(tmp_path / "train"), labelled(tmp_path / "test"))
    assert sorted(decoded) == ["a/0.jpg", "a/0.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"]


def in_container(source, target):
    """The packets of a video in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def lossless(path, frames):
    """Frames as they are, each by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def test_a_video_in_another_container_is_found(tmp_path):
    for number in range(4):
        make_video(tmp_path / "train" / "ab"[number % 2] / f"{number}.mp4", frames=10, size=32, number=number)
        make_video(tmp_path / "test" / "ab"[number % 2] / f"{number}.mp4", frames=10, size=32, number=number + 10)
    train = labelled(tmp_path / "train")
    require_apart(train, labelled(tmp_path / "test"))
    in_container(tmp_path / "train" / "a" / "2.mp4", tmp_path / "test" / "b" / "again.mkv")
    test = labelled(tmp_path / "test")
    assert shared_pixels(train.items, test.items) == {"b/again.mkv": "a/2.mp4"}
    with pytest.raises(ConfigError, match=r"1 of 5 items .*\(b/again.mkv is a/2.mp4\): their pixels are equal"):
        require_apart(train, test)


@pytest.mark.parametrize("same", [1, OPENING + 1])
def test_videos_that_begin_alike_are_different_ones(tmp_path, same):
    frames = np.random.default_rng(0).integers(0, 256, (OPENING + 4, 16, 16, 3), dtype=np.uint8)
    lossless(tmp_path / "train" / "a" / "v.mkv", frames)
    lossless(tmp_path / "test" / "a" / "same.avi", frames)
    lossless(tmp_path / "test" / "a" / "short.avi", frames[:-1])
    frames[same:] = frames[same:][::-1]
    lossless(tmp_path / "test" / "a" / "other.avi", frames)
    assert shared_pixels(labelled(tmp_path / "train").items, labelled(tmp_path / "test").items) == {
        "a/same.avi": "a/v.mkv"
    }


def test_the_same_seconds_of_a_video_in_another_container_are_found(tmp_path):
    make_video(tmp_path / "v.mp4", frames=36, size=32)
    in_container(tmp_path / "v.mp4", tmp_path / "w.mkv")
    for name, first in (("v.mp4", 0), ("w.mkv", 1)):
        windows = [{"path": name, "start": start, "end": start + 1, "label": "a"} for start in (first, first + 1)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, windows)))
    train, test = (labelled(tmp_path / f"{name}.jsonl") for name in ("v.mp4", "w.mkv"))
    assert shared_pixels(train.items, test.items) == {"w.mkv@1-2": "v.mp4@1-2"}
