"""Features on disk: the same as computed, continued after a kill, bounded, refused to strangers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_photo, make_video

from toto.evaluation import contents
from toto.evaluation.backbones.pixels import PixelBackbone
from toto.evaluation.feature_cache import CacheConfig, FeatureCache
from toto.evaluation.labelled import catalog_clips, extract, procedural_clips, stream_features
from toto.runtime.errors import ConfigError, StorageError, StoreError
from toto.runtime.places import sha256_at


class Counting(PixelBackbone):
    """Pixels, and how many clips it was asked for; fails after so many."""

    def __init__(self, *, stop: int = 10**9, **options):
        super().__init__(**options)
        self.seen, self.stop, self.layers = 0, stop, (0, 1)

    def features(self, frames):
        if self.seen >= self.stop:
            raise RuntimeError("killed")
        self.seen += len(frames)
        states = super().features(frames)[0]
        return {layer: states * (1 + layer) for layer in self.layers}


def cache_of(folder, backbone, **options):
    return FeatureCache(
        CacheConfig(folder=folder, **options), name=backbone.name, identity=backbone.identity(), kept_every=0
    )


CLIPS = procedural_clips(0, 20, frames=2, size=16)


def backbone(**options):
    return Counting(size=16, grid=2, frames=2, **options)


def equal(one, other):
    assert sorted(one.features.by_layer) == sorted(other.features.by_layer)
    for layer, states in one.features.by_layer.items():
        assert states.dtype == other.features.by_layer[layer].dtype
        assert states.equal(other.features.by_layer[layer])
    assert one.features.labels.equal(other.features.labels)
    assert one.ledger == other.ledger


def test_what_is_cached_is_what_was_computed_and_is_not_computed_again(tmp_path):
    plain = extract(backbone(), CLIPS, batch=3)
    first, second = backbone(), backbone()
    equal(extract(first, CLIPS, batch=3, cache=cache_of(tmp_path, first)), plain)
    equal(extract(second, CLIPS, batch=8, cache=cache_of(tmp_path, second)), plain)
    assert (first.seen, second.seen) == (20, 0)


def test_other_labels_and_fewer_layers_of_the_same_clips_are_not_computed_again(tmp_path):
    first, second = backbone(), backbone()
    extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first))
    second.select([1])
    other = replace(CLIPS, labels=tuple(1 - label % 2 for label in CLIPS.labels))
    found = extract(second, other, batch=4, cache=cache_of(tmp_path, second))
    assert second.seen == 0
    assert list(found.features.by_layer) == [1]
    assert found.features.labels.tolist() == list(other.labels)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_that_broke_off_is_continued(tmp_path, stop):
    plain = extract(backbone(), CLIPS, batch=3)
    broken = backbone(stop=stop)
    with pytest.raises(RuntimeError, match="killed"):
        extract(broken, CLIPS, batch=3, cache=cache_of(tmp_path, broken))
    for file in tmp_path.glob("*/layer-*.bin"):
        with file.open("ab") as handle:
            handle.write(b"half a row")  # what a kill leaves behind the last kept state
    second = backbone()
    equal(extract(second, CLIPS, batch=3, cache=cache_of(tmp_path, second)), plain)
    assert second.seen == 20 - stop


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path):
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import test_feature_cache as t\n"
        "class Killed(t.Counting):\n"
        "    def features(self, frames):\n"
        "        if self.seen >= 8: os.kill(os.getpid(), 9)\n"
        "        return super().features(frames)\n"
        "b = Killed(size=16, grid=2, frames=2)\n"
        "t.extract(b, t.CLIPS, batch=4, cache=t.cache_of(Path(sys.argv[1]), b))\n"
    )
    here = Path(__file__).parent
    places = [str(here), str(here.parent)]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *places], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    second = backbone()
    equal(extract(second, CLIPS, batch=4, cache=cache_of(tmp_path, second)), extract(backbone(), CLIPS, batch=4))
    assert second.seen == 12


def test_a_cache_of_another_model_is_refused_by_name(tmp_path):
    first = backbone()
    extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first))
    other = Counting(size=16, grid=1, frames=2)
    with pytest.raises(StoreError, match=r"features of pixels:16/2 and not of pixels:16/1 \(preparation differ"):
        cache_of(tmp_path, other)
    with pytest.raises(StoreError, match="stored differ"):
        cache_of(tmp_path, first, stored="fp16")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").touch()
    with pytest.raises(StoreError, match="holds other things"):
        cache_of(tmp_path / "elsewhere", first)


def test_nothing_is_written_beyond_the_bound(tmp_path):
    first = backbone()  # 20 clips x 8 tokens x 192 x 2 bytes x 2 layers
    with pytest.raises(StorageError, match=r"need 0\.000123 GB of a cache of 0\.0001 GB; raise --cache-gb"):
        extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first, gigabytes=1e-4))
    assert first.seen == 4
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.bin")) == 0
    extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first, gigabytes=2e-4))
    more = procedural_clips(5, 20, frames=2, size=16)
    with pytest.raises(StorageError, match=r"0\.000123 GB are taken; delete what isn't needed"):
        extract(first, more, batch=4, cache=cache_of(tmp_path, first, gigabytes=2e-4))
    with pytest.raises(ConfigError, match="must be above 0"):
        CacheConfig(gigabytes=0)


def test_fewer_tokens_are_means_of_neighbours(tmp_path):
    plain = extract(backbone(), CLIPS, batch=3).features.by_layer[0].float()
    asked = backbone()
    cache = cache_of(tmp_path, asked, tokens=4, stored="fp32")
    found = extract(asked, CLIPS, batch=3, cache=cache).features.by_layer[0]
    torch.testing.assert_close(found, plain.view(20, 4, 2, 192).mean(2), atol=1e-2, rtol=0)
    with pytest.raises(ConfigError, match="3 doesn't divide the 8 tokens"):
        extract(asked, CLIPS, batch=3, cache=cache_of(tmp_path / "three", asked, tokens=3))


def test_damaged_files_are_told(tmp_path):
    first = backbone()
    extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first))
    (file,) = tmp_path.glob("*/layer-001.bin")
    os.truncate(file, 100)
    with pytest.raises(StoreError, match=r"its layer-001.bin is damaged; delete the folder"):
        extract(first, CLIPS, batch=4, cache=cache_of(tmp_path, first))


def test_one_process_at_a_time_fills_it(tmp_path):
    first = backbone()
    cache = cache_of(tmp_path, first)
    with cache.part(CLIPS.identity(""), first.layers, 20).filling(), pytest.raises(StoreError, match="another process"):
        extract(first, CLIPS, batch=4, cache=cache)


def test_unreadable_clips_keep_their_places_and_changed_files_are_read_again(tmp_path):
    data = tmp_path / "data"
    for number in range(5):
        make_video(data / "ab"[number % 2] / f"{number}.mp4", frames=6, size=32, number=number)
    (data / "a" / "2.mp4").write_text("broken")
    found = []
    for batch in (1, 2, 64):
        clips = catalog_clips(str(data), frames=2, stride=2)
        asked = backbone()
        cache = cache_of(tmp_path / f"cache{batch}", asked)
        found.append(extract(asked, clips, batch=batch, cache=cache))
        equal(found[-1], extract(backbone(), clips, batch=batch))
        equal(found[-1], found[0])
    assert [(row.id, row.status) for row in found[0].unused] == [("a/2.mp4", "corrupt")]
    make_video(data / "a" / "2.mp4", frames=6, size=32, number=7)
    asked = backbone()
    again = extract(
        asked, catalog_clips(str(data), frames=2, stride=2), batch=2, cache=cache_of(tmp_path / "cache1", asked)
    )
    assert (asked.seen, len(again.features.labels)) == (5, 5)
    other = backbone()
    extract(other, catalog_clips(str(data), frames=2, stride=1), batch=2, cache=cache_of(tmp_path / "cache1", other))
    assert other.seen == 5  # other frames


def padded_photo(path, number):
    """A photograph in a file of 4,000 bytes."""
    content = make_photo(path, height=32, width=32, number=number).read_bytes()
    path.write_bytes(content.ljust(4000, b"\0"))
    assert path.stat().st_size == 4000
    return path


@pytest.fixture
def pictures(tmp_path):
    for number in range(4):
        padded_photo(tmp_path / "data" / "ab"[number % 2] / f"{number}.jpg", number)
    return tmp_path / "data"


def computed(data, cache):
    """How many clips of a source are computed, as the cache hasn't got them."""
    asked = Counting(size=16, grid=2)
    extract(asked, catalog_clips(str(data), frames=1, stride=1), batch=2, cache=cache_of(cache, asked))
    return asked.seen


