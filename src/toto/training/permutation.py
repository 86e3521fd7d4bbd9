"""A shuffle without a list: where each number of 0 .. n-1 goes, computed for any of them, many at a time.

All randomness here is SplitMix64's (Steele, Lea and Flood 2014): draw c of the stream with state k is
`finalised(k + (c + 1) x golden)`. It is counted, so any draw can be had first and a whole batch at once.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

ROUNDS = 6
GOLDEN, FIRST, SECOND = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))


def drawn(keys: int | Words, *counters: Numbers | Words) -> Words:
    """Random 64-bit numbers that depend on nothing but keys and counters; all of them are broadcast.

    A draw by the first counter is the state of the stream that the second one counts, and so on.
    """
    state = np.atleast_1d(np.asarray(keys, np.uint64))
    for counter in counters:
        state = state + (counter.astype(np.uint64) + np.uint64(1)) * GOLDEN
        state ^= state >> SHIFTS[0]
        state *= FIRST
        state ^= state >> SHIFTS[1]
        state *= SECOND
        state ^= state >> SHIFTS[2]
    return state


def permuted(indices: Numbers, count: int, keys: Words) -> Numbers:
    """The image of each index under a permutation of `0 .. count - 1` that depends on the index's key alone.

    A Feistel network over pairs (left, right) of numbers below a and b, where a x b is the smallest such rectangle
    with a near the root of `count`, walked until it lands inside (Black and Rogaway's generalised Feistel cipher and
    cycle walking). Fewer than one in `a` pairs lie outside, so hardly any index walks twice.

    Args:
        indices: numbers in `0 .. count - 1`, `[N]`.
        count: how many numbers are permuted.
        keys: one key for each index, `[N]`; indices of one key share a permutation.
    """
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(f"indices {indices.min()} to {indices.max()} are not in 0 .. {count - 1}")
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    turns = np.arange(ROUNDS)
    round_keys = drawn(keys[None], turns[:, None])
    values = _feistel(indices.astype(np.uint64), a, b, round_keys)
    while len(outside := np.flatnonzero(values >= np.uint64(count))):
        values[outside] = _feistel(values[outside], a, b, round_keys[:, outside])
    return values.astype(np.int64)


def _feistel(values: Words, a: int, b: int, round_keys: Words) -> Words:
    wide, high = np.uint64(b), np.uint64(a)
    left, right = values // wide, values % wide
    for turn, keys in enumerate(round_keys):
        if turn % 2:
            right = (right + drawn(keys, left) % wide) % wide
        else:
            left = (left + drawn(keys, right) % high) % high
    return left * wide + right
