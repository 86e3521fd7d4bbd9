"""What a tokenizer in training does to held-out frames, and the warning where its vocabulary collapses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from toto.runtime.progress import say
from toto.tokens.quality import ReconstructionReport, reconstruction_report
from toto.tokens.tokenizer import Tokenizer


def evaluate(tokenizer: Tokenizer, heldout: Mapping[str, Tensor]) -> dict[str, ReconstructionReport]:
    """What the tokenizer does to each kind of held-out frames."""
    return {name: reconstruction_report(tokenizer, [frames]) for name, frames in heldout.items()}


def flat(look: Mapping[str, ReconstructionReport]) -> dict[str, float]:
    """Held-out figures by the names metrics have."""
    return {
        f"heldout/{name}/{key}": float(value)
        for name, report in look.items()
        for key, value in dataclasses.asdict(report).items()
        if value is not None
    }


def rounded(report: ReconstructionReport) -> dict[str, float]:
    """Figures with as many digits as `tokenizer.json` shows."""
    return {key: round(value, 4) for key, value in dataclasses.asdict(report).items() if value is not None}


def warn_of_collapse(
    look: Mapping[str, ReconstructionReport], vocab_size: int, below: float, step: int, remedy: str
) -> None:
    """Say so where less than a share `below` of the vocabulary is in use, with a remedy.

    The kind of frames that uses most of it counts, and only where there are as many tokens as codes.
    """
    name, best = max(look.items(), key=lambda item: item[1].share_used)
    if best.share_used < below and best.tokens >= vocab_size:
        say(f"warning: step {step}: only {best.codes_used:,} of {vocab_size:,} codes occur in {name}; {remedy}")
