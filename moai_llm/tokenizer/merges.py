"""Learn byte-pair merges from a table of words: from the bytes up, or on top of the merges a vocabulary has.

The algorithm is that of Sennrich et al. (2016, arXiv:1508.07909): join the most frequent adjacent pair, again and
again. Ties go to the pair with the smaller ids, as in the `tokenizers` library. Every pair knows its places, so a merge
touches only what it changes, and a heap with late updates finds the next pair. `learn_merges_slowly` is the definition.

Continued on an old vocabulary, the words are first segmented by its merges. The old merges keep their rank, so they are
exhausted first, and none of them has a new symbol as a part. Hence expanding the new symbols in any text's new
segmentation gives exactly its old one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit

from moai_llm.tokenizer.byte_level import BYTE_OF
from moai_llm.tokenizer.words import LONGEST_WORD, WordCounts

MIN_COUNT = 2  # a pair seen once is not worth a token
# columns of a position: its symbol, the pair it begins, how far back and ahead in the word its neighbours lie (16 bits
# each, 0 at the borders), and the count of the word
SYMBOL, PAIR, LINKS, WEIGHT = range(4)
Pairs = list[tuple[int, int]]
Segment = Callable[[bytes], Sequence[int]]


def learn_merges(
    words: WordCounts,
    how_many: int,
    *,
    tokens: Sequence[bytes] = (),
    segment: Segment | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pairs:
    """Learn up to `how_many` merges, fewer where no pair occurs twice any more.

    Args:
        words: the words and how often each occurs.
        tokens: the bytes of each old token by id; the 256 bytes when empty. Learned tokens get the ids after them.
        segment: the bytes of a word to the ids of its old tokens; by bytes when None.
        progress: called with the number of merges so far, a few times a second.

    Returns:
        The two ids each new token joins, in the order of learning.
    """
    vocabulary = list(tokens) or [bytes([b]) for b in range(256)]
    symbols, ends = _symbols(words, segment)
    lengths = np.fromiter(map(len, vocabulary), np.int32, len(vocabulary))
    joined = np.frombuffer(b"".join(vocabulary), np.uint8)
    live = np.zeros(2, np.int64)  # merges so far, and 1 to stop
    result: list[Any] = []

    def work() -> None:
        order = tie_order() if not len(tokens) else np.arange(len(vocabulary), dtype=np.int32)
        counts = words.counts
        result.append(_learn(symbols, ends, counts, joined, lengths, order, how_many, LONGEST_WORD, MIN_COUNT, live))

    # compiled code releases the interpreter, so this thread can show progress and hear Ctrl-C
    thread = threading.Thread(target=work)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.25)
            if progress is not None and thread.is_alive():
                progress(int(live[0]))
    finally:
        live[1] = 1
        thread.join()
    if progress is not None:
        progress(int(live[0]))
    if not result:
        raise MemoryError("learning merges failed: there is not enough memory for this table of words")
    left, right = result[0]
    return list(zip(left.tolist(), right.tolist()))


def learn_merges_slowly(
    words: WordCounts, how_many: int, *, tokens: Sequence[bytes] = (), segment: Segment | None = None
) -> Pairs:
    """The same by counting every pair anew for each merge: the definition, for small tables."""
    vocabulary = list(tokens) or [bytes([b]) for b in range(256)]
    known, order = set(vocabulary), (tie_order() if not len(tokens) else np.arange(len(vocabulary))).tolist()
    table = [(list(segment(word) if segment else word), count) for word, count in words.items()]
    pairs: Pairs = []
    while len(pairs) < how_many:
        seen: Counter[tuple[int, int]] = Counter()
        for word, count in table:
            for pair in zip(word, word[1:]):
                seen[pair] += count
        fit = {p: c for p, c in seen.items() if c >= MIN_COUNT and vocabulary[p[0]] + vocabulary[p[1]] not in known}
        if not fit:
            break
        best = min(fit, key=lambda p: (-fit[p], order[p[0]], order[p[1]]))
        order.append(len(vocabulary))
        vocabulary.append(vocabulary[best[0]] + vocabulary[best[1]])
        known.add(vocabulary[-1])
        pairs.append(best)
        for word, _ in table:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(vocabulary) - 1]
                i += 1
    return pairs


def tie_order() -> np.ndarray:
    """(256,) int32: the place of each byte where counts tie. `tokenizers` numbers bytes by their printable stand-in,
    so control bytes and the space come after the letters.
    """
    order = np.empty(256, np.int32)
    order[[BYTE_OF[c] for c in sorted(BYTE_OF)]] = np.arange(256)
    return order


def _symbols(words: WordCounts, segment: Segment | None) -> tuple[np.ndarray, np.ndarray]:
    """(symbols int32 of all words, their ends): bytes, or the ids of the old tokens."""
    if segment is None:
        return words.data.astype(np.int32), words.ends
    ends, flat = np.empty(len(words), np.int64), list[int]()
    chunks: list[np.ndarray] = []
    total = 0
    for i, word in enumerate(words.words()):
        ids = segment(word)
        total += len(ids)
        ends[i] = total
        flat.extend(ids)
        if len(flat) > 1 << 20:
            chunks.append(np.array(flat, np.int32))
            flat.clear()
    return np.concatenate([*chunks, np.array(flat, np.int32)]), ends


@njit(cache=True, nogil=True)
def _learn(symbols, ends, counts, joined, lengths, order, how_many, longest, min_count, live):
    """(left ids, right ids) of the merges."""
    n, old = len(symbols), len(lengths)
    node = np.zeros((n, 4), np.int32)  # one row a position, so that it costs one look into memory
    start = 0
    for w in range(len(ends)):
        weight = min(counts[w], 2**31 - 1)
        for p in range(start, ends[w]):
            node[p, SYMBOL], node[p, PAIR], node[p, WEIGHT] = symbols[p], -1, weight
            node[p, LINKS] = (1 if p > start else 0) << 16 | (1 if p + 1 < ends[w] else 0)
        start = ends[w]

    # tokens: length, place in ties, and a rolling hash of the bytes by which equal strings are found
    token_length = np.zeros(old + how_many, np.int32)
    token_length[:old] = lengths
    place = np.arange(old + how_many).astype(np.int32)
    place[:old] = order
    base = np.uint64(0x9E3779B97F4A7C15)
    power = np.ones(longest + 1, np.uint64)
    for i in range(1, longest + 1):
        power[i] = power[i - 1] * base
    token_hash = np.zeros(old + how_many, np.uint64)
    known = set([np.uint64(0)])
    at = 0
    for t in range(old):
        h = np.uint64(0)
        for i in range(at, at + lengths[t]):
            h = h * base + np.uint64(joined[i]) + np.uint64(1)
        at += lengths[t]
        token_hash[t] = h
        known.add(h)

    # pairs: their symbols, occurrences, and where their positions lie in `places`. A pair of old symbols can only lose
    # places, and a pair with a new one gets all of its in the step that makes the symbol: so each list is written once,
    # in ascending order, and a place counts as long as its PAIR still says so.
    table = np.full(1 << 16, -1, np.int32)
    left, right = np.empty(1 << 15, np.int32), np.empty(1 << 15, np.int32)
    total, spots = np.zeros(1 << 15, np.int64), np.zeros(1 << 15, np.int32)
    pairs = 0
    for p in range(n):
        if node[p, LINKS] & 0xFFFF:
            if pairs == len(left):
                left, right, total, spots = _double(left), _double(right), _double(total), _double(spots)
                table = np.full(4 * len(left), -1, np.int32)
                for q in range(pairs):
                    table[_slot(table, left, right, left[q], right[q])] = q
            a, b = node[p, SYMBOL], node[p + 1, SYMBOL]
            slot = _slot(table, left, right, a, b)
            if table[slot] < 0:
                table[slot], left[pairs], right[pairs] = pairs, a, b
                pairs += 1
            q = table[slot]
            node[p, PAIR] = q
            total[q] += node[p, WEIGHT]
            spots[q] += 1
    first = np.zeros(len(left), np.int64)
    used = 0
    for q in range(pairs):
        first[q] = used
        used += spots[q]
        spots[q] = 0
    places = np.empty(used + (used >> 1) + 16, np.int32)
    for p in range(n):
        q = node[p, PAIR]
        if q >= 0:
            places[first[q] + spots[q]] = p
            spots[q] += 1

    heap = np.empty(max(pairs, 1) * 2, np.int32)  # pairs; `queued` is the count each was queued with
    queued = np.empty(len(heap), np.int64)
    size = 0
    for q in range(pairs):
        if total[q] >= min_count:
            size = _push(heap, queued, size, q, total[q], left, right, place)

    merged_left, merged_right = np.empty(how_many, np.int32), np.empty(how_many, np.int32)
    with_new = np.full((old + how_many, 2), -1, np.int32)  # the pairs of a symbol with the newest, before and after it
    made_at, made_of = np.empty(1 << 12, np.int32), np.empty(1 << 12, np.int32)  # places of new pairs, in this step
    done = 0
    while done < how_many and size and not live[1]:
        q, seen = heap[0], queued[0]
        size = _pop(heap, queued, size, left, right, place)
        if total[q] != seen:  # it lost occurrences since: queue it where it belongs now
            if total[q] >= min_count:
                size = _push(heap, queued, size, q, total[q], left, right, place)
            continue
        a, b = left[q], right[q]
        h = token_hash[a] * power[token_length[b]] + token_hash[b]
        if h in known:
            continue
        new = old + done
        known.add(h)
        token_hash[new], token_length[new] = h, token_length[a] + token_length[b]
        merged_left[done], merged_right[done] = a, b
        done += 1
        live[0] = done

        made, oldest = 0, pairs
        for k in range(first[q], first[q] + spots[q]):
            p = places[k]
            if node[p, PAIR] != q:  # in a run of one symbol, places overlap: the leftmost are joined
                continue
            r = p + (node[p, LINKS] & 0xFFFF)
            weight, step = node[p, WEIGHT], node[r, LINKS] & 0xFFFF
            if node[r, PAIR] >= 0:
                total[node[r, PAIR]] -= weight
                node[r, PAIR] = -1
            total[q] -= weight
            node[p, SYMBOL], node[p, PAIR] = new, -1
            node[p, LINKS] = (node[p, LINKS] & ~0xFFFF) | (r - p + step if step else 0)
            if step:
                node[r + step, LINKS] = (node[r + step, LINKS] & 0xFFFF) | ((r - p + step) << 16)
            if pairs + 2 > len(left):
                left, right, total, spots = _double(left), _double(right), _double(total), _double(spots)
                first = _double(first)
            if made + 2 > len(made_at):
                made_at, made_of = _double(made_at), _double(made_of)
            back = node[p, LINKS] >> 16
            for s, t in ((p - back, p) if back else (-1, -1), (p, r + step) if step else (-1, -1)):
                if s < 0:
                    continue
                if node[s, PAIR] >= 0:
                    total[node[s, PAIR]] -= weight
                x, y = node[s, SYMBOL], node[t, SYMBOL]
                partner, side = (x, 0) if y == new else (y, 1)
                u = with_new[partner, side]
                if u < oldest:
                    u = with_new[partner, side] = pairs
                    left[u], right[u], total[u], spots[u] = x, y, 0, 0
                    pairs += 1
                node[s, PAIR] = u
                total[u] += weight
                spots[u] += 1
                made_at[made], made_of[made] = s, u
                made += 1
        if used + made > len(places):
            places = np.concatenate((places, np.empty(max(made, len(places) >> 1), np.int32)))
        for t in range(oldest, pairs):
            first[t] = used
            used += spots[t]
            spots[t] = 0
        for k in range(made):
            t = made_of[k]
            places[first[t] + spots[t]] = made_at[k]
            spots[t] += 1
        for t in range(oldest, pairs):
            if total[t] >= min_count:
                if size == len(heap):
                    heap, queued = _double(heap), _double(queued)
                size = _push(heap, queued, size, t, total[t], left, right, place)
    return merged_left[:done], merged_right[:done]


@njit(cache=True, nogil=True)
def _double(array):
    return np.concatenate((array, np.zeros_like(array)))


@njit(cache=True, nogil=True)
def _slot(table, left, right, a, b):
    """Where pair (a, b) is or belongs in the hash table."""
    mask = np.uint64(len(table) - 1)
    key = ((np.uint64(a) << np.uint64(32)) | np.uint64(b)) * np.uint64(0x9E3779B97F4A7C15)
    slot = (key ^ (key >> np.uint64(32))) & mask
    while table[slot] >= 0 and (left[table[slot]] != a or right[table[slot]] != b):
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _first(q, m, r, k, left, right, place):
    """Whether pair q queued with count m goes before pair r queued with count k."""
    if m != k:
        return m > k
    if place[left[q]] != place[left[r]]:
        return place[left[q]] < place[left[r]]
    return place[right[q]] < place[right[r]]


@njit(cache=True, nogil=True)
def _push(heap, queued, size, q, count, left, right, place):
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if not _first(q, count, heap[up], queued[up], left, right, place):
            break
        heap[i], queued[i] = heap[up], queued[up]
        i = up
    heap[i], queued[i] = q, count
    return size + 1


@njit(cache=True, nogil=True)
def _pop(heap, queued, size, left, right, place):
    """Take the first entry off."""
    size -= 1
    q, count = heap[size], queued[size]
    i = 0
    while 2 * i + 1 < size:
        down = 2 * i + 1
        if down + 1 < size and _first(heap[down + 1], queued[down + 1], heap[down], queued[down], left, right, place):
            down += 1
        if not _first(heap[down], queued[down], q, count, left, right, place):
            break
        heap[i], queued[i] = heap[down], queued[down]
        i = down
    heap[i], queued[i] = q, count
    return size
