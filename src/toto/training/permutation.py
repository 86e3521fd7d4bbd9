"""A shuffle without a list: where each number of 0 .. n-1 goes, computed for one number at a time."""

from __future__ import annotations

import hashlib

ROUNDS = 6


def permuted(index: int, count: int, seed: int) -> int:
    """The image of `index` under a permutation of `0 .. count - 1` that depends on the seed alone.

    A Feistel network over the smallest even number of bits that holds `count`, walked until it lands inside
    (Black and Rogaway's cycle walking): constant memory, and constant time on average.
    """
    if not 0 <= index < count:
        raise ValueError(f"{index} is not in 0 .. {count - 1}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    value = index
    while True:
        value = _feistel(value, half, seed)
        if value < count:
            return value


def _feistel(value: int, half: int, seed: int) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for turn in range(ROUNDS):
        text = seed.to_bytes(8, "little") + turn.to_bytes(1, "little") + right.to_bytes(8, "little")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half | right
