"""Bits and baselines on codes whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_store

from toto.evaluation.likelihood import Baselines, fit_baselines, measure_bits, model_bits, spread_windows
from toto.evaluation.result import Metric, Result, bootstrap, load_result
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError, TotoError
from toto.tokens.sequence import pack
from toto.tokens.shards import TokenStore
from toto.training.source import SourceConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=36, width=32, layers=2, heads=2, mlp_hidden=48)).eval()


def test_model_bits_are_the_losses_of_the_visual_tokens(model, video_store):
    windows = spread_windows(SourceConfig(path=video_store, weight=1), frames=4, most=100)
    bits = model_bits(model, windows, batch=3, precision="fp32")
    assert bits.shape == (19, 4)
    sequence = pack(windows[5].codes[None], "video")
    logp = model(sequence[:, :-1]).logits.log_softmax(-1)[0]
    by_hand = -logp[torch.arange(36), sequence[0, 1:-1]].view(4, 9).mean(1) / math.log(2)
    torch.testing.assert_close(bits[5], by_hand.double(), atol=1e-5, rtol=1e-5)
    for batch in (1, 7, 64):
        other = model_bits(model, windows, batch=batch, precision="fp32")
        torch.testing.assert_close(other, bits, atol=1e-5, rtol=1e-5)


def test_baselines_are_distributions_with_the_most_likely_rate(tmp_path):
    store = TokenStore(make_store(tmp_path / "still", videos=(20, 9, 30), drift=0))
    fitted = fit_baselines([store])
    assert float(fitted.unigram.sum()) == pytest.approx(1)

    def cost(rate):
        moved = Baselines(unigram=fitted.unigram, copy_rate=rate)
        return sum(float(moved.bits(store.codes(number))[1].sum()) for number in range(len(store)))

    best = cost(fitted.copy_rate)
    assert 0 < fitted.copy_rate < 1
    assert all(cost(fitted.copy_rate + shift) >= best - 1e-6 for shift in (-0.02, -0.001, 0.001, 0.02))
    before = torch.zeros(1, 3, 3, dtype=torch.int64)
    total = sum(2 ** -fitted.bits(torch.cat([before, torch.full((1, 3, 3), code)]))[1][1, 0, 0] for code in range(32))
    assert float(total) == pytest.approx(1)


def test_copying_a_still_video_costs_nothing_and_a_single_frame_has_nothing_to_copy(tmp_path):
    store = TokenStore(make_store(tmp_path / "s", images=5))
    assert fit_baselines([store]).copy_rate == 0
    still = torch.randint(0, 32, (1, 3, 3)).expand(6, 3, 3)
    sure = Baselines(unigram=torch.full((32,), 1 / 32).double(), copy_rate=1 - 1e-6)
    unigram, copy = sure.bits(still)
    assert float(copy[1:].max()) < 1e-4
    assert copy[0].equal(unigram[0])
    assert float(unigram.mean()) == pytest.approx(5)


def test_summaries_separate_the_first_frame(model, video_store):
    windows = spread_windows(SourceConfig(path=video_store, weight=1), frames=4, most=3)
    assert len(windows) == 3
    found = measure_bits(model, windows, fit_baselines([TokenStore(video_store)]), precision="fp32")
    summary = found.summary()
    assert summary["copy_bits_first_frame"] == pytest.approx(summary["unigram_bits_first_frame"])
    assert summary["model_bits"] == pytest.approx(
        (summary["model_bits_first_frame"] + 3 * summary["model_bits_later_frames"]) / 4
    )
    with pytest.raises(ConfigError, match="no window"):
        model_bits(model, [])


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap((rng.random(80) < 0.3).astype(np.float64), seed=trial, draws=400)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199


def test_a_result_survives_its_file_and_refuses_another_version(tmp_path):
    result = Result(
        task="bits", protocol={"k": 1}, metrics={"a": Metric(value=1.0)}, offered=2, evaluated=1, failed=1,
        model_sha256="x", passport={},
    )  # fmt: skip
    result.save(tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == result
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(TotoError, match="not a result record"):
        load_result(tmp_path / "r.json")
