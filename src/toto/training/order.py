"""Whose turn it is: the source of every sequence of a mixture, and which of its draws it takes.

Sources take turns in blocks: in a block each source has exactly its share of the places, in an order shuffled anew
for every block. Weights may change at given sequences; blocks then begin anew, and a source's draws go on counting:

    sequence   0 1 2 3 4 5 6 | 7 8 9 ...       weights 1 : 1, from sequence 7 on 1 : 2
    source     a b|b a|a b|b | b a b|...       a block of 2, the last one cut short; then blocks of 3
    draw       0 0 1 1 2 2 3 | 4 3 5 ...       of each source, without a gap or a repeat

Nothing is remembered: source and draw are a function of the seed, the weights so far and the sequence's number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from toto.runtime.errors import ConfigError
from toto.runtime.seed import integer
from toto.training.permutation import Numbers, drawn

LARGEST_BLOCK = 10_000


def block_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Places of each source in a block: the smallest whole numbers in the ratio of the weights.

    >>> block_shares([0.2, 0.1, 0.1, 0.6])
    (2, 1, 1, 6)
    >>> block_shares([0.5, 0.5, 0])
    (1, 1, 0)
    """
    total = Fraction(sum(weights)).limit_denominator(1000)
    parts = [Fraction(weight).limit_denominator(1000) / (total or 1) for weight in weights]
    whole = [int(part * math.lcm(*(part.denominator for part in parts))) for part in parts]
    shares = tuple(count // (math.gcd(*whole) or 1) for count in whole)
    lost = any(not share and weight for share, weight in zip(shares, weights, strict=True))
    if lost or not 0 < sum(shares) <= LARGEST_BLOCK:
        raise ConfigError(
            f"weights {list(weights)} have no simple ratio", where="data.sources", fix="use rounder weights"
        )
    return shares


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """A stretch of sequences with the same weights.

    Attributes:
        first: its first sequence.
        shares: places of each source in a block.
        key: of the blocks' orders.
        before: draws that each source has had before.
    """

    first: int
    shares: Numbers
    key: int
    before: Numbers

    def locate(self, offsets: Numbers) -> tuple[Numbers, Numbers]:
        """Sources and draws of the sequences `first + offsets`."""
        length = int(self.shares.sum())
        block, place = offsets // length, offsets % length
        blocks, row = np.unique(block, return_inverse=True)
        sources, turns = self._blocks(blocks)
        source = sources[row, place]
        return source, self.before[source] + block * self.shares[source] + turns[row, place]

    def after(self, count: int) -> Numbers:
        """Draws that each source has had when `count` sequences of this phase are through."""
        full, rest = divmod(count, int(self.shares.sum()))
        sources, _ = self._blocks(np.array([full]))
        begun: Numbers = np.bincount(sources[0, :rest], minlength=len(self.shares))
        return self.before + full * self.shares + begun

    def _blocks(self, blocks: Numbers) -> tuple[Numbers, Numbers]:
        """The source at each place of some blocks, and how many of the same source stand before it in its block."""
        places = np.repeat(np.arange(len(self.shares)), self.shares)
        keys = drawn(self.key, blocks[:, None], np.arange(len(places))[None])
        sources = places[np.argsort(keys, axis=1, kind="stable")]
        turns: Numbers = np.zeros(sources.shape, np.int64)
        for source in range(len(self.shares)):
            here = sources == source
            turns[here] = (np.cumsum(here, axis=1) - 1)[here]
        return sources, turns


class Turns:
    """The source and draw of every sequence.

    Args:
        phases: (first sequence, weights of all sources) of each stretch, in rising order, the first at sequence 0.
        seed: of the blocks' orders.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], *, seed: int):
        self._phases: list[_Phase] = []
        before: Numbers = np.zeros(len(phases[0][1]), np.int64)
        for (first, weights), (end, _) in itertools.pairwise([*phases, (None, ())]):
            assert first is not None
            phase = _Phase(
                first=first,
                shares=np.array(block_shares(weights), np.int64),
                key=integer(seed, "block", first),
                before=before,
            )
            self._phases.append(phase)
            before = before if end is None else phase.after(end - first)
        self._firsts = np.array([phase.first for phase in self._phases])

    def locate(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The source of each sequence `[N]`, and which draw of this source it is `[N]`."""
        which = np.searchsorted(self._firsts, numbers, side="right") - 1
        sources, draws = np.empty_like(numbers), np.empty_like(numbers)
        for number in np.unique(which):
            here, phase = which == number, self._phases[number]
            sources[here], draws[here] = phase.locate(numbers[here] - phase.first)
        return sources, draws
