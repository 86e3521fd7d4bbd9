"""Code statistics against counting by hand, and SSIM against scikit-image."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from toto.runtime.errors import ConfigError, MediaError, PassportError
from toto.tokens.quality import FidelityMeter, psnr, ssim
from toto.tokens.statistics import CodeCounter, KeyCounts, curve_ranks, entropy_bits, pack


def random_codes(frames: int, rows: int, cols: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Codes whose frequencies differ: small ones are more frequent, and many repeat the frame before."""
    rng = np.random.default_rng(seed)
    codes = np.minimum(rng.geometric(4 / vocabulary, (frames, rows, cols)) - 1, vocabulary - 1)
    for frame in range(1, frames):
        codes[frame] = np.where(rng.random((rows, cols)) < 0.4, codes[frame - 1], codes[frame])
    return torch.from_numpy(codes)


def count(*items: torch.Tensor, vocabulary: int):
    counter = CodeCounter(vocabulary)
    for codes in items:
        counter.add(codes)
    return counter.statistics()


def bits(counts) -> float:
    whole = sum(counts)
    return -sum(each / whole * math.log2(each / whole) for each in counts)


@pytest.mark.parametrize("vocabulary", [5, 64, 65536])
def test_ngrams_are_those_of_a_naive_count(vocabulary):
    items = [random_codes(frames, 3, 4, vocabulary, seed) for seed, frames in enumerate((6, 1, 9))]
    found = count(*items, vocabulary=vocabulary)
    frames = [frame.flatten().tolist() for codes in items for frame in codes]
    for grams in found.ngrams:
        naive = Counter(tuple(frame[at : at + grams.n]) for frame in frames for at in range(12 - grams.n + 1))
        falling = sorted(naive.values(), reverse=True)
        assert (grams.total, grams.distinct) == (16 * (13 - grams.n), len(naive))
        assert [falling[rank - 1] for rank in grams.ranks] == list(grams.counts)
        assert (grams.ranks[0], grams.ranks[-1]) == (1, len(naive))
        assert grams.entropy_bits == pytest.approx(bits(naive.values()))
    assert (found.frames, found.tokens, found.grid) == (16, 192, (3, 4))
    assert found.codes_used == found.ngrams[0].distinct
    assert found.share_used == found.codes_used / vocabulary
    assert found.perplexity == pytest.approx(2**found.entropy_bits)


def test_an_image_of_256_codes_has_255_pairs_and_254_triples_and_windows_stay_inside_it():
    found = count(torch.arange(512).reshape(2, 16, 16), vocabulary=65536)
    assert [grams.total for grams in found.ngrams] == [512, 510, 508]
    assert [grams.distinct for grams in found.ngrams] == [512, 510, 508]
    pairs = pack(np.arange(8).reshape(2, 4), 2, 8)
    assert (pairs >> 8).tolist() == [[0, 1, 2], [4, 5, 6]]
    assert (pairs & 255).tolist() == [[1, 2, 3], [5, 6, 7]]


def test_keys_are_counted_exactly_over_many_merges():
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 50, rng.integers(0, 40)) for _ in range(60)]
    counts = KeyCounts(merge_at=16)
    for chunk in chunks:
        counts.add(chunk)
    keys, numbers = counts.counted()
    naive = Counter(np.concatenate(chunks).tolist())
    assert dict(zip(keys.tolist(), numbers.tolist(), strict=True)) == naive
    assert keys.tolist() == sorted(naive)
    assert [len(each) for each in KeyCounts().counted()] == [0, 0]


def test_entropy_by_position_is_that_of_each_cell():
    codes = random_codes(40, 3, 4, 9)
    found = count(codes[:15], codes[15:], vocabulary=9)
    for row in range(3):
        for col in range(4):
            cell = Counter(codes[:, row, col].tolist())
            assert found.entropy_by_position[row][col] == pytest.approx(bits(cell.values()))
            assert found.entropy_by_position[row][col] <= math.log2(40)
    still = count(torch.zeros(7, 2, 2, dtype=torch.int64), vocabulary=9)
    assert still.entropy_by_position == ((0.0, 0.0), (0.0, 0.0))
    assert (still.entropy_bits, still.perplexity, still.repeats) == (0.0, 1.0, 1.0)
    different = count(torch.arange(8)[:, None, None].expand(8, 2, 2), vocabulary=9)
    assert np.allclose(different.entropy_by_position, 3.0)
    assert entropy_bits(np.array([1, 1, 2])) == pytest.approx(1.5)


