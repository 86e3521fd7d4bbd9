"""Columns of parquet files and CSVs by the names that somebody gives them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_photo, make_video

from toto.media.catalogs import open_source, takes_column
from toto.media.images import read_image
from toto.media.reading import read_item
from toto.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return [make_photo(folder / f"{number}.jpg", number=number) for number in range(4)]


@pytest.fixture
def table(photos):
    """Two columns with pictures and several that may be labels, of which none is called so but the first."""
    contents = [photo.read_bytes() for photo in photos]
    return pa.table(
        {
            "label": [0, 1, 0, 1],
            "big": contents,
            "small": [{"bytes": content, "path": None} for content in reversed(contents)],
            "kind": ["cat", "dog", "cat", None],
            "coarse": pa.array([1, 0, -1, 1], pa.int8()),
            "coded": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
            "none": [-1] * 4,
            "score": [0.5] * 4,
        }
    )


@pytest.fixture
def write(tmp_path):
    def write(table, metadata=None, name="t.parquet"):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / name)
        return str(tmp_path / name)

    return write


def labels(source, **columns):
    return [item.label for item in open_source(source, **columns).items]


def test_columns_are_taken_by_name(table, write, photos):
    source = write(table)
    with pytest.raises(ConfigError, match=r"no column with images or videos .*; name it with --image-column"):
        open_source(source)
    catalog = open_source(source, image_column="big", label_column="kind")
    assert [item.label for item in catalog.items] == ["cat", "dog", "cat", None]
    assert catalog.classes == ("cat", "dog")
    assert read_item(catalog.items[1]).frames.equal(read_image(photos[1]).frames)
    other = open_source(source, image_column="small")
    assert [item.label for item in other.items] == ["0", "1", "0", "1"]
    assert read_item(other.items[1]).frames.equal(read_image(photos[2]).frames)
    assert labels(source, image_column="big", label_column="coarse") == ["1", "0", None, "1"]
    assert labels(source, image_column="big", label_column="coded") == ["x", "y", "x", "y"]


def test_names_of_classes_are_those_of_the_named_column(table, write):
    features = {
        "label": {"names": ["plane", "car"]},
        "coarse": {"names": ["zebra", "ant"]},
        "kind": {"dtype": "string"},
    }
    source = write(table, {"huggingface": json.dumps({"info": {"features": features}})})
    assert labels(source, image_column="big") == ["plane", "car", "plane", "car"]
    coarse = open_source(source, image_column="big", label_column="coarse")
    assert [item.label for item in coarse.items] == ["ant", "zebra", None, "ant"]
    assert coarse.classes == ("zebra", "ant")
    source = write(table, {"classes": "plane,car"})  # which doesn't say of what: of the column with a usual name
    assert labels(source, image_column="big", label_column="label") == ["plane", "car", "plane", "car"]
    assert labels(source, image_column="big", label_column="coarse") == ["1", "0", None, "1"]
    assert open_source(source, image_column="big", label_column="kind").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image_column": "img"}, r"no column 'img' \(columns: label, big, .*score\); check --image-column"),
        ({"image_column": "kind"}, r"'kind' holds string, not the bytes of .*; columns with bytes: big, small"),
        ({"label_column": "fine"}, r"no column 'fine' \(columns: label, .*\); check --label-column"),
        ({"label_column": "score"}, r"'score' holds double, and labels are words or whole numbers"),
        ({"label_column": "big"}, r"'big' holds binary, and labels are words"),
        ({"label_column": "none"}, r"column 'none' holds no label; name another one with --label-column"),
    ],
)
def test_columns_that_are_none_are_refused_by_name(table, write, columns, said):
    with pytest.raises(ConfigError, match=said) as caught:
        open_source(write(table), **{"image_column": "big"} | columns)
    assert "\n" not in str(caught.value)


def test_a_file_without_any_bytes_says_what_it_lacks(table, write):
    with pytest.raises(ConfigError, match=r"holds string, .*; embed the files in the parquet file"):
        open_source(write(table.select(["kind", "label"])), image_column="kind")


def test_every_file_of_a_folder_needs_the_columns(table, write, tmp_path):
    write(table, name="a.parquet")
    write(table.drop_columns("kind"), name="b.parquet")
    with pytest.raises(ConfigError, match=r"b.parquet: no column 'kind'"):
        open_source(str(tmp_path), image_column="big", label_column="kind")


def test_what_a_column_holds_is_seen_in_it_where_its_name_says_nothing(write, tmp_path, photos):
    video = make_video(tmp_path / "v.mp4", frames=8, size=32).read_bytes()
    source = write(pa.table({"data": [None, video, video]}))
    assert [item.kind for item in open_source(source, image_column="data").items] == ["video"] * 3
    assert read_item(open_source(source).items[1]).frames.shape == (8, 32, 32, 3)
    for content in (photos[0].read_bytes(), b"neither", None):
        source = write(pa.table({"data": pa.array([content], pa.binary())}))
        assert [item.kind for item in open_source(source, image_column="data").items] == ["image"]


def test_labels_of_a_csv_by_name(tmp_path):
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", frames=4, size=32)
    rows = ["video_id,category_1,category_2", "a,Cars,Wheels", "b,Cars,Doors"]
    (tmp_path / "h.csv").write_text("\n".join(rows))
    assert labels(str(tmp_path / "h.csv")) == ["Cars", "Cars"]
    assert labels(str(tmp_path / "h.csv"), label_column="category_2") == ["Wheels", "Doors"]
    rows = ["label,youtube_id,time_start,time_end,group", "drift,a,0,10,move", "stir,b,0,10,"]
    (tmp_path / "k.csv").write_text("\n".join(rows))
    assert labels(str(tmp_path / "k.csv"), label_column="group") == ["move", None]
    for name in ("h", "k"):
        with pytest.raises(ConfigError, match=r"no column 'verb' \(columns: .*\); check --label-column"):
            open_source(str(tmp_path / f"{name}.csv"), label_column="verb")
    (tmp_path / "ids.csv").write_text("a\nb\n")
    (tmp_path / "pairs.csv").write_text("a.mp4 1\nb.mp4 2\n")
    for name in ("howto100m:ids", "pairs"):
        kind, _, file = name.rpartition(":")
        source = f"{kind or 'kinetics'}:{tmp_path / file}.csv"
        with pytest.raises(ConfigError, match="its columns have no names; leave --label-column out"):
            open_source(source, label_column="label")


def test_sources_without_columns_refuse_their_names(tmp_path, photos):
    folder = photos[0].parent
    (tmp_path / "l.txt").write_text("\n".join(map(str, photos)))
    assert not takes_column(str(folder), "image_column")
    assert not takes_column(f"kinetics:{tmp_path}/l.txt", "image_column")
    assert takes_column(f"kinetics:{tmp_path}/l.txt", "label_column")
    with pytest.raises(ConfigError, match=r"--image-column x: imagefolder has no such column to name; leave it out"):
        open_source(str(folder), image_column="x")
    with pytest.raises(ConfigError, match="--label-column x: list has no such column"):
        open_source(str(tmp_path / "l.txt"), label_column="x")
    with pytest.raises(ConfigError, match="--image-column x: kinetics has no such column"):
        open_source(f"kinetics:{tmp_path}/l.txt", image_column="x", label_column="y")


def test_a_heading_of_paths_and_labels_is_no_item_and_a_negative_label_is_none(tmp_path):
    make_photo(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("path,label\na.jpg,cat\n")
    assert [(item.id, item.label) for item in open_source(str(tmp_path / "t.csv")).items] == [("a.jpg", "cat")]
    (tmp_path / "n.csv").write_text("a.jpg,-1\n")
    assert [item.label for item in open_source(str(tmp_path / "n.csv")).items] == [None]
    (tmp_path / "e.csv").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        open_source(str(tmp_path / "e.csv"))
