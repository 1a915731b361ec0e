"""Lengths into bins of one capacity, compiled. Knows integers, not what they are the lengths of.

Lengths are at most the capacity T, so they are sorted by counting, and the open bins are kept by their free space: a
stack for each of the T + 1 spaces, and over them a binary tree that says which stacks hold a bin. Finding the fullest
bin that still takes a length is one walk up and down that tree, whatever the number of bins: O(n log T) in all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


def best_fit_reference(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """What `best_fit` computes, in plain Python. Spaces are a bit set held in one integer."""
    bins = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    opened = spaces = 0  # bit s of spaces is set where some bin has s free
    for i, size in enumerate(lengths.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            bins[i] = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, bins[i] = capacity, opened
            opened += 1
        left = space - size
        if left:
            by_space[left].append(int(bins[i]))
            spaces |= 1 << left
    return bins


@njit(cache=True, nogil=True)
def best_fit(lengths: Any, capacity: int) -> Any:  # pragma: no cover - compiled
    """Each length, in the order given, into the fullest bin that takes it, else into a new one; among equally full bins
    into the one that became so last.

    Args:
        lengths: (n,) int64, each from 1 to capacity.

    Returns:
        (n,) int64: the bin of each.
    """
    n = len(lengths)
    width = 1
    while width <= capacity:
        width *= 2
    some = np.zeros(2 * width, np.bool_)  # leaf width + s: some bin has s free; a parent: one of its children
    top = np.full(capacity + 1, -1, np.int64)  # of the stack of each space
    below = np.empty(n, np.int64)  # the bin under this one in its stack
    bins = np.empty(n, np.int64)
    opened = 0
    for i in range(n):
        size = lengths[i]
        k = width + size
        if not some[k]:
            while k > 1 and (k & 1 == 1 or not some[k + 1]):
                k >>= 1
            if k > 1:
                k += 1
                while k < width:
                    k = 2 * k if some[2 * k] else 2 * k + 1
        if k > 1:
            space = k - width
            b = top[space]
            top[space] = below[b]
            if top[space] < 0:
                some[k] = False
                k >>= 1
                while k >= 1 and not some[2 * k] and not some[2 * k + 1]:
                    some[k] = False
                    k >>= 1
        else:
            space, b = capacity, opened
            opened += 1
        bins[i] = b
        left = space - size
        if left > 0:
            below[b] = top[left]
            top[left] = b
            k = width + left
            while k >= 1 and not some[k]:
                some[k] = True
                k >>= 1
    return bins


@njit(cache=True, nogil=True)
def next_fit(lengths: Any, capacity: int) -> Any:  # pragma: no cover - compiled
    """Each length, in the order given, into the bin of the one before where it fits, else into a new one."""
    bins = np.empty(len(lengths), np.int64)
    at, free = -1, 0
    for i in range(len(lengths)):
        if lengths[i] > free:
            at, free = at + 1, capacity
        free -= lengths[i]
        bins[i] = at
    return bins


@njit(cache=True, nogil=True)
def sort_by(keys: Any, count: int) -> Any:  # pragma: no cover - compiled
    """A stable counting sort.

    Args:
        keys: (n,) int64, each from 0 to count - 1.

    Returns:
        (n,) int64, what stands where; (count + 1,) int64, where each key begins.
    """
    starts = np.zeros(count + 1, np.int64)
    for i in range(len(keys)):
        starts[keys[i] + 1] += 1
    for key in range(count):
        starts[key + 1] += starts[key]
    at = starts.copy()
    order = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        order[at[keys[i]]] = i
        at[keys[i]] += 1
    return order, starts
