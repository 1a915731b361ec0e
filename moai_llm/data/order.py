"""Orders that are pure functions: the permutation of a key, evaluated where it is needed and never stored.

A four-round Feistel network on the next power of four, walked until the value falls below the size. Rounds are the
64-bit finaliser of SplitMix64 on the value and the key times the golden ratio.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of range(size) chosen by `key`, evaluated at `index`, without ever making the whole of it."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.array([((key + turn + 1) * GOLDEN) % WORD for turn in range(4)], dtype=np.uint64)
    value = np.array(index, dtype=np.uint64)
    _walk(value.reshape(-1), keys, np.uint64(size), np.uint64(half))
    return value.astype(np.int64)


@njit(cache=True, nogil=True)
def _walk(value: Any, keys: Any, size: Any, half: Any) -> None:  # pragma: no cover - compiled
    mask = (np.uint64(1) << half) - np.uint64(1)
    for i in range(len(value)):
        at = value[i]
        while True:
            left, right = at >> half, at & mask
            for turn in range(4):
                x = right + keys[turn]
                x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                left, right = right, left ^ ((x ^ (x >> np.uint64(31))) & mask)
            at = (left << half) | right
            if at < size:
                break
        value[i] = at


def permute_reference(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """What `permute` computes, in NumPy."""
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
    with np.errstate(over="ignore"):
        x = x + np.uint64((key + 1) * GOLDEN % WORD)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
