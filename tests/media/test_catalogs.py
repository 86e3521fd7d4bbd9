"""Catalogs: each kind of source gives the items it names, and a ledger row for everything else."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_photo, make_video

from toto.media.catalog import Bytes, Item, Row, Seconds, class_order, units
from toto.media.catalogs import KINDS, open_source
from toto.media.catalogs.sources import recognise
from toto.media.decode import Window, read_image, read_media, stream_windows
from toto.media.reading import stream_item, stream_unit
from toto.runtime.errors import ConfigError, MediaError, ShortMediaError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video of 40 frames at 12 a second."""
    return make_video(tmp_path_factory.mktemp("clip") / "v.mp4")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return make_photo(tmp_path_factory.mktemp("photo") / "p.jpg")


def place(content, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.read_bytes())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(catalog):
    return {item.id: item.label for item in catalog.items}


def refused(catalog):
    return {row.id: (row.status, row.reason) for row in catalog.skipped}


def test_folder_trees_are_as_they_were_and_a_split_is_a_folder(tmp_path, photo):
    place(photo, tmp_path / "train" / "cat" / "a.jpg", tmp_path / "val" / "dog" / "b.jpg")
    catalog = open_source(str(tmp_path))
    assert found(catalog) == {"train/cat/a.jpg": "train", "val/dog/b.jpg": "val"}
    assert catalog.classes is None
    (item,) = open_source(f"imagefolder:{tmp_path}", split="val").items
    assert (item.id, item.label, item.split) == ("dog/b.jpg", "dog", "val")
    with pytest.raises(ConfigError, match="no folder 'test'"):
        open_source(str(tmp_path), split="test")


def test_kinetics_paths_with_labels(tmp_path, clip):
    place(clip, tmp_path / "clips" / "a b.mp4", tmp_path / "clips" / "c.mp4")
    text = f"clips/a b.mp4 10\n\nclips/c.mp4 9\nclips/gone.mp4 2\nclips/c.mp4 3\n{tmp_path}/clips/c.mp4 11\n"
    catalog = open_source(str(write(tmp_path / "train.csv", text)))
    assert catalog.form == "kinetics"
    assert found(catalog) == {"clips/a b.mp4": "10", "clips/c.mp4": "9", f"{tmp_path}/clips/c.mp4": "11"}
    assert catalog.classes == ("2", "3", "9", "10", "11")
    assert refused(catalog)["clips/gone.mp4"][0] == "corrupt"
    assert "missing: no file" in refused(catalog)["clips/gone.mp4"][1]
    assert "line 4" in refused(catalog)["clips/gone.mp4"][1]
    assert refused(catalog)["clips/c.mp4 (line 5)"] == ("duplicate", "named before in line 3")
    (tmp_path / "words.txt").write_text("c.mp4 playing_harp\nnothing\n")
    with pytest.raises(ConfigError, match=r"words\.txt: line 2: 'nothing' is no path and label"):
        open_source(str(tmp_path / "words.txt"), clips=tmp_path / "clips")


