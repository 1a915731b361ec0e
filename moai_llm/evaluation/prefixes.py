"""Token sequences that begin alike as a tree, so that what they share is computed once; and caches that branch.

The answers to one multiple-choice question share the question, and the questions of one few-shot task their examples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """Positions `begin` to `end` of all sequences in `members`, which are equal there; their rest is in `children`."""

    members: list[int]
    begin: int
    end: int
    children: list[Node] = field(default_factory=list)


def tree(sequences: Sequence[Sequence[int]], worth: int) -> list[Node]:
    """The roots of a forest over sequences of at least one token.

    Args:
        worth: how many tokens a shared part must save to be computed by itself: one more call of the model costs
            something too. Equal sequences share a node whatever this is.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    return _branches(sequences, order, 0, worth)


def _branches(sequences: Sequence[Sequence[int]], order: list[int], begin: int, worth: int) -> list[Node]:
    """The nodes from position `begin` on, of sequences in order that are equal before it.

    Groups that still have to be looked at wait in a list: they may be nested as deep as a sequence is long.
    """
    found: list[Node] = []
    waiting = [(order, begin, found)]
    while waiting:
        members, start, into = waiting.pop()
        first, last = sequences[members[0]], sequences[members[-1]]
        end = common(first, last, start)  # of the whole group, since it is in order
        if end == len(last):  # all are equal
            into.append(Node(members, start, end))
            continue
        groups: dict[int, list[int]] = {}
        for i in members:
            groups.setdefault(sequences[i][end] if end < len(sequences[i]) else -1, []).append(i)
        if (len(groups) - 1) * (end - start) >= worth and end > start:
            node = Node(members, start, end)
            into.append(node)
            ends_here = groups.pop(-1, [])  # their last token is the node's, so nothing is left to compute
            assert all(len(sequences[i]) == end for i in ends_here)
            waiting += [(group, end, node.children) for group in groups.values()]
        else:
            waiting += [(group, start, into) for group in groups.values()]
    return found


def common(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """How far two sequences are equal that are so before `start`."""
    shortest = min(len(a), len(b))
    while start < shortest and a[start] == b[start]:
        start += 1
    return start


def fork(cache: Any, rows: int) -> Any:
    """A cache of one row as one of `rows` equal rows, which can go on without changing the first."""
    branch = copy.copy(cache)
    branch.layers = [_fork_layer(layer, rows) for layer in cache.layers]
    return branch


def _fork_layer(layer: Any, rows: int) -> Any:
    branch = copy.copy(layer)
    for name in ("keys", "values"):  # an update makes new tensors of them, so a view is enough
        tensor = getattr(layer, name, None)
        if tensor is not None and tensor.dim() == 4:
            setattr(branch, name, tensor.expand(rows, -1, -1, -1))
    for name in ("conv_states", "recurrent_states"):  # an update writes into these
        states = getattr(layer, name, None)
        if states is not None:
            setattr(branch, name, _repeated(states, rows))
    for name, value in vars(layer).items():  # what is counted for each state
        if isinstance(value, (list, dict)) and name not in ("conv_states", "recurrent_states"):
            setattr(branch, name, copy.copy(value))
    return branch


def _repeated(states: Any, rows: int) -> Any:
    def repeat(state: Any) -> Any:
        return state if state is None else state.repeat_interleave(rows, 0)

    if isinstance(states, dict):
        return {key: repeat(state) for key, state in states.items()}
    return [repeat(state) for state in states]
