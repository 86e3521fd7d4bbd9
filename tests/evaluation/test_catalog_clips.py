"""Every kind of source gives the same labelled clips, in its own class order."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_video

from toto.evaluation.labelled import catalog_clips, procedural_clips, split_by_share
from toto.media.decode import read_clip
from toto.media.ledger import count_by_status
from toto.runtime.errors import ConfigError, MediaError, ShortMediaError

LABELS = {"v0": "10", "v1": "9", "v2": "10", "v3": "9"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: make_video(folder / f"{name}.mp4", frames=24, number=n) for n, name in enumerate(LABELS)}


def lay_out(kind, root, videos):
    """The videos in one of the layouts; returns the source."""
    folder = next(iter(videos.values())).parent
    if kind == "imagefolder":
        for name, path in videos.items():
            (root / LABELS[name]).mkdir(exist_ok=True)
            (root / LABELS[name] / path.name).write_bytes(path.read_bytes())
        return str(root), None
    if kind in ("webdataset", "webdataset.gz"):
        ending = ".gz" if kind.endswith("gz") else ""
        with tarfile.open(root / f"s.tar{ending}", "w:gz" if ending else "w") as tar:
            for name, path in videos.items():
                for member, content in ((f"{name}.mp4", path.read_bytes()), (f"{name}.cls", LABELS[name].encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return str(root / f"s.tar{ending}"), None
    if kind == "parquet":
        table = pa.table({"video": [path.read_bytes() for path in videos.values()], "label": list(LABELS.values())})
        pq.write_table(table, root / "p.parquet")
        return str(root / "p.parquet"), None
    lines = {
        "kinetics": [f"{name}.mp4 {label}" for name, label in LABELS.items()],
        "list": [f"{name}.mp4\t{label}" for name, label in LABELS.items()],
        "jsonl": [json.dumps({"path": f"{name}.mp4", "label": label}) for name, label in LABELS.items()],
        "howto100m": ["video_id,category_1", *(f"{name},{label}" for name, label in LABELS.items())],
        "ego4d": [json.dumps({"videos": [{"video_uid": name, "label": label} for name, label in LABELS.items()]})],
    }[kind]
    (root / "manifest").write_text("\n".join(lines) + "\n")
    return f"{kind}:{root / 'manifest'}", folder


KINDS = ["imagefolder", "kinetics", "list", "jsonl", "howto100m", "ego4d", "webdataset", "webdataset.gz", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_clips(kind, videos, tmp_path):
    source, folder = lay_out(kind, tmp_path, videos)
    clips = catalog_clips(source, frames=4, stride=5, clips=folder)
    assert clips.modality == "video"
    assert clips.classes == (("10", "9") if kind == "imagefolder" else ("9", "10"))
    read = [clips.read(number).frames for number in range(4)]
    for name, path in videos.items():
        wanted = read_clip(path, frames=4, stride=5).frames
        (number,) = (n for n, frames in enumerate(read) if frames.equal(wanted))
        assert clips.classes[clips.labels[number]] == LABELS[name]


def test_windows_splits_and_what_is_missing(videos, tmp_path):
    folder = next(iter(videos.values())).parent
    records = [
        {"path": "v0.mp4", "start": 0.5, "end": 1.0, "label": "b", "split": "train", "id": "w"},
        {"path": "v0.mp4", "start": 1.0, "label": "a", "split": "train", "id": "x"},
        {"path": "gone.mp4", "label": "a", "split": "train"},
        {"path": "lost.mp4", "label": "c", "split": "val"},
        {"path": "v1.mp4", "label": "b", "split": "val"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = str(tmp_path / "m.jsonl")
    train = catalog_clips(source, frames=4, stride=1, clips=folder, split="train")
    assert (train.classes, train.labels, train.ids) == (("a", "b"), (1, 0), ("w", "x"))  # nothing of c is there
    assert [row.id for row in train.refused] == ["gone.mp4"]
    whole = read_clip(videos["v0"], frames=24, stride=1).frames
    assert train.read(0).frames.equal(whole[6:10])
    assert train.read(1).frames.equal(whole[12:16])
    val = catalog_clips(source, frames=4, stride=1, clips=folder, split="val", classes=train.classes)
    assert (val.labels, [row.id for row in val.refused]) == ((1,), ["lost.mp4"])
    long = catalog_clips(source, frames=9, stride=2, clips=folder, split="train")
    with pytest.raises(ShortMediaError, match="5 frames, but 9 frames at stride 2 cover 17"):
        long.read(0)


def test_a_share_of_what_was_refused_is_the_tests(videos, tmp_path):
    lines = [f"{path} {LABELS[name]}" for name, path in videos.items()]
    (tmp_path / "k.csv").write_text("\n".join([*lines, *(f"gone{n}.mp4 9" for n in range(10))]))
    clips = catalog_clips(str(tmp_path / "k.csv"), frames=4, stride=1)
    train, test = split_by_share(clips, 0.3, seed=0)
    assert (len(train.refused), len(test.refused)) == (7, 3)
    assert count_by_status(train.refused) == {"corrupt": 7}
    assert {row.id for row in (*train.refused, *test.refused)} == {f"gone{n}.mp4" for n in range(10)}
    assert split_by_share(clips, 0.3, seed=0)[1].refused == test.refused


def test_labels_are_needed_and_damage_is_named(videos, tmp_path):
    (tmp_path / "bad.mp4").write_text("x")
    (tmp_path / "l.txt").write_text(f"{videos['v0']}\n{tmp_path / 'bad.mp4'}\ta\n")
    with pytest.raises(ConfigError, match=r"1 items have no label .*give each a label"):
        catalog_clips(f"list:{tmp_path / 'l.txt'}", frames=4, stride=1)
    (tmp_path / "l.txt").write_text(f"{videos['v0']}\tb\n{tmp_path / 'bad.mp4'}\ta\n")
    clips = catalog_clips(f"list:{tmp_path / 'l.txt'}", frames=4, stride=1)
    with pytest.raises(MediaError, match="can't be decoded"):
        clips.read(clips.ids.index(str(tmp_path / "bad.mp4")))


def test_the_first_of_each_class_keep_their_order():
    clips = procedural_clips(0, 20, frames=2, size=16)
    some = clips.first_of_each(2)
    assert some.labels == (*range(6), *range(6))
    assert some.ids == clips.ids[:12]
    assert some.read(7).source == clips.read(7).source
    assert some.name == "procedural motion, seed 0, at most 2 of each class"
    with pytest.raises(ConfigError, match=r"--limit: must be at least 1, is 0"):
        clips.first_of_each(0)
