"""Randomness as a function of names: the same seed and keys give the same draw anywhere, in any order."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *keys: int | str) -> np.random.Generator:
    """A generator that depends on nothing but the seed and the keys.

    Draws for one (epoch, item) are thus independent of what was drawn before, of the process and of the order.
    """
    text = "/".join(str(part) for part in (seed, *keys))
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def integer(seed: int, *keys: int | str) -> int:
    """A 63-bit integer that depends on nothing but the seed and the keys."""
    text = "/".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
