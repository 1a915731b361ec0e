"""Batches of packed rows, as a pure function of (seed, step): there is no state to lose.

Which row stands at position i of the endless stream is computed from i and the seed: the source by the quotas of its
stage, then the row by a permutation for each pass over that source. A step takes the next step_rows of them. So a run
resumes at any step, and any number of ranks can share the rows of a step: rank r of W takes its rows r, r + W, ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moai_llm.data.balance import rows_of_stream
from moai_llm.data.curriculum import Curriculum, Span
from moai_llm.data.packing import Packing, join
from moai_llm.data.rows import Arrays, Rows
from moai_llm.data.shards import Store
from moai_llm.recipe import DataConfig
from moai_llm.runtime import MoaiError

Batch = dict[str, Tensor]
OTHER_SOURCE = 0x9E3779B97F4A7C15  # between the seeds of two sources


class Source(NamedTuple):
    """A store and its weight in a mixture; without one it counts as many rows as it holds."""

    store: Store
    weight: float | None = None


class Stage(NamedTuple):
    """A mixture, and how long it is read: to a number of tokens of the run, for a number of passes over its stores, or
    to the end. It ends with a step, the first one that has read as much.
    """

    sources: Sequence[Source]
    until: float | None = None
    epochs: float | None = None


def open_stages(config: DataConfig) -> list[Stage]:
    """What a recipe trains on.

    Raises:
        MoaiError: nothing is named, or what is named is no store.
    """
    if not config.run():
        raise MoaiError("data.train is not set: give a store made by `moai data prepare`, e.g. data.train=data/wiki")
    return [
        Stage([Source(Store(source.store), source.weight) for source in stage.sources()], stage.until, stage.epochs)
        for stage in config.run()
    ]


class Loader:
    """Packed rows of a store, or of stages of several.

    Args:
        data: a store, or the stages of a run.
        seq_len: tokens per row.
        seed: of the order; None keeps the rows in the order of packing, one source after the other, for evaluation.
        packing: how documents become rows, see `packing.py`; each source has its own rows.
        overlong: what becomes of documents longer than a row, see `rows.py`.
        step_rows: rows of a step; `balanced` puts rows that cost attention the same into each.
        pinned: batches lie in memory from which a CUDA device copies while the program goes on.

    Raises:
        MoaiError: a source without a token to learn, sources of different tokenizers, stages that do not follow each
            other, or balanced rows of a mixture.
    """

    def __init__(
        self,
        data: Store | Sequence[Stage],
        seq_len: int,
        seed: int | None = 0,
        *,
        packing: str = "best-fit",
        overlong: str | None = None,
        step_rows: int = 1,
        pinned: bool = False,
    ) -> None:
        self.stages = [Stage([Source(data)])] if isinstance(data, Store) else list(data)
        self.seq_len, self.seed, self.step_rows, self.pinned = seq_len, seed, step_rows, pinned
        self.group = step_rows if packing == "balanced" else 1
        parts = [[part for source in stage.sources for part in source.store.parts()] for stage in self.stages]
        if self.group > 1 and seed is not None and any(len(of_stage) > 1 for of_stage in parts):
            raise MoaiError(
                "data.packing=balanced makes steps of rows of one store that cost the same, and the steps of a mixture "
                "hold rows of several: use best-fit, or one store after the other in data.stages"
            )
        self.sources: list[Rows] = []
        self._number: dict[str, int] = {}  # fingerprint of a store -> its number in sources
        for part in itertools.chain(*parts):
            if part.store.fingerprint not in self._number:
                self._number[part.store.fingerprint] = len(self._number)
                self.sources.append(Rows(part.store, seq_len, packing, overlong))
        self._require_one_tokenizer()
        self.pad_id = self.sources[0].pad_id
        self._borders = np.cumsum([0, *map(len, self.sources)])
        self.curriculum = Curriculum(len(self.sources), self._spans())

    def _require_one_tokenizer(self) -> None:
        first = self.sources[0].store
        for rows in self.sources[1:]:
            if rows.store.manifest.tokenizer != first.manifest.tokenizer:
                raise MoaiError(
                    f"{rows.store.path} was prepared with another tokenizer than {first.path}: prepare it again with "
                    f"--tokenizer {first.path}/tokenizer"
                )

    def _spans(self) -> list[Span]:
        """The stages in rows: each ends with a step."""
        spans: list[Span] = []
        for i, stage in enumerate(self.stages):
            weights = self._weights(stage)
            first = (spans[-1].last or 0) if spans else 0
            last = None
            if stage.until is not None:
                last = math.ceil(stage.until / (self.step_rows * self.seq_len)) * self.step_rows
            elif stage.epochs is not None:
                rows = stage.epochs * sum(len(self.sources[number]) for number in weights)
                last = first + math.ceil(rows / self.step_rows) * self.step_rows
            if last is not None and last <= first:
                raise MoaiError(
                    f"data.stages.{i} ends with {last * self.seq_len:,} tokens of the run, and the one before it with "
                    f"{first * self.seq_len:,}: `until` counts from the beginning of the run"
                )
            spans.append(Span(first, last, weights))
        return spans

    def _weights(self, stage: Stage) -> dict[int, float]:
        """Number of a source -> its weight. What a store draws from shares the weight of the store."""
        weights: dict[int, float] = {}
        for source in stage.sources:
            parts = [(self._number[part.store.fingerprint], part.weight) for part in source.store.parts()]
            weight = source.weight or float(sum(len(self.sources[number]) for number, _ in parts))
            for number, share in parts:
                weights[number] = weights.get(number, 0.0) + weight * share
        return weights

    def __len__(self) -> int:
        """Rows in an epoch: of all sources once, or of the stages where each says its end."""
        return self.end or int(self._borders[-1])

    @property
    def end(self) -> int | None:
        """The position at which the last stage ends, where it says so."""
        return self.curriculum.spans[-1].last

    @property
    def packing(self) -> Packing:
        """The rows of all sources, one source after the other."""
        return join([rows.packing for rows in self.sources])

    @property
    def identity(self) -> Any:
        """What must be the same when a run is resumed: the contents of the stores and how they are mixed. JSON."""
        if len(self.sources) == len(self.stages) == 1:
            return self.sources[0].store.fingerprint
        prints = [rows.store.fingerprint for rows in self.sources]
        return [
            {"until_row": span.last, "shares": {prints[n]: share for n, share in zip(span.weights, quotas.shares)}}
            for span, quotas in zip(self.curriculum.spans, self.curriculum.quotas)
        ]

    def step(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of a step, counted from 0; of `world` ranks each takes its own."""
        return self._read(self._at(step * self.step_rows, self.step_rows)[:, rank::world])

    def stage(self, step: int) -> int:
        """Number of the stage that a step is in, counted from 0."""
        return self.curriculum.stage(step * self.step_rows)

    def rows(self, start: int, count: int) -> Batch:
        """Rows start to start + count of the endless stream, stacked."""
        return self._read(self._at(start, count))

    def row(self, index: int) -> Batch:
        """One packed row of an epoch in order: input_ids, labels (-100: nothing to predict), position_ids and seq_idx,
        each (seq_len,).
        """
        return {key: tensor[0] for key, tensor in self._read(self._in_order(np.array([index]))).items()}

    def epoch(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The rows of one pass in batches; the last may be smaller.

        With `limit` so many of them, spread evenly: the first rows hold the longest documents and say little about the
        others.
        """
        rows = int(self._borders[-1])
        total = rows if limit is None else min(limit, rows)
        chosen = (2 * np.arange(total) + 1) * rows // (2 * total)
        for start in range(0, total, batch_size):
            yield self._read(self._in_order(chosen[start : start + batch_size]))

    def _at(self, start: int, count: int) -> np.ndarray:
        """(2, count) int64: source and row of it at positions start to start + count."""
        if self.seed is None:
            return self._in_order((start + np.arange(count)) % self._borders[-1])
        source, index = self.curriculum.locate(start, count)
        for number, rows in enumerate(self.sources):
            here = source == number
            seed = self.seed + number * OTHER_SOURCE
            index[here] = rows_of_stream(index[here], len(rows), seed, self.group)
        return np.stack([source, index])

    def _in_order(self, index: np.ndarray) -> np.ndarray:
        """(2, n) int64: source and row of it, of rows counted over all sources."""
        source = np.searchsorted(self._borders, index, side="right") - 1
        return np.stack([source, index - self._borders[source]])

    def _read(self, places: np.ndarray) -> Batch:
        source, index = places
        shape = len(source), self.seq_len
        made = {name: torch.empty(shape, dtype=dtype, pin_memory=self.pinned) for name, dtype in DTYPES.items()}
        out = Arrays(**{name: tensor.numpy() for name, tensor in made.items()})
        for number in np.unique(source).tolist():
            where = np.flatnonzero(source == number)
            self.sources[number].fill(index[where], where, out)
        return made


# int32 for all was 0.9 to 1.6 times as fast, and each batch would have to be converted: targets are int64
DTYPES = {"input_ids": torch.int64, "labels": torch.int64, "position_ids": torch.int64, "seq_idx": torch.int32}