def test_kinetics_own_csv_finds_clips_by_their_usual_names(tmp_path, clip):
    clips = tmp_path / "clips"
    place(
        clip,
        clips / "playing_harp" / "aaaaaaaaaaa_000010_000020.mp4",
        clips / "bbbbbbbbbbb.mkv",
        clips / "eating cake" / "ccccccccccc_000001_000011.webm",
        clips / "a" / "ccccccccccc_000001_000011.webm",
        clips / "eating cake" / "a" / "ccccccccccc_000001_000011.webm",
        clips / "eating cake" / "val" / "ccccccccccc_000001_000011.webm",
    )
    rows = [
        "label,youtube_id,time_start,time_end,split",
        '"playing harp",aaaaaaaaaaa,10,20,train',
        "eating cake,bbbbbbbbbbb,3,13,train",
        "eating cake,ccccccccccc,1.0,11.0,val",
        "yawning,-dddddddddd,5,15,val",
    ]
    manifest = write(tmp_path / "k.csv", "\n".join(rows))
    catalog = open_source(str(manifest), clips=clips)
    assert found(catalog) == {
        "aaaaaaaaaaa_000010_000020": "playing harp",
        "bbbbbbbbbbb_000003_000013": "eating cake",
        "ccccccccccc_000001_000011": "eating cake",
    }
    assert [item.split for item in catalog.items] == ["train", "train", "val"]
    assert catalog.items[2].path.parent == clips / "eating cake" / "val"
    assert refused(catalog)["-dddddddddd_000005_000015"][1].startswith("missing: no file -dddddddddd_000005")
    val = open_source(f"kinetics:{manifest}", clips=clips, split="val")
    assert list(found(val)) == ["ccccccccccc_000001_000011"]
    assert val.classes == catalog.classes == ("eating cake", "playing harp", "yawning")
    with pytest.raises(ConfigError, match="splits with items here: train, val"):
        open_source(str(manifest), clips=clips, split="test")
    with pytest.raises(ConfigError, match=r"none of its 4 entries .*--clips"):
        open_source(str(write(tmp_path / "empty" / "k.csv", "\n".join(rows))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.csv", "label,youtube_id,time_start,time_end\nx,aaa,one,2\n", "line 2: times 'one', '2' are no numbers"),
        ("k.csv", "label,youtube_id,time_start,time_end\nx,aaa\n", "line 2: 2 values for the columns label"),
        ("e.json", '{"videos": [\n{"video_uid": }]}', "line 2: is no JSON"),
        ("e.json", '{"other": 1}', "holds no list of videos or clips"),
        ("e.json", '{"clips": [{"start": 1}]}', "entry 1: neither clip_uid nor video_uid"),
        ("l.jsonl", '{"path": "v.mp4"}\n{"path": \n', "line 2: is no JSON"),
        ("l.jsonl", "[1]\n", "line 1: is no JSON object"),
        ("l.jsonl", '{"label": 3}\n', "line 1: no path"),
        ("l.jsonl", '{"path": "v.mp4", "start": 5, "end": 2}\n', "line 1: a window from 5 s to 2 s holds nothing"),
        ("l.jsonl", '{"path": "v.mp4", "start": "5"}\n', 'line 1: "5" is no number of seconds'),
        ("l.jsonl", '{"path": "v.mp4", "label": [1]}\n', "line 1: label .1. is neither"),
        ("t.tsv", "a.mp4\tx\n\ty\n", "line 2: no path before the tab"),
        ("q.txt", "what is this/ list\n", "nobody knows this kind of list"),
        ("u.txt", "a\xff.mp4\n", "no text in UTF-8"),
    ],
)
def test_malformed_manifests_are_one_line_with_the_number_of_the_line(tmp_path, clip, name, text, message):
    place(clip, tmp_path / "v.mp4", tmp_path / "a.mp4")
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as error:
        open_source(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_ego4d_in_its_layouts(tmp_path, clip):
    clips = tmp_path / "clips"
    place(clip, clips / "v1.mp4", clips / "deep" / "c1.mp4")

    def catalog(name, value):
        return open_source(str(write(tmp_path / name, json.dumps(value))), clips=clips)

    videos = catalog("ego4d.json", {"videos": [{"video_uid": "v1", "duration_sec": 3}, {"video_uid": "v2"}]})
    assert list(found(videos)) == ["v1"]
    assert refused(videos)["v2"] == ("corrupt", "missing: no file v2.* (entry 2)")
    assert list(found(catalog("c.json", {"clips": [{"clip_uid": "c1", "video_uid": "v1", "split": "val"}]}))) == ["c1"]
    inside = {"video_uid": "v1", "split": "train", "clips": [{"clip_uid": "c1"}]}
    inside["clips"].append({"clip_uid": "c2", "video_start_sec": 1.0, "video_end_sec": 2.0})
    nested = catalog("n.json", {"videos": [inside]})
    assert list(found(nested)) == ["c2", "c1"]
    assert nested.items[0].part == Seconds(start=1.0, end=2.0)
    assert nested.items[0].path.name == "v1.mp4"
    assert {item.split for item in nested.items} == {"train"}


def test_howto100m_by_id_with_any_ending(tmp_path, clip):
    clips = tmp_path / "videos"
    place(clip, clips / "nVbIUDjzWY4.mp4", clips / "a" / "CWxQ5LvzqYs.webm")
    text = (
        "video_id,category_1,category_2,rank,task_id\nnVbIUDjzWY4,Cars,x,1,2\nCWxQ5LvzqYs,Food,x,1,2\ngone,Food,x,1,2\n"
    )
    table = open_source(str(write(tmp_path / "HowTo100M_v1.csv", text)), clips=clips)
    assert table.form == "howto100m"
    assert found(table) == {"nVbIUDjzWY4": "Cars", "CWxQ5LvzqYs": "Food"}
    assert list(refused(table)) == ["gone"]
    ids = open_source(str(write(tmp_path / "ids.txt", "nVbIUDjzWY4\nCWxQ5LvzqYs\n")), clips=clips)
    assert found(ids) == {"nVbIUDjzWY4": None, "CWxQ5LvzqYs": None}


def test_plain_lists_and_json_lines(tmp_path, clip, photo):
    place(clip, tmp_path / "v.mp4")
    place(photo, tmp_path / "p.jpg")
    lines = open_source(str(write(tmp_path / "files.txt", "v.mp4\tdrift\np.jpg\nnotes.txt\n")))
    assert lines.form == "list"
    assert found(lines) == {"v.mp4": "drift", "p.jpg": None}
    assert refused(lines)["notes.txt"][1].startswith("missing")
    records = [
        {"path": "v.mp4", "start": 2, "end": 3.5, "label": 1, "other": None},
        {"path": "p.jpg", "split": "val", "label": "x"},
        {"path": "v.mp4", "start": 1, "id": "mine", "split": "train"},
        {"path": "p.jpg", "start": 1, "id": "cut"},
    ]
    catalog = open_source(str(write(tmp_path / "w.jsonl", "\n".join(map(json.dumps, records)))))
    assert [item.id for item in catalog.items] == ["mine", "v.mp4@2-3.5", "p.jpg"]
    assert [item.label for item in catalog.items] == [None, "1", "x"]
    assert refused(catalog)["cut"] == ("corrupt", "an image has no seconds to cut (line 4)")
    assert [len(unit) for unit in units(catalog.items)] == [2, 1]


def test_windows_of_a_video_are_its_frames_and_are_decoded_once(clip, monkeypatch):
    whole = read_media(clip)
    windows = [Window(start=0.5, end=1.5), Window(start=1.0, end=2.0, offset=1), Window(start=3.0, end=None)]
    windows += [Window(start=90.0, end=95.0)]
    opened = []
    monkeypatch.setattr("toto.media.windows._read", counting(opened, "toto.media.windows", "_read"))
    got: dict[int, list] = {}
    for number, made in stream_windows(clip, windows, stride=2):
        got.setdefault(number, []).append(made)
    assert len(opened) == 1
    assert torch.cat([each.frames for each in got[0]]).equal(whole.frames[6:18:2])
    assert torch.cat([each.frames for each in got[1]]).equal(whole.frames[13:24:2])
    assert torch.cat([each.frames for each in got[2]]).equal(whole.frames[36:40:2])
    assert isinstance(got[3][0], ShortMediaError)
    assert "the video has 3.3 s" in str(got[3][0])


def counting(calls, module, name):
    original = getattr(__import__(module, fromlist=[name]), name)

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    return counted


def test_damage_after_a_window_is_nothing_to_it(tmp_path, clip):
    content = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(0.8 * len(content))])
    items = [
        Item(id=str(n), path=tmp_path / "cut.mp4", kind="video", label=None, part=Seconds(start=n, end=n + 0.5))
        for n in (0, 3)
    ]
    first, last = [], []
    for number, made in stream_unit(items, stride=1, offsets=[0, 0]):
        (last if number else first).append(made)
    assert torch.cat([each.frames for each in first]).equal(read_media(clip).frames[:6])
    assert isinstance(last[-1], MediaError)
    with pytest.raises(MediaError):
        list(stream_item(items[1]))


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def test_webdataset_shards(tmp_path, clip, photo):
    video, picture = clip.read_bytes(), photo.read_bytes()
    members = [
        ("a/0001.jpg", picture), ("a/0001.cls", b"7"), ("a/0001.seg.png", picture),
        ("a/0002.mp4", video), ("a/0002.json", b'{"label": "run"}'), ("a/0002.txt", b"other"),
        ("a/0003.txt", b"alone"),
        ("../out.jpg", picture), ("/etc/abs.jpg", picture),
        special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), special("h.jpg", tarfile.LNKTYPE, "a/0001.jpg"),
        special("fifo.jpg", tarfile.FIFOTYPE), special("dev.jpg", tarfile.CHRTYPE),
        ("a/0001.jpg", picture),
    ]  # fmt: skip
    make_tar(tmp_path / "train-000.tar", members)
    catalog = open_source(str(tmp_path))
    assert catalog.form == "webdataset"
    assert found(catalog) == {"train-000.tar/a/0001.jpg": "7", "train-000.tar/a/0002.mp4": "run"}
    assert {item.split for item in catalog.items} == {"train"}
    said = {name.removeprefix("train-000.tar/"): reason for name, (_, reason) in refused(catalog).items()}
    assert "leads outside" in said["../out.jpg"]
    assert "leads outside" in said["/etc/abs.jpg"]
    assert said["l.jpg"] == "a link (to /etc/passwd)"
    assert said["h.jpg"].startswith("a link")
    assert said["fifo.jpg"] == said["dev.jpg"] == "a device or a pipe"
    assert "no image or video in its sample" in said["a/0003.txt"]
    assert "has a/0001.jpg already" in said["a/0001.seg.png"]
    assert sum(status == "duplicate" for status, _ in refused(catalog).values()) == 1
    image, moving = catalog.items
    assert next(stream_item(image)).frames.equal(read_image(photo).frames)
    assert torch.cat([each.frames for each in stream_item(moving, stride=3)]).equal(read_media(clip, stride=3).frames)