def test_repeats_count_neighbouring_frames_of_one_item_only():
    codes = random_codes(12, 3, 4, 64)
    found = count(codes[:5], codes[5:11], codes[11:], vocabulary=64)
    pairs = [frame for frame in range(1, 11) if frame != 5]
    equal = torch.stack([codes[frame] == codes[frame - 1] for frame in pairs]).double()
    assert found.frame_pairs == len(pairs)
    assert found.repeats == pytest.approx(float(equal.mean()))
    assert np.allclose(found.repeats_by_position, equal.mean(0))
    images = count(*codes.split(1), vocabulary=64)
    assert (images.frame_pairs, images.repeats, images.repeats_by_position) == (0, None, None)


def test_grids_with_less_than_three_cells_have_no_triples():
    found = count(torch.tensor([[[3, 4]], [[3, 4]]]), vocabulary=8)
    assert [(grams.total, grams.distinct) for grams in found.ngrams] == [(4, 2), (2, 1), (0, 0)]
    assert found.ngrams[2].ranks == ()
    assert found.ngrams[2].entropy_bits == 0


def test_curves_keep_their_ends_and_the_steps_of_low_counts():
    counts = np.array([1000, *[7] * 300, *[2] * 5000, *[1] * 90_000])
    ranks = curve_ranks(counts)
    assert {1, 2, 301, 302, 5301, 5302, 95_301} <= set(ranks.tolist())
    assert len(ranks) < 120
    assert (np.diff(ranks) > 0).all()


def test_what_cannot_be_counted_is_refused():
    counter = CodeCounter(64)
    with pytest.raises(PassportError, match="run from 0 to 64"):
        counter.add(torch.tensor([[[0, 64]]]))
    with pytest.raises(ValueError, match="no codes"):
        counter.statistics()
    counter.add(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="grid"):
        counter.add(torch.zeros(1, 3, 2, dtype=torch.int64))
    CodeCounter(1 << 21)
    with pytest.raises(ConfigError, match="3-grams of 2,097,153 codes can't be counted; use"):
        CodeCounter((1 << 21) + 1)


def frames_and_others() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, smooth pictures, and flat bright ones that float32 gets wrong."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 24, 40, 3))
    ramp = np.broadcast_to(np.linspace(0, 255, 40)[None, :, None], (2, 24, 40, 3))
    flat = np.full((1, 24, 40, 3), 251)
    frames = np.concatenate([noise, ramp, flat])
    others = (frames + rng.integers(-20, 20, frames.shape)).clip(0, 255)
    others[-1] = 254
    return torch.from_numpy(frames.astype(np.uint8)), torch.from_numpy(others.astype(np.uint8))


def test_ssim_is_skimages():
    frames, others = frames_and_others()
    theirs = [
        structural_similarity(
            a.numpy(), b.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255,
            channel_axis=2,
        )
        for a, b in zip(frames, others, strict=True)
    ]  # fmt: skip
    ours = ssim(frames, others)
    assert ours is not None
    assert ours.tolist() == pytest.approx(theirs, abs=1e-6)
    assert ssim(frames, frames).tolist() == pytest.approx([1.0] * 5)
    assert ssim(frames[:, :10], others[:, :10]) is None
    assert ssim(frames[:, :11, :11], others[:, :11, :11]) is not None


def test_the_meter_means_over_all_frames():
    frames, others = frames_and_others()
    meter = FidelityMeter()
    with pytest.raises(MediaError, match="no frames"):
        meter.fidelity()
    meter.add(frames[:3], others[:3])
    meter.add(frames[3:], others[3:])
    found = meter.fidelity()
    assert found.frames == 5
    assert found.psnr_db == pytest.approx(float(psnr(frames, others).mean()))
    assert found.psnr_of_mean_error_db <= found.psnr_db
    assert found.ssim == pytest.approx(float(ssim(frames, others).mean()))
    small = FidelityMeter()
    small.add(frames[:, :8], others[:, :8])
    assert small.fidelity().ssim is None
