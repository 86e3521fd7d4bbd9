"""The token grid: the codes of a clip, with the passport of who made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from toto.runtime.errors import PassportError
from toto.tokens.passport import Passport


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Codes of T frames on a grid of rows x cols cells; validates itself on creation.

    Attributes:
        codes: int64 `[T, rows, cols]`, each in `0 .. passport.vocab_size - 1`.
        passport: the tokenizer's passport, with frame size and grid.
        source: id of the item the frames came from.
    """

    codes: Int64[Tensor, "T rows cols"]
    passport: Passport
    source: str

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.codes.dtype != torch.int64:
            raise PassportError(f"codes are {describe(self.codes)}, not int64 [T, rows, cols]", where=self.source)
        if self.passport.grid != tuple(self.codes.shape[1:]):
            grid = tuple(self.codes.shape[1:])
            raise PassportError(
                f"codes lie on a grid of {grid}, the passport says {self.passport.grid}", where=self.source
            )
        check_codes(self.codes, self.passport.vocab_size, where=self.source)

    def __repr__(self) -> str:
        return f"TokenGrid({describe(self.codes)}, source={self.source!r})"


def check_codes(codes: Tensor, vocab_size: int, *, where: str) -> None:
    """Refuse codes outside `0 .. vocab_size - 1`."""
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < vocab_size):
        low, high = int(codes.min()), int(codes.max())
        raise PassportError(f"codes run from {low} to {high}, the vocabulary has {vocab_size}", where=where)


def describe(tensor: Tensor) -> str:
    """A tensor's dtype and shape, not its values."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