def test_limits_and_damage_of_tars_are_ledgered(tmp_path, photo, monkeypatch):
    members = [(f"{n}.jpg", photo.read_bytes()) for n in range(3)]
    whole = make_tar(tmp_path / "s.tar", members).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: len(whole) // 4])
    catalog = open_source(str(tmp_path / "s.tar"))
    assert "s.tar/0.jpg" in found(catalog)
    assert refused(catalog)["s.tar"][0] == "corrupt"
    second = whole.index(b"1.jpg")
    (tmp_path / "s.tar").write_bytes(whole[:second] + b"\1" * 512 + whole[second + 512 :])
    catalog = open_source(str(tmp_path / "s.tar"))
    assert list(found(catalog)) == ["s.tar/0.jpg"]
    assert "can't be read to its end" in refused(catalog)["s.tar"][1]
    (tmp_path / "s.tar").write_bytes(whole)
    assert not refused(open_source(str(tmp_path / "s.tar")))
    monkeypatch.setattr("toto.media.catalogs.containers.LARGEST_MEMBER", 10)
    with pytest.raises(ConfigError, match=r"none of its 3 entries .*the limit is 10"):
        open_source(str(tmp_path / "s.tar"))
    with pytest.raises(ConfigError, match="can't be read"):
        open_source(f"webdataset:{write(tmp_path / 'no.tar', 'no tar at all' * 100)}")


