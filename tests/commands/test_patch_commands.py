"""Patch models from the shell: tokenize with pixels, train, stop, go on, measure, probe."""

from __future__ import annotations

import os
import signal

import pytest
from command_words import refused, run

from toto.evaluation.result import load_result
from toto.training import loop

SMALL = (
    "--steps", 6, "--batch", 2, "--micro-batch", 2, "--data.frames", 4, "--model.width", 32, "--model.layers", 2,
    "--model.heads", 2, "--model.mlp-hidden", 48, "--eval-every", 3, "--save-every", 3, "--log-every", 1,
    "--model.inputs", "patches", "--model.targets",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(media_folder, tokenizer_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("patches")
    words = ["tokenize", media_folder, "--tokenizer", tokenizer_folder, "--size", 32, "--min-frames", 4, "--workers", 0]
    assert run(*words, "--out", root / "kept", "--keep-pixels") == 0
    assert run(*words, "--out", root / "plain") == 0
    return root


def test_patch_patch_from_pixels_to_numbers(shards, media_folder, tmp_path, capsys, monkeypatch):
    kept, out = shards / "kept", tmp_path / "run"
    words = ["train", "nano", "--out", out, "--data", kept, f"image:{kept}", "--heldout", kept, *SMALL, "pixels"]
    step = loop._step

    def stop_at_three(state, stop):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, stop)

    monkeypatch.setattr(loop, "_step", stop_at_three)
    assert run(*words) == 130
    monkeypatch.setattr(loop, "_step", step)
    assert run(*words, "--resume") == 0
    assert "heldout/video_patch_error" in capsys.readouterr().out
    evaluate = ["evaluate", "patches", "--checkpoint", out, "--heldout"]
    assert run(*evaluate, kept, "--out", tmp_path / "patches.json") == 0
    assert "squared error of normalised patches" in capsys.readouterr().out
    assert load_result(tmp_path / "patches.json").metrics["mean_error"].value < 1
    assert run("evaluate", "probe", "--checkpoint", out, "--data", "procedural", "--procedural-clips", 12,
               "--probe.epochs", 1, "--probe.heads", 2, "--out", tmp_path / "probe.json") == 0  # fmt: skip
    assert len(load_result(tmp_path / "probe.json").details["by_layer"]) == 6
    line = refused(capsys, "evaluate", "bits", "--checkpoint", out, "--train", kept, "--heldout", kept)
    assert "predicts pixels, not codes; use `toto evaluate patches`" in line
    clip = media_folder / "slow" / "clip0.mp4"
    line = refused(capsys, "generate", "--checkpoint", out, "--prompt", clip, "--out", tmp_path / "made")
    assert "takes patches, so it can't continue a clip; use a model of token inputs" in line
    assert not (tmp_path / "made").exists()
    assert "--keep-pixels" in refused(capsys, *evaluate, shards / "plain")


def test_patch_codes_is_measured_in_bits(shards, tmp_path, capsys):
    kept, out = shards / "kept", tmp_path / "run"
    assert run("train", "nano", "--out", out, "--data", kept, "--heldout", kept, *SMALL, "codes") == 0
    assert "heldout/video_bits" in capsys.readouterr().out
    assert run("evaluate", "bits", "--checkpoint", out, "--train", kept, "--heldout", kept) == 0
    line = refused(capsys, "evaluate", "patches", "--checkpoint", out, "--heldout", kept)
    assert "use `toto evaluate bits`" in line


def test_what_cannot_be_trained_is_one_line(shards, tmp_path, capsys):
    words = ["train", "nano", "--out", tmp_path / "x", "--data", shards / "plain"]
    assert "make it again with `toto tokenize --keep-pixels`" in refused(capsys, *words, "--model.inputs", "patches")
    assert "set model.inputs to patches" in refused(capsys, *words, "--model.targets", "pixels")
    assert "no embedding to share" in refused(capsys, *words, "--model.inputs", "patches", "--model.tie-embeddings")
    assert not (tmp_path / "x").exists()