def exchange(file, other):
    """Put other bytes of the same number in place of a file, with its times, as `cp -p` does."""
    before = file.stat()
    aside = file.with_name(".aside")
    aside.write_bytes(other.read_bytes())
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    aside.replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture(params=[60.0, -60.0], ids=["young files", "old files"])
def age(request, monkeypatch):
    """Files that have just been written, or that count as old ones."""
    monkeypatch.setattr(contents, "RECENT", request.param)


@pytest.mark.usefixtures("age")
def test_a_file_in_the_place_of_another_with_its_size_and_time_is_read_anew(pictures, tmp_path):
    assert computed(pictures, tmp_path / "cache") == 4
    assert computed(pictures, tmp_path / "cache") == 0
    exchange(pictures / "a" / "0.jpg", padded_photo(tmp_path / "other.jpg", 9))
    assert computed(pictures, tmp_path / "cache") == 4
    assert computed(pictures, tmp_path / "cache") == 0


@pytest.mark.usefixtures("age")
def test_rows_are_those_of_their_file(tmp_path):
    def write(name, numbers):
        photos = [padded_photo(tmp_path / f"{n}.jpg", n).read_bytes() for n in numbers]
        pq.write_table(pa.table({"image": photos, "label": ["a", "b"]}), tmp_path / name, compression="none")

    write("t.parquet", (0, 1))
    write("u.parquet", (0, 2))
    assert (tmp_path / "t.parquet").stat().st_size == (tmp_path / "u.parquet").stat().st_size
    assert computed(tmp_path / "t.parquet", tmp_path / "cache") == 2
    exchange(tmp_path / "t.parquet", tmp_path / "u.parquet")
    assert computed(tmp_path / "t.parquet", tmp_path / "cache") == 2
    assert computed(tmp_path / "t.parquet", tmp_path / "cache") == 0