def hugging_face(names):
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def test_parquet_in_hugging_faces_layout(tmp_path, clip, photo):
    picture, video = photo.read_bytes(), clip.read_bytes()
    images = [{"bytes": picture, "path": "x.jpg"}, {"bytes": video, "path": "y.mp4"}, {"bytes": None, "path": "z.jpg"}]
    table = pa.table({"image": images * 30, "label": [1, 0, -1] * 30})
    table = table.replace_schema_metadata(hugging_face(["zebra", "ant"]))
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=20)
    catalog = open_source(str(tmp_path))
    assert catalog.classes == ("zebra", "ant")
    assert len(catalog.items) == 90
    first, second, third = catalog.items[:3]
    assert (first.id, first.kind, first.label) == ("data/train-00000-of-00001.parquet/00000000", "image", "ant")
    assert (second.kind, second.label, second.split) == ("video", "zebra", "train")
    assert third.label is None
    for item in (catalog.items[63], first, catalog.items[87]):
        assert next(stream_item(item)).frames.equal(read_image(photo).frames)
    assert torch.cat([each.frames for each in stream_item(second)]).equal(read_media(clip).frames)
    with pytest.raises(MediaError, match="missing: its row holds no bytes"):
        list(stream_item(third))


def test_parquet_with_plain_columns(tmp_path, photo):
    table = pa.table({"img": [photo.read_bytes()] * 3, "label": [2, 0, 1], "split": ["a", "b", "a"]})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    catalog = open_source(str(path), split="a")
    assert [item.label for item in catalog.items] == ["2", "1"]
    assert catalog.classes == ("0", "1", "2")
    pq.write_table(table.replace_schema_metadata({"classes": "cat,dog"}), path)
    with pytest.raises(ConfigError, match="row 0: label 2, but 2 classes are named"):
        open_source(str(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ConfigError, match=r"no column with images or videos .columns: text"):
        open_source(str(path))
    path.write_text("no parquet")
    with pytest.raises(ConfigError, match=r"none of its 1 entries .*the parquet file can't be read"):
        open_source(str(path))


def test_kinds_are_recognised_or_named(tmp_path, photo, clip):
    place(photo, tmp_path / "p.jpg")
    place(clip, tmp_path / "list:odd.mp4")
    assert recognise(str(tmp_path / "p.jpg")).kind == "imagefolder"
    assert recognise(str(tmp_path)).kind == "imagefolder"
    write(tmp_path / "ids.txt", "p.jpg\n")
    assert recognise(f"howto100m:{tmp_path}/ids.txt").kind == "howto100m"
    for name in KINDS:
        with pytest.raises(ConfigError, match="no such file or folder"):
            recognise(f"{name}:{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="kinds: imagefolder, kinetics"):
        recognise(f"imagenet:{tmp_path}")
    with pytest.raises(ConfigError, match="names no clips elsewhere"):
        open_source(str(tmp_path), clips=tmp_path)
    with pytest.raises(ConfigError, match="--clips"):
        open_source(f"list:{tmp_path}/ids.txt", clips=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: Seconds(start=-1),
        lambda path: Seconds(start=2, end=2),
        lambda path: Bytes(offset=-1, size=1),
        lambda path: Row(number=-1, column="x", size=1),
        lambda path: Item(id="", path=path, kind="image", label=None),
        lambda path: Item(id="x", path=path, kind="image", label=None, part=Seconds(start=1)),
    ],
)
def test_items_refuse_parts_that_are_none(tmp_path, make):
    with pytest.raises(ConfigError):
        make(tmp_path)


def test_numbers_are_classes_in_the_order_of_numbers():
    assert class_order(["b", "10", "9"]) == ("10", "9", "b")
    assert class_order(["007", "7", "10"]) == ("007", "7", "10")
