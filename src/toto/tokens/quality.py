"""How much of a picture survives a tokenizer, and how much of its vocabulary it uses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import pytorch_msssim  # type: ignore[import-untyped]
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.runtime.errors import MediaError
from toto.tokens.tokenizer import Tokenizer

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """What a tokenizer did to some frames.

    Attributes:
        psnr_db: mean over the frames of each frame's peak signal-to-noise ratio: the headline.
        psnr_of_mean_error_db: the ratio of the mean squared error over all frames, which the worst frames rule.
        ssim: mean over the frames of each frame's structural similarity; None where a side is shorter than its window.
        codes_used: how many different codes occur.
        share_used: `codes_used` divided by the vocabulary's size.
        perplexity: exp of the entropy of the codes' frequencies: how many equally frequent codes would be as varied.
        frames: how many frames there were.
        tokens: how many codes these became.
    """

    psnr_db: float
    psnr_of_mean_error_db: float
    ssim: float | None
    codes_used: int
    share_used: float
    perplexity: float
    frames: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How much of some frames came back.

    Attributes:
        frames: how many frames there were.
        psnr_db: mean over the frames of each frame's peak signal-to-noise ratio.
        psnr_of_mean_error_db: the ratio of the mean squared error over all frames, which the worst frames rule.
        ssim: mean over the frames of each frame's structural similarity; None where a side is shorter than its window.
    """

    frames: int
    psnr_db: float
    psnr_of_mean_error_db: float
    ssim: float | None


@final
class FidelityMeter:
    """Compares frames with what became of them, a few at a time."""

    def __init__(self) -> None:
        self._errors: list[Tensor] = []
        self._similarities: list[Tensor | None] = []

    def add(self, frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> None:
        """Compare some frames."""
        self._errors.append(squared_error(frames, others))
        self._similarities.append(ssim(frames, others))

    def fidelity(self) -> Fidelity:
        """The figures of all frames so far.

        Raises:
            MediaError: there were no frames.
        """
        if not self._errors:
            raise MediaError("no frames to compare", fix="give some")
        error = torch.cat(self._errors)
        similarities = [each for each in self._similarities if each is not None]
        return Fidelity(
            frames=len(error),
            psnr_db=float(ratio(error).mean()),
            psnr_of_mean_error_db=float(ratio(error.mean())),
            ssim=float(torch.cat(similarities).mean()) if len(similarities) == len(self._similarities) else None,
        )


def psnr(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, " T"]:
    """Peak signal-to-noise ratio of each frame in dB, over all pixels and channels; infinite where they are equal."""
    return ratio(squared_error(frames, others))


def squared_error(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, " T"]:
    """Mean squared error of each frame, in squared 8-bit levels."""
    return (frames.to(torch.int32) - others.to(torch.int32)).square().double().mean((1, 2, 3))


def ratio(error: Tensor) -> Tensor:
    """Squared errors as peak signal-to-noise ratios in dB."""
    return 10 * torch.log10(PEAK**2 / error)


def ssim(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, " T"] | None:
    """Structural similarity of each frame; None where a side is shorter than the window of 11 pixels.

    Wang et al. 2004: a Gaussian window of sigma 1.5, K = (0.01, 0.03), covariances divided by N, the mean over the
    windows that lie inside the frame and over R, G and B. scikit-image gives the same with `gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=255`.
    """
    if min(frames.shape[1:3]) < SSIM_WINDOW:
        return None
    # In float64, with a window of it: flat bright areas lose the fourth digit in float32.
    planes, other_planes = (each.cpu().permute(0, 3, 1, 2).double().contiguous() for each in (frames, others))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.softmax(-(offsets**2) / (2 * SSIM_SIGMA**2), dim=0).expand(3, 1, 1, -1)
    similarity: Tensor = pytorch_msssim.ssim(planes, other_planes, data_range=PEAK, size_average=False, win=window)
    return similarity


def code_use(counts: Tensor) -> tuple[int, float]:
    """How many codes occur, and their perplexity, from how often each one does."""
    shares = counts[counts > 0].double() / counts.sum()
    return len(shares), math.exp(-float((shares * shares.log()).sum()))


def reconstruction_report(tokenizer: Tokenizer, frames_iterable: Iterable[Tensor]) -> ReconstructionReport:
    """Encode and decode frames and compare.

    Args:
        tokenizer: what is looked at.
        frames_iterable: uint8 frames `[T, H, W, 3]`, clip by clip; sizes may differ between clips.

    Raises:
        MediaError: there are no frames.
    """
    meter = FidelityMeter()
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for frames in frames_iterable:
        codes = tokenizer.encode(frames)
        meter.add(frames.cpu(), tokenizer.decode(codes).cpu())
        counts += torch.bincount(codes.flatten().cpu(), minlength=tokenizer.vocab_size)
    fidelity = meter.fidelity()
    used, perplexity = code_use(counts)
    return ReconstructionReport(
        psnr_db=fidelity.psnr_db,
        psnr_of_mean_error_db=fidelity.psnr_of_mean_error_db,
        ssim=fidelity.ssim,
        codes_used=used,
        share_used=used / tokenizer.vocab_size,
        perplexity=perplexity,
        frames=fidelity.frames,
        tokens=int(counts.sum()),
    )
