"""How the codes of many frames are distributed: over the vocabulary, beside each other, over the frame, over time.

The n-grams are those of the paper's tokenizer study (appendix, figures 12 and 13): windows of n codes in raster order
inside one image, so 256 codes have 256 1-grams, 255 2-grams and 254 3-grams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.grid import check_codes

ORDERS = (1, 2, 3)
KEY_BITS = 63
MERGE_AT = 1 << 20
CURVE_RANKS = 100
EXACT_COUNTS = 8

Keys = npt.NDArray[np.int64]
Map = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class NGrams:
    """Runs of `n` codes.

    Attributes:
        n: how many codes are in a run.
        total: how many runs there are.
        distinct: how many different ones.
        entropy_bits: of their frequencies.
        ranks: about 100 places, evenly on a logarithmic scale, in the order of the most frequent first, counted from 1;
            also where the lowest counts begin and end.
        counts: how often the run at each of these places occurs.
    """

    n: int
    total: int
    distinct: int
    entropy_bits: float
    ranks: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CodeStatistics:
    """How the codes of some frames are distributed.

    Attributes:
        frames: how many frames there are.
        tokens: how many codes these became.
        grid: rows and columns of a frame's codes.
        vocab_size: how many different codes there could be.
        codes_used: how many different codes occur.
        share_used: `codes_used` divided by `vocab_size`.
        entropy_bits: entropy of the codes' frequencies.
        perplexity: 2 to the power of it: how many equally frequent codes would be as varied.
        ngrams: runs of 1, 2 and 3 codes.
        entropy_by_position: bits, for each cell over the frames; at most log2 of the number of frames.
        frame_pairs: how many frames have a frame before them in the same item.
        repeats: share of these frames' codes that equal the code at the same cell of the frame before; None where
            there are no such frames.
        repeats_by_position: the same for each cell.
    """

    frames: int
    tokens: int
    grid: tuple[int, int]
    vocab_size: int
    codes_used: int
    share_used: float
    entropy_bits: float
    perplexity: float
    ngrams: tuple[NGrams, ...]
    entropy_by_position: Map
    frame_pairs: int
    repeats: float | None
    repeats_by_position: Map | None


@final
class KeyCounts:
    """How often each of many whole numbers occurs, exactly; memory grows with how many different ones there are."""

    def __init__(self, merge_at: int = MERGE_AT):
        self._merge_at = merge_at
        self._keys: Keys = np.empty(0, np.int64)
        self._counts: Keys = np.empty(0, np.int64)
        self._waiting: list[Keys] = []
        self._waiting_size = 0

    def add(self, keys: Keys) -> None:
        """Count some numbers."""
        self._waiting.append(keys.ravel())
        self._waiting_size += keys.size
        if self._waiting_size >= max(self._merge_at, len(self._keys)):
            self._merge()

    def counted(self) -> tuple[Keys, Keys]:
        """The different numbers in ascending order, and how often each occurs."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        if self._waiting_size:
            fresh, fresh_counts = np.unique(np.concatenate(self._waiting), return_counts=True)
            both = np.concatenate([self._keys, fresh])
            order = np.argsort(both, kind="stable")
            both, counts = both[order], np.concatenate([self._counts, fresh_counts])[order]
            first = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1]]))
            self._keys, self._counts = both[first], np.add.reduceat(counts, first)
        self._waiting, self._waiting_size = [], 0


