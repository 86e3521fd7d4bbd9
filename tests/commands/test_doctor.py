"""`toto doctor`: it finds what is wrong, says nothing where nothing is, and estimates what tokenizing then takes."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter

import pytest
from conftest import make_photo, make_video

from toto.__main__ import main
from toto.commands import doctor
from toto.commands.doctor import DoctorOptions, evenly, examine
from toto.media.catalog import Item
from toto.media.checks import Checked, duplicates_inside, read_speed, similar_labels
from toto.tokens.extract import TokenizeConfig, tokenize


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(doctor, "ENCODED_SECONDS", 0.0)


def diagnose(*words):
    return main(["doctor", *map(str, words)])


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """A folder with one of everything that can be wrong."""
    root = tmp_path_factory.mktemp("sick")
    for number in range(3):
        make_video(root / "yawning" / f"{number}.mp4", number=number, frames=20 + 4 * number)
    shutil.copy(root / "yawning" / "0.mp4", root / "yawning" / "twin.mp4")
    make_video(root / "Yawning" / "s.mp4", frames=5, number=5)
    make_video(root / "Yawning" / "t.mp4", frames=30, number=6)
    make_photo(root / "other" / "long.jpg", height=32, width=400)
    (root / "yawning" / "bad.mp4").write_text("no video")
    (root / "yawning" / "notes.txt").write_text("x")
    return root


def by_name(report):
    return {finding["what"]: finding for finding in report["findings"]}


def test_everything_wrong_is_found_and_the_exit_code_says_so(sick, tmp_path, tokenizer_folder, capsys):
    out = tmp_path / "report.json"
    words = ("--tokenizer", tokenizer_folder, "--size", 48, "--min-frames", 4, "--workers", 0, "--out", out)
    assert diagnose(sick, *words) == 1
    report = json.loads(out.read_text())
    found = by_name(report)
    assert {name for name, finding in found.items() if finding["problem"]} == {
        "unreadable", "short", "duplicate", "label spelled in two ways",
    }  # fmt: skip
    assert found["unreadable"]["examples"][0].startswith("yawning/bad.mp4: video can't be decoded")
    assert found["short"]["examples"] == ["Yawning/s.mp4: 2 frames at stride 4, fewer than 4"]
    assert found["duplicate"]["examples"] == ["yawning/twin.mp4: the same bytes as yawning/0.mp4"]
    assert found["label spelled in two ways"]["examples"] == ["'Yawning' (2) and 'yawning' (5)"]
    assert found["class of one item"]["examples"] == ["other"]
    assert found["not media"]["count"] == 1
    assert found["smaller than --size"]["examples"] == ["other/long.jpg: 400 x 32"]
    assert found["long and narrow"]["count"] == 1
    assert report["ledger"]["counts"] == {"ok": 5, "short": 1, "duplicate": 1, "corrupt": 1, "skipped": 1}
    assert {row["id"] for row in report["ledger"]["rows"]} == {
        "Yawning/s.mp4", "yawning/twin.mp4", "yawning/bad.mp4", "yawning/notes.txt",
    }  # fmt: skip
    assert report["codecs"]["h264"]["items"] == 6
    assert report["codecs"]["h264"]["frames_per_second"] > 1
    assert report["codecs"]["jpeg"]["items"] == 1
    printed = capsys.readouterr().out
    assert "problems found: unreadable, short, duplicate, label spelled in two ways" in printed
    assert "yawning/bad.mp4" in printed
    assert f"offered 9: 5 ok, 1 short, 1 duplicate, 1 corrupt, 1 skipped (ledger: {out})" in printed
    assert "tokens" in printed


def test_a_healthy_source_is_fine_and_the_estimate_is_what_tokenizing_makes(
    media_folder, tmp_path, tokenizer_folder, capsys
):
    options = {"tokenizer": str(tokenizer_folder), "size": 32, "min_frames": 4}
    report = examine(DoctorOptions(source=media_folder, workers=0, **options))
    assert report["problems"] == 0
    assert not report["findings"]
    store = tokenize(TokenizeConfig(source=media_folder, out=tmp_path / "out", workers=0, **options))
    assert report["estimate"]["frames"] == store.frame_count
    assert report["estimate"]["tokens"] == store.frame_count * store.grid[0] * store.grid[1]
    assert report["estimate"]["storage_bytes"] == 2 * report["estimate"]["tokens"]
    assert report["estimate"]["items"] == len(store)
    doctor.print_report(report)
    assert "nothing wrong found" in capsys.readouterr().out


def test_manifests_and_containers(tmp_path, tokenizer_folder):
    make_video(tmp_path / "v.mp4", frames=60)
    rows = [{"path": "v.mp4", "start": 0, "end": 2}, {"path": "v.mp4", "start": 1, "end": 3}, {"path": "gone.mp4"}]
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": str(tokenizer_folder), "size": 32, "min_frames": 4, "workers": 0}
    report = examine(DoctorOptions(source=tmp_path / "w.jsonl", **options))
    assert by_name(report)["missing"]["examples"] == ["gone.mp4: missing: no file " + f"{tmp_path}/gone.mp4 (line 3)"]
    assert report["estimate"]["frames"] == 12
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.mp4", "b.mp4"):
            tar.add(tmp_path / "v.mp4", name)
    report = examine(DoctorOptions(source=tmp_path / "s.tar", **options))
    assert by_name(report)["duplicate"]["examples"] == ["s.tar/b.mp4: the same bytes as s.tar/a.mp4"]
    assert report["form"] == "webdataset"


def start_and_crash(config):
    doctor._start_worker(config)
    doctor.check_unit = lambda *_: os._exit(9)


def test_a_crash_is_an_unreadable_item(tmp_path, tokenizer_folder, monkeypatch):
    make_photo(tmp_path / "in" / "a.jpg")
    monkeypatch.setattr(doctor, "Workers", lambda _start, *rest, **options: Pool(start_and_crash, *rest, **options))
    report = examine(DoctorOptions(source=tmp_path / "in", tokenizer=str(tokenizer_folder), size=32, workers=1))
    assert by_name(report)["unreadable"]["examples"] == ["a.jpg: the decoder crashed (exit code 9)"]


Pool = doctor.Workers


def test_a_full_disk_is_a_problem(tmp_path, tokenizer_folder, monkeypatch):
    make_photo(tmp_path / "a.jpg")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Full())
    report = examine(DoctorOptions(source=tmp_path, tokenizer=str(tokenizer_folder), size=32, workers=0))
    assert report["findings"][0]["what"] == "disk"
    assert "32 B, 5 B are free" in report["findings"][0]["examples"][0]


class Full:
    free = 5


def test_a_sample_is_spread_evenly(tmp_path):
    items = tuple(Item(id=str(n), path=tmp_path, kind="image", label=None) for n in range(10))
    assert [item.id for item in evenly(items, 3)] == ["0", "3", "6"]
    assert evenly(items, 0) == evenly(items, 99) == items


def test_labels_that_may_be_one_class():
    counts = Counter({"eating cake": 40, "eating_cake": 3, "juggling": 100, "jugling": 2, "jugglers": 90, "clip10": 1})
    counts.update({"clip11": 50, "cut": 50, "cub": 1})
    assert similar_labels(counts) == [("eating cake", "eating_cake"), ("jugling", "juggling")]


def test_twins_inside_containers():
    checked = [Checked(id=id, kind="image", sha256=sha) for id, sha in (("a", "1"), ("b", ""), ("c", "1"), ("d", ""))]
    assert duplicates_inside(checked) == {"c": "a"}


def test_reading_is_measured_where_there_is_enough(tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    assert read_speed([tmp_path / "small", tmp_path / "nowhere"]) is None
    (tmp_path / "large").write_bytes(b"x" * 2_000_000)
    assert read_speed([tmp_path / "large"]) > 0


@pytest.mark.parametrize("words", [["--sample", -1], ["--workers", -1], ["--time-limit", -1], ["--size", 0]])
def test_bad_options_are_one_line(media_folder, capsys, words):
    assert diagnose(media_folder, *words) == 2
    assert capsys.readouterr().err.startswith(f"toto: {words[0]}: must be")
