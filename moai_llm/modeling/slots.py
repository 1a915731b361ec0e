"""The cache of many sequences at once, each of its own length: a slot is a row of every tensor.

Requests of a server join and leave between two steps. So a forward works on the rows that `select` names, a range, and
every row has its own length; whoever schedules keeps the running sequences together by `move`. Keys and values lie in
one tensor (slots, heads, capacity, head_dim) a layer that grows by doubling, and a step writes one position of it:
nothing is concatenated. States of Mamba are rows as well, and do not grow.

The tokens of a forward are (rows, length), equally many for each row; or pieces of different lengths, one for each row,
laid end to end as (1, sum of lengths). What looks at one token at a time sees no difference; what looks along the text,
attention, convolution and scan, goes through `piecewise`.

A sequence can be cut back to a shorter length where there are only keys. A state cannot: it must have been kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moai_llm.config import MoaiConfig
from moai_llm.ops.attention_step import AttentionWeights, attention_step
from moai_llm.ops.slot_attention import slot_attention

KEYS, STATES = ("full_attention", "sliding_attention"), ("linear_attention",)


def fits_slots(config: Any) -> bool:
    """Whether this is a model of ours whose every layer keeps something that a slot can hold; a brick from outside the
    package may not.
    """
    return isinstance(config, MoaiConfig) and set(config.layer_types or ()) <= {*KEYS, *STATES}


@dataclass
class Kept:
    """What a slot held at some length, outside of it: per layer two tensors, keys and values (heads, length, d), or
    the window of the convolution and the state.
    """

    length: int
    layers: list[tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class _Layer:
    """Two tensors with a row for each slot, made when the first row is written, then the same for good."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.pair: tuple[Tensor, Tensor] | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """The selected rows, as views."""
        assert self.pair is not None and self.cache.pieces is None  # pieces: one row at a time
        first, count = self.cache.first, self.cache.count
        return self.pair[0][first : first + count], self.pair[1][first : first + count]

    def grow(self, slots: int) -> None:
        if self.pair is not None and self.pair[0].shape[0] < slots:
            self.pair = _widened(self.pair[0], 0, slots), _widened(self.pair[1], 0, slots)


class SlotKeys(_Layer):
    """Keys and values (S, K, C, d)."""

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, K, L, d) behind what the selected rows hold; returns the rows (B, K, C, d)."""
        cache, length = self.cache, k.shape[2]
        self.reserve(k.new_empty(0), k.shape[1], k.shape[3], length)
        keys, values = self.rows()
        starts = cache.lengths[cache.first : cache.first + cache.count]
        if len(set(starts)) == 1:
            keys[:, :, starts[0] : starts[0] + length] = k
            values[:, :, starts[0] : starts[0] + length] = v
        else:
            row = torch.arange(len(starts), device=k.device)[:, None]
            place = torch.tensor(starts, device=k.device)[:, None] + torch.arange(length, device=k.device)
            keys[row, :, place], values[row, :, place] = k.transpose(1, 2), v.transpose(1, 2)
        return keys, values

    def reserve(self, like: Tensor, heads: int, width: int, length: int) -> None:
        """Room for so many more positions in each selected row."""
        cache = self.cache
        needed = max(cache.lengths[cache.first : cache.first + cache.count]) + length
        if self.pair is None:
            shape = (cache.slots, heads, cache.capacity(needed), width)
            self.pair = like.new_zeros(shape), like.new_zeros(shape)  # zeros: what is masked is still multiplied
        elif self.pair[0].shape[2] < needed:
            self.pair = tuple(_widened(t, 2, cache.capacity(needed)) for t in self.pair)  # type: ignore[assignment]

    def keep(self, row: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        assert self.pair is not None
        return self.pair[0][row, :, start:length].clone(), self.pair[1][row, :, start:length].clone()

    def put(self, row: int, kept: tuple[Tensor, Tensor], length: int) -> None:
        keys, values = kept
        self.reserve(keys.new_empty(0), keys.shape[0], keys.shape[2], length)
        assert self.pair is not None
        self.pair[0][row, :, :length], self.pair[1][row, :, :length] = keys[:, :length], values[:, :length]

    def copy(self, source: int, to: int, length: int) -> None:
        if self.pair is not None:
            for tensor in self.pair:
                tensor[to, :, :length] = tensor[source, :, :length]


class SlotStates(_Layer):
    """The window of the convolution (S, D, K) and the recurrent state (S, D, N) in fp32; zeros are the beginning."""

    def write(self, window: Tensor, state: Tensor) -> None:
        if self.pair is None:
            slots = self.cache.slots
            self.pair = window.new_zeros(slots, *window.shape[1:]), state.new_zeros(slots, *state.shape[1:])
        rows = self.rows()
        rows[0].copy_(window)
        rows[1].copy_(state)

    def keep(self, row: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        assert self.pair is not None
        return self.pair[0][row].clone(), self.pair[1][row].clone()

    def put(self, row: int, kept: tuple[Tensor, Tensor], length: int) -> None:
        if self.pair is None:
            self.pair = tuple(t.new_zeros(self.cache.slots, *t.shape) for t in kept)  # type: ignore[assignment]
        assert self.pair is not None
        self.pair[0][row], self.pair[1][row] = kept[0], kept[1]

    def copy(self, source: int, to: int, length: int) -> None:
        if self.pair is not None:
            for tensor in self.pair:
                tensor[to] = tensor[source]

    def clear(self, row: int) -> None:
        if self.pair is not None:
            for tensor in self.pair:
                tensor[row] = 0


class SlotCache:
    """A cache of `slots` rows; `select` says which rows the next forward is about.

    Attributes:
        lengths: tokens in each row.
        finals: how long each row will become, for RoPE rules that depend on it.
        pieces: tokens of each selected row in the next forward; None where it has equally many for all.
    """

    is_compileable = False

    def __init__(self, config: MoaiConfig, slots: int = 1) -> None:
        assert fits_slots(config)
        self.config, self.slots = config, slots
        self.lengths, self.finals = [0] * slots, [0] * slots
        self.first, self.count = 0, 1
        self.pieces: list[int] | None = None
        self._weights: dict[int, Any] = {}
        kinds = config.layer_types or []
        self.layers: list[Any] = [SlotKeys(self) if kind in KEYS else SlotStates(self) for kind in kinds]
        self.has_states = any(isinstance(layer, SlotStates) for layer in self.layers)

    def select(self, first: int, count: int = 1, pieces: list[int] | None = None) -> SlotCache:
        """The next forward is about these rows; more rows are made where there are not so many."""
        assert pieces is None or (len(pieces) == count and min(pieces) > 0)
        if first + count > self.slots:
            self.slots = max(first + count, 2 * self.slots)
            extra = [0] * (self.slots - len(self.lengths))
            self.lengths, self.finals = self.lengths + extra, self.finals + extra
            for layer in self.layers:
                layer.grow(self.slots)
        self.first, self.count, self.pieces = first, count, pieces
        return self

    def capacity(self, needed: int) -> int:
        """Positions to make room for: twice what is needed, so that growing is rare, but not past what is known to
        be the end of every row.
        """
        final = max(self.finals)
        return max(needed, min(max(64, 2 * needed), final)) if final else max(64, 2 * needed)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths[self.first : self.first + self.count])

    def positions(self, length: int, device: torch.device) -> Tensor:
        """(B, L) of the next positions of the selected rows, or (1, L) with pieces."""
        lengths = self.lengths[self.first : self.first + self.count]
        if self.pieces is not None:
            places = [place for n, piece in zip(lengths, self.pieces) for place in range(n, n + piece)]
            return torch.tensor([places], device=device)
        starts = torch.tensor(lengths, device=device)[:, None]
        return starts if length == 1 else starts + torch.arange(length, device=device)

    def after(self, length: int) -> list[int]:
        """How long the selected rows are after a forward over (B or 1, `length`) tokens."""
        pieces = self.pieces or [length] * self.count
        return [n + piece for n, piece in zip(self.lengths[self.first : self.first + self.count], pieces)]

    def ends(self, length: int) -> list[int]:
        """How long the selected rows will become, at least as long as after such a forward."""
        finals = self.finals[self.first : self.first + self.count]
        return [max(final, after) for final, after in zip(finals, self.after(length))]

    def piecewise(self, mix: Callable[..., Tensor], *tensors: Tensor, dim: int) -> Tensor:
        """mix(*tensors), in which the text runs along `dim`. Pieces go through it one after the other, each while its
        row alone is selected.
        """
        if self.pieces is None:
            return mix(*tensors)
        first, pieces, mixed = self.first, self.pieces, []
        for row, piece in enumerate(zip(*(tensor.split(pieces, dim) for tensor in tensors)), first):
            self.select(row)
            mixed.append(mix(*piece))
        self.select(first, len(pieces), pieces)
        return torch.cat(mixed, dim)

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Write (B, K, L, d) behind the rows and let the queries (B, H, L, d) see what each row then holds."""

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.layers[layer_idx].write(k, v)
            return slot_attention(q, keys, values, self.after(q.shape[2]), window)

        return self.piecewise(mix, q, k, v, dim=2)

    def step(
        self,
        layer_idx: int,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        window: int | None,
        weights: AttentionWeights,
    ) -> Tensor:
        """A whole attention mixer for one new position x (B, W) of each selected row."""
        layer = self.layers[layer_idx]
        layer.reserve(x.new_empty(0), weights.k.shape[0] // weights.size, weights.size, 1)
        lengths = self.lengths[self.first : self.first + self.count]
        keys, values = layer.rows()
        return attention_step(x, keys, values, lengths, rope, window, weights)

    def weights_of(self, layer_idx: int, find: Callable[[], Any]) -> Any:
        """What `find` said when this layer was asked first: to collect the weights of a mixer takes as long as a small
        product. So a cache must not outlive a change of the model's layers.
        """
        if layer_idx not in self._weights:
            self._weights[layer_idx] = find()
        return self._weights[layer_idx]

    def advance(self, length: int) -> None:
        """The forward over (B or 1, `length`) tokens is done."""
        self.lengths[self.first : self.first + self.count] = self.after(length)

    # ---------------------------------------------------------------- rows

    def reorder(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        picked = torch.tensor(rows)
        for layer in self.layers:
            if layer.pair is not None:
                for tensor in layer.pair:
                    tensor[: len(rows)] = tensor.index_select(0, picked.to(tensor.device))
        self.lengths[: len(rows)] = [self.lengths[row] for row in rows]

    def clear(self, row: int, final: int = 0) -> None:
        """An empty row."""
        self.select(row)
        self.lengths[row], self.finals[row] = 0, final
        for layer in self.layers:
            if isinstance(layer, SlotStates):
                layer.clear(row)

    def cut(self, row: int, length: int) -> None:
        """Forget what comes after `length`. Only keys can be cut: states must be `put` back."""
        assert length <= self.lengths[row]
        self.lengths[row] = length

    def move(self, source: int, to: int) -> None:
        """Copy a row over another one."""
        for layer in self.layers:
            layer.copy(source, to, self.lengths[source])
        self.lengths[to], self.finals[to] = self.lengths[source], self.finals[source]

    def keep(self, row: int, length: int | None = None) -> Kept:
        """A copy of what a row holds, or with `length` of the keys of its beginning."""
        length = self.lengths[row] if length is None else length
        return Kept(length, [layer.keep(row, 0, length) for layer in self.layers])

    def keep_states(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the states of a row, in the order of their layers."""
        return [layer.keep(row, 0, 0) for layer in self.layers if isinstance(layer, SlotStates)]

    def put_states(self, row: int, states: list[tuple[Tensor, Tensor]]) -> None:
        layers = [layer for layer in self.layers if isinstance(layer, SlotStates)]
        for layer, kept in zip(layers, states):
            layer.put(row, kept, 0)

    def put(self, row: int, kept: Kept, length: int | None = None) -> None:
        """Make a row hold what was kept, or with `length` the beginning of it."""
        length = kept.length if length is None else length
        self.select(row)
        self.lengths[row] = 0
        for layer, pair in zip(self.layers, kept.layers):
            layer.put(row, pair, length)
        self.lengths[row] = length


def _widened(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    wide = tensor.new_zeros(shape)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide
