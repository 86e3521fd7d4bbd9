"""How much of a picture survives a tokenizer, and how much of its vocabulary it uses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.runtime.errors import MediaError
from toto.tokens.tokenizer import Tokenizer

PEAK = 255.0


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """What a tokenizer did to some frames.

    Attributes:
        psnr_db: mean over the frames of each frame's peak signal-to-noise ratio: the headline.
        psnr_of_mean_error_db: the ratio of the mean squared error over all frames, which the worst frames rule.
        codes_used: how many different codes occur.
        share_used: `codes_used` divided by the vocabulary's size.
        perplexity: exp of the entropy of the codes' frequencies: how many equally frequent codes would be as varied.
        frames: how many frames there were.
        tokens: how many codes these became.
    """

    psnr_db: float
    psnr_of_mean_error_db: float
    codes_used: int
    share_used: float
    perplexity: float
    frames: int
    tokens: int


def psnr(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, " T"]:
    """Peak signal-to-noise ratio of each frame in dB, over all pixels and channels; infinite where they are equal."""
    return ratio(squared_error(frames, others))


def squared_error(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, " T"]:
    """Mean squared error of each frame, in squared 8-bit levels."""
    return (frames.to(torch.int32) - others.to(torch.int32)).square().double().mean((1, 2, 3))


def ratio(error: Tensor) -> Tensor:
    """Squared errors as peak signal-to-noise ratios in dB."""
    return 10 * torch.log10(PEAK**2 / error)


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
    errors: list[Tensor] = []
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for frames in frames_iterable:
        codes = tokenizer.encode(frames)
        errors.append(squared_error(frames.cpu(), tokenizer.decode(codes).cpu()))
        counts += torch.bincount(codes.flatten().cpu(), minlength=tokenizer.vocab_size)
    if not errors:
        raise MediaError("no frames to reconstruct", fix="give some")
    error = torch.cat(errors)
    used, perplexity = code_use(counts)
    return ReconstructionReport(
        psnr_db=float(ratio(error).mean()),
        psnr_of_mean_error_db=float(ratio(error.mean())),
        codes_used=used,
        share_used=used / tokenizer.vocab_size,
        perplexity=perplexity,
        frames=len(error),
        tokens=int(counts.sum()),
    )
