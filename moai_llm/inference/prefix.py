"""Beginnings that were computed before: a prompt that begins like an earlier sequence takes over what that one left.

Keys and values can be cut at any length, so the longest common beginning counts. The state of a Mamba layer is the
whole past in one tensor and cannot be cut: a model with such layers goes on only from a length at which its states were
kept. Those are the end of a prompt, the end of an answer, and a place where two prompts were seen to part (as in
Marconi, arXiv 2411.19379), so that the second request of a shared beginning keeps it for the third.
"""

from __future__ import annotations

from dataclasses import dataclass

from moai_llm.modeling.slots import Kept

WORTH = 8  # tokens; to look after a shorter beginning costs more than to compute it


@dataclass(eq=False)
class _Entry:
    tokens: list[int]
    kept: Kept
    rope: int  # RotaryEmbedding.choice: keys rotated under another one do not fit
    used: int = 0


class PrefixStore:
    """The most recently used beginnings.

    Args:
        tokens: how many it holds at most, over all entries.
        states: a model with states, whose entries serve only at their whole length.
        token_bytes: of the keys and values of one token; what an entry takes beyond that counts as more tokens.
    """

    def __init__(self, tokens: int, states: bool, token_bytes: int) -> None:
        self.tokens, self.states, self.token_bytes = tokens, states, token_bytes
        self._entries: list[_Entry] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: list[int], rope: int) -> tuple[Kept, int] | None:
        """What is kept of the longest beginning of the prompt that leaves at least its last token to compute, and how
        long that is.
        """
        best, most = None, 0
        for entry in self._entries:
            if entry.rope != rope:
                continue
            length = min(common(entry.tokens, prompt), len(prompt) - 1)
            if (length == len(entry.tokens) if self.states else True) and length > max(most, WORTH - 1):
                best, most = entry, length
        if best is None:
            return None
        self._touch(best)
        return best.kept, most

    def parting(self, prompt: list[int], others: list[list[int]]) -> int:
        """Where the prompt parts from the one, kept or waiting, that it has most in common with; 0 where that is too
        near to its beginning.
        """
        return shared(prompt, [*(entry.tokens for entry in self._entries), *others])

    def wants(self, tokens: list[int], rope: int) -> bool:
        """Whether it is worth keeping: long enough and not there."""
        return len(tokens) >= WORTH and not any(e.rope == rope and e.tokens == tokens for e in self._entries)

    def add(self, tokens: list[int], kept: Kept, rope: int) -> None:
        """Keep a beginning; what it makes superfluous goes, and then what was not used for the longest time."""
        if not self.wants(tokens, rope):
            return
        if not self.states:
            if any(entry.rope == rope and common(entry.tokens, tokens) == len(tokens) for entry in self._entries):
                return
            self._entries = [
                entry
                for entry in self._entries
                if entry.rope != rope or common(entry.tokens, tokens) < len(entry.tokens)
            ]
        self._entries.append(_Entry(tokens, kept, rope))
        self._touch(self._entries[-1])
        while self._entries and sum(map(self._size, self._entries)) > self.tokens:
            self._entries.remove(min(self._entries, key=lambda entry: entry.used))

    def _size(self, entry: _Entry) -> int:
        return max(len(entry.tokens), entry.kept.bytes // max(self.token_bytes, 1))

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.used = self._clock


def shared(prompt: list[int], others: list[list[int]]) -> int:
    """The longest beginning that the prompt has in common with one of the others and that leaves its last token to
    compute; 0 where that is too short to look after.
    """
    longest = min(max((common(tokens, prompt) for tokens in others), default=0), len(prompt) - 1)
    return longest if longest >= WORTH else 0


def common(a: list[int], b: list[int]) -> int:
    """The length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
