"""Orders that are pure functions: the permutation of a key, evaluated where it is needed and never stored."""

from __future__ import annotations

import numpy as np


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of range(size) chosen by `key`, evaluated at `index`, without ever making the whole of it.

    A four-round Feistel network on the next power of four, walked until the value falls below `size`.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    value = np.asarray(index, dtype=np.uint64).copy()
    pending = np.ones(value.shape, dtype=bool)
    while pending.any():
        left, right = value[pending] >> np.uint64(half), value[pending] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, key + turn) & mask)
        value[pending] = (left << np.uint64(half)) | right
        pending = value >= np.uint64(size)
    return value.astype(np.int64)


def _hash(x: np.ndarray, key: int) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 on x + key times the golden ratio."""
    with np.errstate(over="ignore"):
        x = x + np.uint64((key * 0x9E3779B97F4A7C15) & (2**64 - 1)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
