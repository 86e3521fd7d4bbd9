"""Tokenizing: every input accounted for, the same bytes however the work is done."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_photo, make_video
from PIL import Image

from toto.__main__ import main
from toto.media import transforms
from toto.media.decode import read_media
from toto.media.transforms import square
from toto.runtime.errors import ConfigError, InterruptedRunError, MediaError, TotoError
from toto.tokens import encoding, extract, parallel
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.fsq import FSQ, FSQConfig, FSQTokenizer
from toto.tokens.shards import TokenStore, read_ledger
from toto.tokens.vqvae import StackConfig


def config(source, out, tokenizer_folder, **options):
    options = {"size": 32, "min_frames": 4, "workers": 0} | options
    return TokenizeConfig(source=source, out=out, tokenizer=str(tokenizer_folder), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "made.json"}


def test_store_holds_the_tokenizers_codes_of_every_item(media_folder, tmp_path, tokenizer, tokenizer_folder):
    store = tokenize(config(media_folder, tmp_path / "out", tokenizer_folder))
    assert len(store) == 10
    assert store.passport == tokenizer.at(32, 32)
    assert store.manifest["classes"] == ["fast", "slow"]
    assert store.manifest["ledger"] == {"ok": 10}
    for number in range(len(store)):
        item = store.item(number)
        frames = read_media(media_folder / item.id, stride=4 if item.kind == "video" else 1).frames
        assert item.frame_count == len(frames)
        assert store.codes(number).equal(tokenizer.encode(square(frames, 32)))
        assert item.label == item.id.split("/")[0]
        assert item.stride == 4
    store.verify()


def test_frames_take_two_bytes_a_token(media_folder, tmp_path, tokenizer_folder):
    store = tokenize(config(media_folder, tmp_path / "out", tokenizer_folder))
    size = sum(path.stat().st_size for path in store.folder.glob("frames-*.npy"))
    assert size <= 2 * store.frame_count * 16 + 128 * len(store.manifest["shards"])


def test_same_bytes_at_any_number_of_workers(media_folder, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(extract, "BYTES_IN_SHARD", 30_000)
    alone = tokenize(config(media_folder, tmp_path / "alone", tokenizer_folder))
    tokenize(config(media_folder, tmp_path / "pool", tokenizer_folder, workers=2))
    assert len(alone.manifest["shards"]) > 1
    assert contents(tmp_path / "alone") == contents(tmp_path / "pool")


def test_every_input_has_a_ledger_row(tmp_path, tokenizer_folder, monkeypatch):
    source = tmp_path / "source"
    make_video(source / "good.mp4")
    make_video(source / "short.mp4", frames=5)
    shutil.copy(source / "good.mp4", source / "twin.mp4")
    (source / "text.mp4").write_text("this is not a video\n" * 100)
    (source / "zero.mp4").write_bytes(b"")
    (source / "cut.mp4").write_bytes((source / "good.mp4").read_bytes()[:-3000])
    shutil.copy(source / "cut.mp4", source / "cut_too.mp4")
    (source / "notes.txt").write_text("hello")
    Image.new("RGB", (1, 1)).save(source / "dot.png")
    Image.new("RGB", (200_000, 8)).save(source / "narrow.png")
    make_photo(source / "photo.jpg")
    (source / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    monkeypatch.setattr(transforms, "MAX_PIXELS", 2_000_000)
    store = tokenize(config(source, tmp_path / "out", tokenizer_folder))
    found = {row.id: row.status for row in read_ledger(store.folder)}
    assert found == {
        "good.mp4": "ok",
        "photo.jpg": "ok",
        "short.mp4": "short",
        "dot.png": "short",
        "twin.mp4": "duplicate",
        "text.mp4": "corrupt",
        "zero.mp4": "corrupt",
        "cut.mp4": "corrupt",
        "cut_too.mp4": "corrupt",
        "narrow.png": "corrupt",
        "gone.mp4": "corrupt",
        "notes.txt": "skipped",
    }
    reasons = {row.id: row.reason for row in read_ledger(store.folder) if row.status != "ok"}
    assert all(reasons.values())
    assert reasons["cut_too.mp4"] == "the same bytes as cut.mp4, which is corrupt"
    assert store.table.column("id").to_pylist() == ["good.mp4", "photo.jpg"]


def test_views_are_different_crops_of_the_same_item(tmp_path, tokenizer_folder):
    make_photo(tmp_path / "source" / "wide.jpg", height=40, width=160)
    store = tokenize(config(tmp_path / "source", tmp_path / "out", tokenizer_folder, views=3))
    assert store.table.column("id").to_pylist() == ["wide.jpg", "wide.jpg#1", "wide.jpg#2"]
    assert not store.codes(0).equal(store.codes(1))
    assert store.manifest["ledger"] == {"ok": 1}


def test_a_second_run_finds_the_store_finished(media_folder, tmp_path, tokenizer_folder, monkeypatch):
    job = config(media_folder, tmp_path / "out", tokenizer_folder)
    tokenize(job)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "plan.json").write_text("{}")  # as after a kill between the manifest and the tidying
    monkeypatch.setattr(parallel, "encode", lambda *_, **__: pytest.fail("read again"))
    tokenize(job)
    assert contents(tmp_path / "out") == before


def test_another_job_in_the_same_folder_is_refused(media_folder, tmp_path, tokenizer_folder):
    tokenize(config(media_folder, tmp_path / "out", tokenizer_folder))
    with pytest.raises(ConfigError, match=r"another job .different: stride"):
        tokenize(config(media_folder, tmp_path / "out", tokenizer_folder, stride=2))
    make_photo(tmp_path / "other" / "a.jpg")
    (tmp_path / "other" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        tokenize(config(media_folder, tmp_path / "other", tokenizer_folder))


def test_nothing_usable_is_an_error_that_names_the_first_reason(tmp_path, tokenizer_folder):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.mp4").write_text("no")
    with pytest.raises(MediaError, match=r"nothing could be used .*ledger\.parquet"):
        tokenize(config(tmp_path / "source", tmp_path / "out", tokenizer_folder))
    assert read_ledger(tmp_path / "out")[0].status == "corrupt"
    with pytest.raises(TotoError, match="unfinished"):
        TokenStore(tmp_path / "out")


@pytest.mark.parametrize("options", [{"size": 30}, {"stride": 0}, {"views": 0}, {"workers": -1}, {"time_limit": 0}])
def test_bad_options_are_refused(media_folder, tmp_path, tokenizer_folder, options):
    with pytest.raises(TotoError):
        tokenize(config(media_folder, tmp_path / "out", tokenizer_folder, **options))
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_sources_are_refused(tmp_path, tokenizer_folder):
    with pytest.raises(ConfigError, match="no such file or folder"):
        tokenize(config(tmp_path / "nowhere", tmp_path / "out", tokenizer_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it is empty"):
        tokenize(config(tmp_path / "empty", tmp_path / "out", tokenizer_folder))


def test_a_signal_stops_between_items_and_the_same_call_continues(
    media_folder, tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(extract, "BYTES_IN_SHARD", 30_000)
    expected = tokenize(config(media_folder, tmp_path / "whole", tokenizer_folder))
    encode, calls = parallel.encode, []

    def encode_then_stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments, **options)

    monkeypatch.setattr(parallel, "encode", encode_then_stop)
    with pytest.raises(InterruptedRunError, match="continue"):
        tokenize(config(media_folder, tmp_path / "out", tokenizer_folder))
    assert not (tmp_path / "out" / "manifest.json").exists()
    tokenize(config(media_folder, tmp_path / "out", tokenizer_folder))
    assert contents(tmp_path / "out") == contents(expected.folder)


def test_kill_9_loses_doubles_and_changes_nothing(tmp_path, tokenizer_folder):
    for number in range(24):
        make_video(tmp_path / "source" / f"{number:02d}.mp4", number=number, frames=60)
    whole = config(tmp_path / "source", tmp_path / "whole", tokenizer_folder)
    script = (
        "import sys; from pathlib import Path; from toto.tokens import extract\n"
        "extract.BYTES_IN_SHARD = 60_000\n"
        "extract.tokenize(extract.TokenizeConfig(source=Path(sys.argv[1]), out=Path(sys.argv[2]),"
        " tokenizer=sys.argv[3], size=32, min_frames=4, workers=0))"
    )

    def run(out):
        words = [sys.executable, "-c", script, str(whole.source), str(out), str(tokenizer_folder)]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    assert run(whole.out).wait() == 0
    out = tmp_path / "killed"
    kills = 0
    for parts in (1, 3, 6):
        process = run(out)
        while process.poll() is None and len(list(out.glob("parts/*.json"))) < parts:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert run(out).wait() == 0
    assert contents(out) == contents(whole.out)


def test_more_codes_than_two_bytes_hold(tmp_path, media_folder):
    stack = StackConfig(widths=(8, 8), hidden=(8, 8), blocks=(1, 1))
    model = FSQ(FSQConfig(levels=(41, 41, 41), encoder=stack, decoder=stack))
    FSQTokenizer.from_model(model, trained={}).save(tmp_path / "many")
    with pytest.raises(ConfigError, match="has 68,921 codes, a store holds at most 65,536"):
        tokenize(TokenizeConfig(source=media_folder, out=tmp_path / "out", tokenizer=str(tmp_path / "many")))


def test_windows_of_a_video_are_tokenized_in_one_pass(tmp_path, tokenizer, tokenizer_folder, monkeypatch):
    make_video(tmp_path / "long.mp4", frames=120)
    rows = [{"path": "long.mp4", "start": start, "end": start + 4, "label": f"c{start % 2}"} for start in (5, 0, 3)]
    rows += [{"path": "long.mp4", "start": 99}, {"path": "gone.mp4", "label": "c2"}]
    source = tmp_path / "windows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    passes, stream_unit = [], encoding.stream_unit
    monkeypatch.setattr(encoding, "stream_unit", lambda *a, **k: passes.append(a) or stream_unit(*a, **k))
    store = tokenize(config(source, tmp_path / "out", tokenizer_folder, keep_pixels=True))
    assert len(passes) == 1
    assert store.table.column("id").to_pylist() == ["long.mp4@0-4", "long.mp4@3-7", "long.mp4@5-9"]
    assert store.manifest["classes"] == ["c0", "c1", "c2"]
    assert store.manifest["job"]["form"] == "jsonl"
    frames = read_media(tmp_path / "long.mp4").frames
    for number, start in enumerate((0, 36, 60)):
        squares = square(frames[start : start + 48 : 4], 32)
        assert store.codes(number).equal(tokenizer.encode(squares))
        assert store.pixels(number).equal(squares)
    assert {row.id: row.status for row in read_ledger(store.folder) if row.status != "ok"} == {
        "long.mp4@99-": "short",
        "gone.mp4": "corrupt",
    }
    views = tokenize(config(source, tmp_path / "views", tokenizer_folder, views=2))
    assert len(views) == 6
    assert views.codes(0).equal(store.codes(0))
    tokenize(config(source, tmp_path / "pool", tokenizer_folder, views=2, workers=1))
    assert contents(tmp_path / "pool") == contents(tmp_path / "views")


def containers(folder):
    """A tar of photographs and videos, and a parquet file of photographs, with what they hold."""
    make_video(folder / "v.mp4")
    members = {f"{n}.jpg": make_photo(folder / f"{n}.jpg", number=n).read_bytes() for n in range(4)}
    members |= {"4.mp4": (folder / "v.mp4").read_bytes(), "5.jpg": b"damaged"}
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, content in members.items():
            for part, data in ((name, content), (f"{name[0]}.cls", str(20 - int(name[0])).encode())):
                info = tarfile.TarInfo(part)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = {"image": [{"bytes": members[f"{n}.jpg"], "path": None} for n in (0, 1, 2, 3, 5)], "label": [0, 1, 1, 0, 0]}
    names = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    table = pa.table(rows | {"split": ["a", "a", "b", "b", "b"]}).replace_schema_metadata(
        {"huggingface": json.dumps(names)}
    )
    pq.write_table(table, folder / "t.parquet", row_group_size=2)
    return members


@pytest.mark.parametrize("name", ["s.tar", "t.parquet"])
def test_containers_give_the_same_bytes_at_any_number_of_workers(
    tmp_path, tokenizer, tokenizer_folder, name, monkeypatch, capsys
):
    containers(tmp_path)
    monkeypatch.setattr(extract, "IMAGES_IN_SHARD", 2)
    alone = tokenize(config(tmp_path / name, tmp_path / "alone", tokenizer_folder))
    tokenize(config(tmp_path / name, tmp_path / "pool", tokenizer_folder, workers=2))
    assert contents(tmp_path / "alone") == contents(tmp_path / "pool")
    assert len(alone.manifest["shards"]) > 1
    photo = tokenizer.encode(square(read_media(tmp_path / "0.jpg").frames, 32))
    assert alone.codes(0).equal(photo)
    counts = {"ok": 5, "corrupt": 1} if name == "s.tar" else {"ok": 4, "corrupt": 1}
    assert alone.manifest["ledger"] == counts
    if name == "s.tar":
        assert alone.manifest["classes"] == ["15", "16", "17", "18", "19", "20"]
        assert alone.codes(4).equal(tokenizer.encode(square(read_media(tmp_path / "v.mp4", stride=4).frames, 32)))
        return
    assert alone.manifest["classes"] == ["zebra", "ant"]
    assert alone.table.column("label").to_pylist() == ["zebra", "ant", "ant", "zebra"]
    splits = pq.read_table(alone.folder / "splits.parquet").to_pylist()
    assert [row["split"] for row in splits] == ["a", "a", "b", "b"]
    again = ["tokenize", tmp_path / name, "--out", alone.folder, "--tokenizer", tokenizer_folder, "--size", 32]
    assert main([str(word) for word in [*again, "--min-frames", 4]]) == 0
    assert "2 classes, in their order: zebra, ant\nsplits: a 2, b 2\n" in capsys.readouterr().out
    part = tokenize(config(tmp_path / name, tmp_path / "part", tokenizer_folder, split="a"))
    assert len(part) == 2
    with pytest.raises(ConfigError, match=r"another job .different: .*split"):
        tokenize(config(tmp_path / name, tmp_path / "part", tokenizer_folder, split="b"))


def test_a_stopped_run_over_a_container_continues_to_the_same_bytes(tmp_path, tokenizer_folder, monkeypatch):
    containers(tmp_path)
    monkeypatch.setattr(extract, "IMAGES_IN_SHARD", 1)
    whole = tokenize(config(tmp_path / "s.tar", tmp_path / "whole", tokenizer_folder))
    write, parts = extract._write_part, []

    def write_then_die(*arguments):
        parts.append(write(*arguments))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return parts[-1]

    monkeypatch.setattr(extract, "_write_part", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        tokenize(config(tmp_path / "s.tar", tmp_path / "out", tokenizer_folder, workers=1))
    monkeypatch.setattr(extract, "_write_part", write)
    tokenize(config(tmp_path / "s.tar", tmp_path / "out", tokenizer_folder))
    assert contents(tmp_path / "out") == contents(whole.folder)


START = parallel._start


def start_with_a_bad_decoder(job):
    """A worker whose decoder dies on some files, as the C code below it can."""
    START(job)
    decode = encoding.stream_item

    def read(item, **options):
        if "segfault" in item.id:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in item.id:
            time.sleep(3600)
        if "memory" in item.id:
            os.kill(os.getpid(), signal.SIGKILL)
        if "mistake" in item.id:
            raise RuntimeError("a mistake")
        return decode(item, **options)

    encoding.stream_item = read


def start_and_die(_job):
    os._exit(3)


def test_a_decoder_that_dies_or_hangs_costs_its_item_alone(tmp_path, tokenizer_folder, monkeypatch):
    source = tmp_path / "source"
    for number, name in enumerate(("a", "b-segfault", "d", "e-hang", "f")):
        make_photo(source / f"{name}.jpg", number=number)
    monkeypatch.setattr(parallel, "_start", start_with_a_bad_decoder)
    store = tokenize(config(source, tmp_path / "two", tokenizer_folder, workers=2, time_limit=1.0))
    found = {row.id: (row.status, row.reason) for row in read_ledger(store.folder) if row.status != "ok"}
    assert found == {
        "b-segfault.jpg": ("corrupt", "the decoder crashed (SIGSEGV)"),
        "e-hang.jpg": ("corrupt", "took longer than 1 s"),
    }
    assert store.table.column("id").to_pylist() == ["a.jpg", "d.jpg", "f.jpg"]
    tokenize(config(source, tmp_path / "one", tokenizer_folder, workers=1, time_limit=1.0))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_workers_that_others_kill_and_mistakes_end_the_run(tmp_path, tokenizer_folder, monkeypatch):
    make_photo(tmp_path / "memory" / "memory.jpg")
    make_photo(tmp_path / "mistake" / "mistake.jpg")
    monkeypatch.setattr(parallel, "_start", start_with_a_bad_decoder)
    with pytest.raises(TotoError, match=r"killed .SIGKILL, 3 times at .*fewer --workers"):
        tokenize(config(tmp_path / "memory", tmp_path / "out", tokenizer_folder, workers=1))
    with pytest.raises(RuntimeError, match="a mistake"):
        tokenize(config(tmp_path / "mistake", tmp_path / "out2", tokenizer_folder, workers=1))
    monkeypatch.setattr(parallel, "_start", start_and_die)
    with pytest.raises(TotoError, match=r"crashed .exit code 3. as it started"):
        tokenize(config(tmp_path / "memory", tmp_path / "out3", tokenizer_folder, workers=1))
