"""Whose turn it is: the source of every sequence of a mixture, and which of its draws it takes.

Sources take turns in blocks: in a block each source has exactly its share of the places, in an order shuffled anew
for every block. Weights may change at given sequences; blocks then begin anew, and a source's draws go on counting:

    sequence   0 1 2 3 4 5 6 | 7 8 9 ...       weights 1 : 1, from sequence 7 on 1 : 2
    source     a b|b a|a b|b | b a b|...       a block of 2, the last one cut short; then blocks of 3
    draw       0 0 1 1 2 2 3 | 4 3 5 ...       of each source, without a gap or a repeat

Weights without a simple ratio, as numbers of tokens are, take turns in blocks of 10,000 whose shares differ by one
now and then: after any number of blocks no source is a whole sequence away from its share.

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
SAME_RATIO = Fraction(1, 1_000_000)  # weights that are so close to a simple ratio mean it: 0.33333333 is a third


def block_shares(weights: Sequence[float]) -> tuple[int, ...] | None:
    """Places of each source in a block: the smallest whole numbers in the ratio of the weights.

    None where a block of them would be longer than `LARGEST_BLOCK`, or their ratio another one.

    >>> block_shares([0.2, 0.1, 0.1, 0.6])
    (2, 1, 1, 6)
    >>> block_shares([0.5, 0.5, 0])
    (1, 1, 0)
    """
    exact = [_as_written(weight) for weight in weights]
    total = Fraction(sum(weights)).limit_denominator(1000)
    parts = [Fraction(weight).limit_denominator(1000) / (total or 1) for weight in weights]
    whole = [int(part * math.lcm(*(part.denominator for part in parts))) for part in parts]
    shares = tuple(count // (math.gcd(*whole) or 1) for count in whole)
    length = sum(shares)
    if not 0 < length <= LARGEST_BLOCK:
        return None
    pairs = zip(shares, exact, strict=True)
    near = all(abs(share * sum(exact) - weight * length) <= SAME_RATIO * weight * length for share, weight in pairs)
    return shares if near else None


def _as_written(weight: float) -> Fraction:
    """The number that somebody wrote, not the binary one nearest to it."""
    return Fraction(repr(float(weight)))


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How many places each source has in each block.

    Attributes:
        length: places in a block.
        until: whole numbers in the ratio of the weights, summed up: of the sources up to each one, `(0, ..., total)`.
    """

    length: int
    until: tuple[int, ...]

    @staticmethod
    def of(weights: Sequence[float]) -> _Blocks:
        """The blocks of these weights.

        Raises:
            ConfigError: they are so far apart that a source would be without a place in some block.
        """
        shares = block_shares(weights)
        exact = [_as_written(weight) for weight in weights] if shares is None else [Fraction(n) for n in shares]
        scale = math.lcm(*(weight.denominator for weight in exact))
        until = (0, *itertools.accumulate(int(weight * scale) for weight in exact))
        length = LARGEST_BLOCK if shares is None else until[-1]
        for weight in exact:
            if shares is None and 0 < weight * length < 2 * sum(exact):
                raise ConfigError(
                    f"a weight of {float(weight):g} among {float(sum(exact)):g} is less than one in {length // 2:,}",
                    where="data.sources",
                    fix="give it more, or leave it out",
                )
        return _Blocks(length=length, until=until)

    def before(self, blocks: Numbers) -> Numbers:
        """Places that each source has had before each block, `[N, sources]`: its exact share, rounded up or down."""
        if self.until[-1] == self.length:
            exact: Numbers = blocks[:, None] * np.diff(self.until)
            return exact
        numbers = [int(block) * self.length for block in blocks]  # their products may be longer than 64 bits
        ends = np.array([[number * part // self.until[-1] for part in self.until] for number in numbers], np.int64)
        return np.diff(ends, axis=1)


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """A stretch of sequences with the same weights.

    Attributes:
        first: its first sequence.
        blocks: in which sources take turns.
        key: of the blocks' orders.
        before: draws that each source has had before.
    """

    first: int
    blocks: _Blocks
    key: int
    before: Numbers

    def locate(self, offsets: Numbers) -> tuple[Numbers, Numbers]:
        """Sources and draws of the sequences `first + offsets`."""
        block, place = np.divmod(offsets, self.blocks.length)
        blocks, row = np.unique(block, return_inverse=True)
        had, sources, turns = self._open(blocks)
        source = sources[row, place]
        return source, self.before[source] + had[row, source] + turns[row, place]

    def after(self, count: int) -> Numbers:
        """Draws that each source has had when `count` sequences of this phase are through."""
        full, rest = divmod(count, self.blocks.length)
        had, sources, _ = self._open(np.array([full]))
        begun = np.bincount(sources[0, :rest], minlength=len(self.before))
        draws: Numbers = self.before + had[0] + begun
        return draws

    def _open(self, blocks: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Some blocks: draws before each `[N, sources]`, and at each place the source and its turn in the block."""
        had = self.blocks.before(blocks)
        shares = self.blocks.before(blocks + 1) - had
        number = np.tile(np.arange(shares.shape[1]), len(shares))
        places = np.repeat(number, shares.ravel()).reshape(len(shares), self.blocks.length)
        keys = drawn(self.key, blocks[:, None], np.arange(self.blocks.length)[None])
        sources = np.take_along_axis(places, np.argsort(keys, axis=1, kind="stable"), axis=1)
        turns: Numbers = np.zeros(sources.shape, np.int64)
        for source in range(shares.shape[1]):
            here = sources == source
            turns[here] = (np.cumsum(here, axis=1) - 1)[here]
        return had, sources, turns


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
                blocks=_Blocks.of(weights),
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