def test_files_that_hold_the_same_are_not_computed_again_wherever_they_are(pictures, tmp_path):
    assert computed(pictures, tmp_path / "cache") == 4
    os.utime(pictures / "a" / "0.jpg", (0, 0))
    assert computed(pictures, tmp_path / "cache") == 0
    shutil.copytree(pictures, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert computed(tmp_path / "elsewhere", tmp_path / "cache") == 0


def test_only_files_with_new_stamps_or_young_ones_are_read(pictures, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(contents, "sha256_at", lambda path: read.append(path) or sha256_at(path))
    for recent, expected in ((60.0, 4), (60.0, 8), (-60.0, 12), (-60.0, 12)):  # young ones may change once more unseen
        monkeypatch.setattr(contents, "RECENT", recent)
        computed(pictures, tmp_path / "cache")
        assert len(read) == expected
    os.utime(pictures / "a" / "0.jpg", (0, 0))
    computed(pictures, tmp_path / "cache")
    assert len(read) == 16
    (tmp_path / "cache" / "known.json").write_text("damaged")
    assert computed(pictures, tmp_path / "cache") == 0
    assert len(read) == 20


def test_files_that_change_while_they_are_read_are_refused(pictures, tmp_path):
    class Writing(Counting):
        def features(self, frames):
            if not self.seen:
                self.write()
            return super().features(frames)

    def extracted(write):
        asked = Writing(size=16, grid=2)
        asked.write = write
        clips = catalog_clips(str(pictures), frames=1, stride=1)
        extract(asked, clips, batch=2, cache=cache_of(tmp_path / "cache", asked))

    file = pictures / "b" / "3.jpg"
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="its files changed while they were read; run the same command again"):
        extracted(lambda: padded_photo(file, 8))
    file.write_bytes(before)
    extracted(lambda: file.chmod(0o600))  # and none of what was made of the other one is left
    fresh = Counting(size=16, grid=2)
    clips = catalog_clips(str(pictures), frames=1, stride=1)
    found = extract(fresh, clips, batch=2, cache=cache_of(tmp_path / "cache", fresh))
    assert fresh.seen == 0
    equal(found, extract(fresh, clips, batch=2))


def test_files_at_urls_are_known_by_what_the_server_says_of_them(pictures, tmp_path):
    elsewhere = fsspec.filesystem("memory")
    for file in pictures.rglob("*.jpg"):
        elsewhere.pipe_file(f"/features/{file.parent.name}/{file.name}", file.read_bytes())
    assert computed("memory://features", tmp_path / "cache") == 4
    assert computed("memory://features", tmp_path / "cache") == 0
    elsewhere.pipe_file("/features/a/0.jpg", elsewhere.cat_file("/features/a/2.jpg"))
    assert computed("memory://features", tmp_path / "cache") == 4
    elsewhere.rm("/features", recursive=True)


def test_the_machine_has_a_folder_for_each_backbone(tmp_path, monkeypatch):
    monkeypatch.setenv("TOTO_CACHE", str(tmp_path))
    seen = []
    for grid in (2, 1, 2):
        asked = Counting(size=16, grid=grid, frames=2)
        extract(asked, CLIPS, batch=8, cache=cache_of("auto", asked))
        seen.append(asked.seen)
    assert seen == [20, 20, 0]
    assert len(list((tmp_path / "features").glob("*/cache.json"))) == 2


def test_features_stream_without_being_kept():
    blocks = list(stream_features(backbone(), CLIPS, batch=8))
    assert [len(block.labels) for block in blocks] == [8, 8, 4]
    assert [row.id for block in blocks for row in block.rows] == list(CLIPS.ids)
    with pytest.raises(ConfigError, match="must be at least 1, is 0"):
        next(stream_features(backbone(), CLIPS, batch=0))


def test_features_that_are_no_numbers_are_refused():
    class Broken(Counting):
        def features(self, frames):
            return {0: super().features(frames)[0] / 0}

    with pytest.raises(ConfigError, match="its features of layer 0 hold NaN or infinity"):
        extract(Broken(size=16, frames=2), CLIPS, batch=4)


def test_parquet_rows_with_class_names_are_labelled_images(tmp_path):
    photos = [make_photo(tmp_path / f"{n}.jpg", height=32, width=32, number=n).read_bytes() for n in range(6)]
    columns = {"image": photos, "label": [0, 2, 1, 0, 1, 2], "name": [f"n{n}" for n in range(6)]}
    table = pa.table(columns).replace_schema_metadata({"classes": "plane,car,bird"})
    pq.write_table(table, tmp_path / "train.parquet")
    clips = catalog_clips(str(tmp_path / "train.parquet"), frames=1, stride=1)
    assert (clips.modality, clips.classes) == ("image", ("plane", "car", "bird"))
    assert clips.labels == (0, 2, 1, 0, 1, 2)
    asked = Counting(size=16, grid=2)
    cache = cache_of(tmp_path / "cache", asked)
    assert extract(asked, clips, batch=4, cache=cache).features.labels.tolist() == list(clips.labels)
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["name"] == "pixels:16/2"


def test_what_memory_has_no_room_for_is_refused_before_it_is_computed(monkeypatch):
    monkeypatch.setattr("toto.evaluation.labelled.cpu_memory", lambda: 100_000)
    asked = backbone()
    with pytest.raises(ConfigError, match=r"need 0\.000246 GB of memory, there are 0\.0001 GB; keep them on disk"):
        extract(asked, CLIPS, batch=4)
    assert asked.seen == 4