@final
class CodeCounter:
    """Counts codes item by item; all frames have one grid.

    Raises:
        ConfigError: runs of three codes of such a vocabulary don't fit 63 bits.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._bits = max(1, (vocab_size - 1).bit_length())
        if max(ORDERS) * self._bits > KEY_BITS:
            most = 1 << KEY_BITS // max(ORDERS)
            raise ConfigError(
                f"{max(ORDERS)}-grams of {vocab_size:,} codes can't be counted",
                where="tokenizer",
                fix=f"use a vocabulary of at most {most:,} codes",
            )
        self._ngrams = {n: KeyCounts() for n in ORDERS}
        self._cells = KeyCounts()
        self._grid: tuple[int, int] | None = None
        self._frames = self._pairs = 0
        self._equal: Keys = np.empty(0, np.int64)

    def add(self, codes: Int64[Tensor, "T rows cols"]) -> None:
        """Count the codes of an item's frames, all of them at once and in their order."""
        check_codes(codes, self.vocab_size, where="codes to count")
        frames, rows, cols = codes.shape
        if self._grid is None:
            self._grid, self._equal = (rows, cols), np.zeros(rows * cols, np.int64)
        if self._grid != (rows, cols):
            raise ValueError(f"codes on a grid of {(rows, cols)} after codes on a grid of {self._grid}")
        flat = codes.cpu().numpy().reshape(frames, rows * cols)
        for n, counts in self._ngrams.items():
            counts.add(pack(flat, n, self._bits))
        self._cells.add((np.arange(rows * cols) << self._bits) | flat)
        self._equal += (flat[1:] == flat[:-1]).sum(axis=0)
        self._frames += frames
        self._pairs += max(0, frames - 1)

    def statistics(self) -> CodeStatistics:
        """The figures of all codes so far; there must be some."""
        if self._grid is None or not self._frames:
            raise ValueError("no codes were counted")
        ngrams = tuple(_ngrams(n, counts.counted()[1]) for n, counts in self._ngrams.items())
        single, repeats = ngrams[0], self._equal / max(1, self._pairs)
        return CodeStatistics(
            frames=self._frames,
            tokens=single.total,
            grid=self._grid,
            vocab_size=self.vocab_size,
            codes_used=single.distinct,
            share_used=single.distinct / self.vocab_size,
            entropy_bits=single.entropy_bits,
            perplexity=2**single.entropy_bits,
            ngrams=ngrams,
            entropy_by_position=self._map(self._entropy_by_cell()),
            frame_pairs=self._pairs,
            repeats=float(repeats.mean()) if self._pairs else None,
            repeats_by_position=self._map(repeats) if self._pairs else None,
        )

    def _entropy_by_cell(self) -> npt.NDArray[np.float64]:
        """Bits at each cell: the log of the frames, less the mean log of how often each code occurs there."""
        keys, counts = self._cells.counted()
        logs = np.bincount(keys >> self._bits, weights=counts * np.log2(counts), minlength=len(self._equal))
        bits: npt.NDArray[np.float64] = np.maximum(0.0, np.log2(self._frames) - logs / self._frames)
        return bits

    def _map(self, values: npt.NDArray[np.float64]) -> Map:
        assert self._grid is not None
        return tuple(tuple(float(value) for value in row) for row in values.reshape(self._grid))


def pack(codes: Keys, n: int, bits: int) -> Keys:
    """Every run of `n` neighbours in each row of codes `[F, S]` as one number, `bits` for each code.

    >>> pack(np.array([[1, 2, 3], [4, 5, 6]]), 2, 8) == np.array([[258, 515], [1029, 1286]])
    array([[ True,  True],
           [ True,  True]])
    """
    runs = max(0, codes.shape[1] - n + 1)
    keys = np.zeros((len(codes), runs), np.int64)
    for place in range(n):
        keys = (keys << bits) | codes[:, place : place + runs]
    return keys


def entropy_bits(counts: Keys) -> float:
    """Entropy in bits of frequencies that are given as counts above 0."""
    shares = counts / max(1, counts.sum())
    return max(0.0, -float((shares * np.log2(shares)).sum()))


def curve_ranks(counts: Keys) -> Keys:
    """Places of a descending list of counts, from 1, that draw its curve.

    They are even on a logarithmic scale; the ends of each run of equal low counts are among them, so the steps at the
    curve's foot stay upright.
    """
    if not len(counts):
        return np.empty(0, np.int64)
    even = np.geomspace(1, len(counts), CURVE_RANKS).round().astype(np.int64)
    lasts = np.array([np.searchsorted(-counts, -low, side="right") for low in range(1, EXACT_COUNTS + 1)])
    ranks = np.unique(np.concatenate([even, lasts, lasts + 1]))
    return ranks[(ranks >= 1) & (ranks <= len(counts))]


def _ngrams(n: int, counts: Keys) -> NGrams:
    falling = np.sort(counts)[::-1]
    ranks = curve_ranks(falling)
    return NGrams(
        n=n,
        total=int(counts.sum()),
        distinct=len(counts),
        entropy_bits=entropy_bits(counts),
        ranks=tuple(ranks.tolist()),
        counts=tuple(falling[ranks - 1].tolist()),
    )
