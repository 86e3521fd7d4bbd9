"""The table of a run's losses: numbers of its rows, a record and a picture."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from toto.report.losses import loss_lines, read_losses, write_losses
from toto.runtime.errors import ConfigError
from toto.runtime.metrics import Metrics


@pytest.fixture
def run(tmp_path):
    """Ten rows of a run on two sources, the second of which joined at step 40; no frame beyond the second at first."""
    metrics = Metrics(tmp_path)
    for step in range(10, 101, 10):
        films, photos = 8.0 - step / 20 + (0.9 if step == 100 else 0), 9.0 - step / 50
        values = {
            "train/loss": films,
            "train/bits_per_token": films / math.log(2),
            "train/loss/source/films": films,
            "train/loss/modality/video": films,
            "train/tokens/source/films": 30.0 * step,
        }
        if step >= 40:
            values |= {"train/loss/source/photos": photos, "train/loss/modality/image": photos}
            values |= {"train/tokens/source/photos": 10.0 * step}
        metrics.write(step, values)
    metrics.write_positions(50, {"video": [8.0, 6.0, None, None, 0.5]})
    metrics.write_positions(100, {"video": [7.5, 4.0, 3.5, 3.25, 0.125], "image": [8.0, 8.0, 7.9, 7.8, None]})
    metrics.close()
    return tmp_path


def test_lines_are_first_last_and_best_of_the_rows(run):
    losses = read_losses(run)
    assert (losses.unit, losses.steps) == ("nats", 100)
    everything, video, image, films, photos = losses.lines
    assert [(line.kind, line.name) for line in losses.lines[1:]] == [
        ("modality", "video"),
        ("modality", "image"),
        ("source", "films"),
        ("source", "photos"),
    ]
    assert (everything.first, everything.last, everything.best, everything.best_step) == (7.5, 3.9, 3.5, 90)
    assert (films.first, films.last, films.tokens, films.share) == (7.5, 3.9, 3000, 0.75)
    assert films.last_bits == pytest.approx(3.9 / math.log(2))
    assert (photos.first, photos.last, photos.tokens, photos.share) == (8.2, 7.0, 1000, 0.25)
    assert video.tokens is image.tokens is None


def test_text_record_and_picture(run):
    text = "\n".join(loss_lines(write_losses(run)))
    assert "source films    7.500  3.900  3.500       90   5.627   3,000  75.0 %" in text
    assert "nats by frame of video sequences: 7.50 4.00 3.50 3.25, end 0.12" in text
    assert "nats by frame of image sequences: 8.00 8.00 7.90 7.80" in text
    record = json.loads((run / "losses.json").read_text())
    assert record["lines"][3]["name"] == "films"
    assert record["positions"][0]["video"] == [8.0, 6.0, None, None, 0.5]
    with Image.open(run / "losses.png") as picture:
        assert picture.size[0] > 2 * picture.size[1]


def test_pixels_have_no_bits_and_a_run_without_positions_one_panel(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, {"train/loss": 1.0, "train/loss/source/films": 1.0, "train/tokens/source/films": 9.0})
    metrics.close()
    losses = write_losses(tmp_path)
    assert losses.unit == "squared error"
    assert "bits" not in loss_lines(losses)[0]


def test_a_folder_without_losses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no losses"):
        read_losses(tmp_path)
