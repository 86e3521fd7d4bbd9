"""The command line as a person meets it: every verb runs, and everything bad is one line and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import PASSPORT, make_store

from toto.__main__ import VERBS, main
from toto.evaluation.result import load_result
from toto.tokens.passport import Passport


@pytest.fixture(scope="module")
def shards(media_folder, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "shards"
    words = ["tokenize", media_folder, "--out", out, "--tokenizer", tokenizer_folder]
    assert run(*words, "--size", 32, "--min-frames", 4, "--workers", 0) == 0
    return out


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert run("train", "nano", "--out", out, "--data", f"{shards}=0.8", f"image:{shards}=0.2", *SMALL) == 0
    return out


SMALL = (
    "--heldout", "@", "--steps", 6, "--batch", 2, "--micro-batch", 2, "--data.frames", 4, "--model.width", 32,
    "--model.layers", 2, "--model.heads", 2, "--model.mlp-hidden", 48, "--eval-every", 3, "--save-every", 3,
    "--log-every", 1,
)  # fmt: skip


def run(*words):
    """Run a verb in this process; `@` stands for the first shard folder named before it."""
    texts = [str(word) for word in words]
    first = next((text.split("=")[0] for text in texts if text.endswith(("shards", "=0.8"))), "")
    return main([first if text == "@" else text for text in texts])


def refused(capsys, *words, code=(1, 2)):
    """The one line that a bad call prints."""
    capsys.readouterr()
    assert run(*words) in code
    printed = capsys.readouterr().err.strip()
    line = printed.splitlines()[-1]
    assert line.startswith("toto: ")
    assert "Traceback" not in printed
    assert sum(row.startswith("toto: ") for row in printed.splitlines()) == 1
    return line


def test_tokenizing_prints_the_ledger_and_the_reasons(media_folder, tokenizer_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.mp4").write_text("x")
    (tmp_path / "in" / "good.jpg").write_bytes((media_folder / "slow" / "photo0.jpg").read_bytes())
    words = ["--tokenizer", tokenizer_folder, "--size", 32, "--workers", 0]
    assert run("tokenize", tmp_path / "in", "--out", tmp_path / "out", *words) == 0
    printed = capsys.readouterr().out
    assert f"offered 2: 1 ok, 1 corrupt (ledger: {tmp_path / 'out' / 'ledger.parquet'})" in printed
    assert "bad.mp4: video can't be decoded" in printed


def test_training_evaluating_and_generating_from_the_shell(trained, shards, media_folder, tokenizer_folder, tmp_path):
    names = {path.name for path in (trained / "checkpoints").iterdir()}
    assert names == {"step-00000003", "step-00000006"}
    assert run("evaluate", "bits", "--checkpoint", trained, "--train", shards, "--heldout", shards,
               "--out", tmp_path / "bits.json") == 0  # fmt: skip
    assert load_result(tmp_path / "bits.json").metrics["unigram_bits"].value > 0
    assert run("evaluate", "probe", "--checkpoint", trained, "--data", "procedural", "--procedural-clips", 12,
               "--probe.epochs", 2, "--probe.heads", 2, "--tokenizer", tokenizer_folder,
               "--out", tmp_path / "probe.json") == 0  # fmt: skip
    probe = load_result(tmp_path / "probe.json")
    assert len(probe.details["by_layer"]) == 6
    assert probe.metrics["chance"].value == pytest.approx(1 / 6)
    for prompt in (["--prompt", media_folder / "slow" / "clip0.mp4", "--prompt-frames", 2],
                   ["--prompt", media_folder / "slow" / "photo0.jpg"], []):  # fmt: skip
        out = tmp_path / f"made{len(prompt)}"
        assert run("generate", "--checkpoint", trained, "--out", out, "--frames", 3, "--samples", 2,
                   "--tokenizer", tokenizer_folder, *prompt) == 0  # fmt: skip
        made = {path.name for path in out.iterdir()}
        read = {"ledger.parquet"} if prompt else set()
        assert made == {"made.json"} | read | {f"sample-{n}.{end}" for n in (0, 1) for end in ("mp4", "gif", "png")}
    folder_probe = ["--data", media_folder, "--tokenizer", tokenizer_folder, "--probe.epochs", 1, "--probe.heads", 2]
    assert run("evaluate", "probe", "--checkpoint", trained, *folder_probe) == 2  # images and videos mixed


def test_a_finished_run_resumes_to_the_same_end(trained, shards, capsys):
    words = ["train", "nano", "--out", trained, "--data", f"{shards}=0.8", f"image:{shards}=0.2", *SMALL]
    assert "add --resume" in refused(capsys, *words)
    assert run(*words, "--resume") == 0
    assert "another run" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as leave:
        main([verb, "--help"])
    assert leave.value.code == 0
    assert "usage: toto" in capsys.readouterr().out


def test_words_that_make_no_sense(capsys, tmp_path, shards):
    assert "no such verb; verbs: demo" in refused(capsys, "dance")
    assert "unknown recipe 'giant'; known: demo" in refused(capsys, "train", "giant")
    line = refused(capsys, "train", "nano", "--out", tmp_path / "x", "--data", shards, "--stps", 3)
    assert "Unrecognized options: --stps" in line
    assert "perhaps you meant --steps" in line
    assert "invalid literal" in refused(
        capsys, "train", "nano", "--out", tmp_path / "x", "--data", shards, "--steps", "x"
    )
    assert "--out" in refused(capsys, "train", "nano")
    assert "weight 'much' is not a number" in refused(
        capsys, "train", "nano", "--out", tmp_path / "x", "--data", f"{shards}=much"
    )
    assert "unknown task" in refused(capsys, "evaluate", "iq")
    assert not (tmp_path / "x").exists()


def test_paths_and_files_that_are_not_what_they_should_be(
    capsys, tmp_path, trained, shards, tokenizer_folder, media_folder
):
    nowhere = tmp_path / "nowhere"
    assert "no such file or folder" in refused(capsys, "tokenize", nowhere, "--out", tmp_path / "x",
                                               "--tokenizer", tokenizer_folder)  # fmt: skip
    assert "no such shard folder" in refused(capsys, "train", "nano", "--out", tmp_path / "x", "--data", nowhere)
    generate = ["generate", "--out", tmp_path / "x", "--tokenizer", tokenizer_folder, "--checkpoint"]
    assert "no such checkpoint" in refused(capsys, *generate, nowhere)
    assert "no such file" in refused(capsys, *generate, trained, "--prompt", tmp_path / "no.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    assert "can't be decoded" in refused(capsys, *generate, trained, "--prompt", tmp_path / "text.mp4")
    assert "--frames: must be at least 1" in refused(capsys, *generate, trained, "--frames", 0)
    assert "--top-p" in refused(capsys, *generate, trained, "--top-p", 2)
    assert "no tokenizer here" in refused(capsys, "generate", "--out", tmp_path / "x", "--checkpoint", trained,
                                          "--tokenizer", nowhere)  # fmt: skip
    assert "can't use this device" in refused(capsys, *generate, trained, "--device", "abacus")
    assert not (tmp_path / "x").exists()
    before = (trained / "made.json").read_text()
    over = ["generate", "--checkpoint", trained, "--out", trained, "--frames", 1, "--tokenizer", tokenizer_folder]
    assert "another kind of job" in refused(capsys, *over)
    assert (trained / "made.json").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    assert "holds no run" in refused(capsys, "train", "nano", "--out", tmp_path / "mine", "--data", shards, *SMALL)


def test_strangers_are_refused_by_name(capsys, tmp_path, trained, shards):
    other = make_store(tmp_path / "s", videos=(9,), passport=Passport(**{**vars(PASSPORT), "kind": "vqgan"}))
    line = refused(capsys, "evaluate", "bits", "--checkpoint", trained, "--train", shards, "--heldout", other)
    assert "kind vqgan" in line
    assert "kind vqvae" in line
    generate = ["generate", "--checkpoint", trained, "--out", tmp_path / "x"]
    assert "weights_sha256" in refused(capsys, *generate, "--tokenizer", "embedded")


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path, media_folder, tokenizer_folder):
    (tmp_path / "file").write_text("in the way")
    words = ["tokenize", media_folder, "--tokenizer", tokenizer_folder, "--size", 32, "--workers", 0]
    assert "not a directory" in refused(capsys, *words, "--out", tmp_path / "file" / "out")


def test_the_module_runs_and_debug_shows_the_traceback(tmp_path):
    def call(*words):
        return subprocess.run([sys.executable, "-m", "toto", *words], capture_output=True, text=True, check=False)

    assert call("--version").stdout.startswith("toto ")
    bad = call("tokenize", str(tmp_path / "no"), "--out", str(tmp_path / "x"))
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    assert "Traceback" in call("tokenize", str(tmp_path / "no"), "--out", str(tmp_path / "x"), "--debug").stderr


def test_the_record_of_a_run_says_what_made_it(trained):
    made = json.loads((trained / "made.json").read_text())
    assert made["config"]["steps"] == 6
    assert {"kind", "command", "started", "versions", "machine", "config"} == set(made)
