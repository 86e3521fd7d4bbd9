"""The demo as a stranger runs it, with few steps: killed in the middle, continued, and whole at its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import numpy as np
import torch

from toto.evaluation.result import load_result
from toto.media.decode import read_media
from toto.runtime.metrics import read_metrics
from toto.tokens.shards import TokenStore


def test_the_demo_is_killed_continues_and_leaves_a_self_contained_page(tmp_path):
    out = tmp_path / "demo"
    words = [sys.executable, "-m", "toto", "demo", "--out", str(out), "--steps", "30", "--views", "1", "--clips", "24"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and len(read_metrics(out / "model")) < 1:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 130, printed
    assert "stopped by SIGTERM" in printed
    assert not (out / "index.html").exists()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(out / "model") if "train/loss" in row] == [10, 20, 30]

    page = (out / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # "#" points into the page itself
    assert page.count("data:video/mp4") == 3
    assert page.count("<svg") == 4
    assert "Blender Foundation" in page
    assert load_result(out / "bits.json").metrics["copy_bits_later_frames"].value > 0
    assert load_result(out / "probe-motion.json").evaluated == 8
    assert len(load_result(out / "probe-bar.json").protocol["classes"]) == 3
    assert len(read_media(out / "continuation-009.mp4")) == 16
    for name in ("scenes-train", "photographs-train", "scenes-heldout"):
        store = TokenStore(out / "shards" / name)
        store.verify()
        assert store.grid == (8, 8)


def test_the_embedded_tokenizer_keeps_heldout_scenes_and_photographs_recognisable():
    import toto
    from toto.media import sample
    from toto.media.transforms import square
    from toto.tokens.quality import psnr

    tokenizer = toto.load_tokenizer()
    found = {}
    for name, paths in (("scenes", sample.scenes("heldout")), ("photographs", sample.photographs("heldout"))):
        frames = torch.cat([square(read_media(path, stride=96).frames, 128) for path in paths])
        found[name] = float(np.mean(psnr(frames, tokenizer.decode(tokenizer.encode(frames))).numpy()))
    assert found["scenes"] > 25
    assert found["photographs"] > 22.5
