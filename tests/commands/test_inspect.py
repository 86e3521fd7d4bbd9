"""`toto tokenizer inspect` on media and stores, with one tokenizer and with several."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import make_photo, make_store, make_video

from toto.__main__ import main
from toto.commands.inspect_tokenizer import Allowance, InspectOptions, Spread, evenly
from toto.runtime.errors import ConfigError
from toto.tokens.passport import Passport
from toto.tokens.quality import reconstruction_report
from toto.tokens.shards import TokenStore, read_ledger
from toto.tokens.tokenizer import load_tokenizer
from toto.tokens.vqvae import VQVAE, StackConfig, VQVAEConfig, VQVAETokenizer


def inspect(*words) -> int:
    return main(["tokenizer", "inspect", *map(str, words)])


def refused(capsys, *words, code=2) -> str:
    """The one line that a bad call prints."""
    capsys.readouterr()
    assert inspect(*words) == code
    (line,) = (row for row in capsys.readouterr().err.splitlines() if row.startswith("toto: "))
    return line


def figures(out) -> dict:
    return json.loads((out / "inspection.json").read_text())


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A random tokenizer of 16 codes, in a folder of the same name as the first one's."""
    stack = StackConfig(widths=(8, 8), hidden=(8, 8), blocks=(1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = VQVAE(VQVAEConfig(vocab_size=16, code_width=4, encoder=stack, decoder=stack))
        model.codebook.copy_(torch.nn.functional.normalize(torch.randn(16, 4), dim=-1))
    folder = tmp_path_factory.mktemp("other") / "small"
    VQVAETokenizer.from_model(model, trained={}).save(folder)
    return folder


@pytest.fixture(scope="module")
def broken_media(media_folder, tmp_path_factory):
    """The media, a damaged video, and a file that is neither image nor video."""
    folder = tmp_path_factory.mktemp("broken") / "media"
    shutil.copytree(media_folder, folder)
    (folder / "bad.mp4").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "manifest.json").write_text("of something else")
    return folder


def test_media_side_by_side(broken_media, tokenizer, tokenizer_folder, other_folder, tmp_path, capsys):
    out = tmp_path / "out"
    both = ["--tokenizer", tokenizer_folder, other_folder]
    assert inspect("--data", broken_media, *both, "--size", 32, "--stride", 8, "--out", out) == 0
    printed = capsys.readouterr()
    assert "looked at 38 of 38 frames of 10 items" in printed.out
    assert f"offered 13: 10 ok, 1 corrupt, 2 skipped (ledger: {out / 'ledger.parquet'})" in printed.out
    assert len(read_ledger(out)) == 13
    assert "bad.mp4: video can't be decoded" in printed.out
    assert tokenizer_folder.name in printed.out
    assert f"warning: {tokenizer_folder.name}: only 18 of 64 codes occur" in printed.err
    assert {path.name for path in out.iterdir()} == {"made.json", "inspection.json", "index.html", "ledger.parquet"}
    found = figures(out)
    assert (found["format"], found["version"]) == ("toto-inspection", 1)
    assert [each["name"] for each in found["tokenizers"]] == [tokenizer_folder.name, "small"]
    assert Passport.from_dict(found["tokenizers"][0]["passport"], where="") == tokenizer.passport
    (part,) = found["parts"]
    accounts = part["accounts"]
    assert [accounts[name] for name in ("offered", "read", "failed", "skipped", "beyond_limit")] == [13, 10, 1, 2, 0]
    assert (accounts["frames"], accounts["frames_available"]) == (38, 38)
    assert {row["id"] for row in accounts["unusable"]} == {"bad.mp4", "notes.txt", "manifest.json"}
    first, second = part["figures"]
    assert (first["codes"]["vocab_size"], second["codes"]["vocab_size"]) == (64, 16)
    for each in (first, second):
        assert each["codes"]["grid"] == [4, 4]
        assert each["codes"]["frame_pairs"] == 38 - 10
        assert 0 < each["fidelity"]["ssim"] < 1
        assert [grams["total"] for grams in each["codes"]["ngrams"]] == [38 * 16, 38 * 15, 38 * 14]
    assert first["fidelity"] != second["fidelity"]


def test_the_figures_are_those_of_the_report(tokenizer_folder, tmp_path):
    photos = torch.cat([_square(make_photo(tmp_path / "in" / f"{n}.jpg", number=n)) for n in range(3)])
    assert (
        inspect("--data", tmp_path / "in", "--tokenizer", tokenizer_folder, "--size", 32, "--out", tmp_path / "o") == 0
    )
    found = figures(tmp_path / "o")["parts"][0]["figures"][0]
    report = reconstruction_report(load_tokenizer(tokenizer_folder), [photos])
    assert found["fidelity"]["psnr_db"] == pytest.approx(report.psnr_db)
    assert found["fidelity"]["psnr_of_mean_error_db"] == pytest.approx(report.psnr_of_mean_error_db)
    assert found["codes"]["codes_used"] == report.codes_used
    assert found["codes"]["perplexity"] == pytest.approx(report.perplexity)
    assert found["codes"]["repeats"] is None
    assert max(map(max, found["codes"]["entropy_by_position"])) <= math.log2(3) + 1e-9


def _square(path) -> torch.Tensor:
    from toto.media.decode import read_media
    from toto.media.transforms import square

    return square(read_media(path).frames, 32)


def test_a_store_gives_its_own_codes(media_folder, tokenizer_folder, other_folder, tmp_path, capsys):
    shards = tmp_path / "shards"
    words = [
        "--tokenizer",
        str(tokenizer_folder),
        "--size",
        "32",
        "--stride",
        "8",
        "--min-frames",
        "2",
        "--workers",
        "0",
    ]
    assert main(["tokenize", str(media_folder), "--out", str(shards), *words]) == 0
    assert inspect("--data", shards, "--tokenizer", tokenizer_folder, "--out", tmp_path / "s") == 0
    assert "looked at 38 of 38 frames of 10 items" in capsys.readouterr().out
    assert inspect("--data", media_folder, "--tokenizer", tokenizer_folder, "--size", 32, "--stride", 8,
                   "--out", tmp_path / "m") == 0  # fmt: skip
    (of_store,), (of_media,) = figures(tmp_path / "s")["parts"], figures(tmp_path / "m")["parts"]
    assert of_store["figures"][0]["codes"] == of_media["figures"][0]["codes"]
    assert of_store["figures"][0]["fidelity"] is None
    assert (of_store["kind"], of_store["size"]) == ("shards", [32, 32])
    assert "PSNR" not in (tmp_path / "s" / "index.html").read_text()
    line = refused(capsys, "--data", shards, "--tokenizer", tokenizer_folder, other_folder, code=1)
    assert "tokenizer small: its tokens have weights_sha256" in line
    assert "give --tokenizer" in line
    assert inspect("--data", shards, "--tokenizer", tokenizer_folder, "--frames", 12) == 0
    assert "looked at 12 of 38 frames of 10 items (6 of them have more: raise --frames)" in capsys.readouterr().out


def test_a_store_of_codes_beyond_the_vocabulary_is_refused(tokenizer, tokenizer_folder, tmp_path, capsys):
    passport = Passport(**{**vars(tokenizer.passport), "frame_size": (24, 24), "grid": (3, 3)})
    store = TokenStore(make_store(tmp_path / "s", videos=(5,), passport=passport))
    codes = torch.from_numpy(store.frames(0, 5).copy())
    codes[2, 1, 1] = 64
    with (tmp_path / "s" / "frames-00000.npy").open("r+b") as file:
        file.seek(-codes.numel() * 2, 2)
        file.write(codes.numpy().tobytes())
    assert "the vocabulary has 64" in refused(capsys, "--data", tmp_path / "s", "--tokenizer", tokenizer_folder, code=1)


def test_few_frames_are_spread_over_the_items(media_folder, tokenizer_folder, capsys):
    words = ["--data", media_folder, "--tokenizer", tokenizer_folder, "--size", 16, "--stride", 8]
    assert inspect(*words, "--frames", 16) == 0
    assert "looked at 16 frames of 10 items (6 of them have more: raise --frames)" in capsys.readouterr().out
    assert inspect(*words, "--frames", 3) == 0
    printed = capsys.readouterr().out
    assert "looked at 3 frames of 3 items (" in printed
    assert "7 items were left out" in printed
    assert "offered 10: 3 ok, 7 skipped" in printed


def test_the_same_name_is_numbered_and_small_frames_have_no_ssim(tokenizer_folder, tmp_path, capsys):
    photo = make_photo(tmp_path / "a.jpg")
    words = ["--tokenizer", tokenizer_folder, tokenizer_folder, "--size", 8, "--out", tmp_path / "o"]
    assert inspect("--data", photo, *words) == 0
    found = figures(tmp_path / "o")
    assert [each["name"] for each in found["tokenizers"]] == [f"{tokenizer_folder.name} ({n})" for n in (1, 2)]
    assert found["parts"][0]["figures"][0]["fidelity"]["ssim"] is None
    assert found["parts"][0]["figures"][0] == found["parts"][0]["figures"][1] | {
        "tokenizer": f"{tokenizer_folder.name} (1)"
    }


def test_the_sample_is_looked_at_in_two_parts(tokenizer_folder, capsys):
    assert inspect("--tokenizer", tokenizer_folder, "--size", 16, "--frames", 14) == 0
    printed = capsys.readouterr().out
    assert "held-out scenes: looked at 14 frames of 14 items (14 of them have more" in printed
    assert "held-out scenes: offered 14: 14 ok\n" in printed
    assert "held-out photographs: looked at 8 of 8 frames of 8 items" in printed
    assert "held-out photographs: offered 8: 8 ok\n" in printed


def test_what_is_wrong_is_one_line(media_folder, tokenizer_folder, video_store, tmp_path, capsys):
    it = ["--tokenizer", tokenizer_folder]
    assert "no such file or folder" in refused(capsys, "--data", tmp_path / "no", *it)
    assert "no tokenizer here" in refused(capsys, "--tokenizer", tmp_path / "no", code=1)
    line = refused(capsys, "--data", media_folder, *it, "--size", 20)
    assert line.startswith(
        f"toto: --size, tokenizer {tokenizer_folder.name}: frames of 20 x 20 don't fit a grid of 8 x 8"
    )
    assert line.endswith("use sides that are multiples of 8")
    for option in ("frames", "stride", "size"):
        assert f"--{option}: must be at least 1, is 0" in refused(capsys, *it, f"--{option}", 0)
    assert "names no tokenizer" in refused(capsys, "--tokenizer")
    assert "weights_sha256" in refused(capsys, "--data", video_store, *it, code=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("x")
    line = refused(capsys, "--data", tmp_path / "bad", *it)
    assert "nothing could be read (the first: video can't be decoded" in line
    with pytest.raises(ConfigError, match="must be at least 1"):
        InspectOptions(frames=-1)


def test_the_output_of_another_job_is_left_alone(media_folder, tokenizer_folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "made.json").write_text('{"kind": "toto.commands.demo.Options"}')
    photo = media_folder / "slow" / "photo0.jpg"
    words = ["--data", photo, "--tokenizer", tokenizer_folder, "--size", 16, "--stride", 40]
    assert "another kind of job (toto.commands.demo.Options)" in refused(capsys, *words, "--out", other)
    assert [path.name for path in other.iterdir()] == ["made.json"]
    assert inspect(*words, "--out", tmp_path / "own") == 0
    assert inspect(*words, "--out", tmp_path / "own") == 0
    made = json.loads((tmp_path / "own" / "made.json").read_text())
    assert made["kind"] == "toto.commands.inspect_tokenizer.InspectOptions"
    assert made["config"]["stride"] == 40


def test_frames_that_come_back_unchanged_are_no_infinity_in_the_record(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        VQVAETokenizer, "encode", lambda self, frames: torch.zeros(len(frames), 2, 2, dtype=torch.int64)
    )
    monkeypatch.setattr(
        VQVAETokenizer, "decode", lambda self, codes: torch.zeros(len(codes), 16, 16, 3, dtype=torch.uint8)
    )
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    assert (
        inspect(
            "--data", tmp_path / "black.png", "--tokenizer", tokenizer_folder, "--size", 16, "--out", tmp_path / "o"
        )
        == 0
    )
    found = json.loads((tmp_path / "o" / "inspection.json").read_text(), parse_constant=pytest.fail)
    assert found["parts"][0]["figures"][0]["fidelity"]["psnr_db"] is None


def test_long_videos_leave_their_share_to_others():
    allowance = Allowance(20, ["video", "image", "video", "video"])
    assert allowance.next("video") == 6  # (20 - 1 image) // 3
    allowance.take(6)
    assert allowance.next("image") == 1
    allowance.take(1)
    assert allowance.next("video") == 6
    allowance.take(2)  # a short one
    assert allowance.next("video") == 11
    assert evenly(range(10), 4) == [1, 3, 6, 8]
    assert evenly(range(3), 4) == [0, 1, 2]


@pytest.mark.parametrize("total", [1, 3, 7, 100, 1001])
def test_shown_frames_lie_evenly_over_all(total):
    spread = Spread(3)
    for start in range(0, total, 5):
        spread.add(torch.arange(start, min(total, start + 5)))
    kept = spread.frames().tolist()
    assert len(kept) == min(3, total)
    if total > 20:
        assert kept == pytest.approx([total / 6, total / 2, total * 5 / 6], abs=total / 10)


def test_whether_a_video_has_more_is_known_without_reading_it_all(tokenizer_folder, tmp_path, capsys):
    video = make_video(tmp_path / "v.mp4", frames=40)
    words = ["--data", video, "--tokenizer", tokenizer_folder, "--size", 16, "--stride", 2]
    assert inspect(*words, "--frames", 20) == 0
    assert "looked at 20 of 20 frames of 1 items\n" in capsys.readouterr().out
    assert inspect(*words, "--frames", 19) == 0
    assert "looked at 19 frames of 1 items (1 of them have more: raise --frames)" in capsys.readouterr().out
