"""Texts to vectors: `embed(load_embedder(PATH), texts)` is (texts, D)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moai_llm.config import read_config
from moai_llm.inference.load import pick_dtype, resolve_model
from moai_llm.modeling.embedding import MoaiForEmbedding, load_for_vectors
from moai_llm.runtime import pick_device
from moai_llm.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from moai_llm.inference.vector_file import PartialVectors

BATCH_TOKENS = 8192  # that go through the model at once


@dataclass
class Embedder:
    """A model that makes vectors, with its tokenizer.

    Attributes:
        trained: whether it was trained for vectors; else it is a language model whose hidden states are taken as they
            are.
    """

    model: MoaiForEmbedding
    tokenizer: Tokenizer
    path: Path
    trained: bool

    @property
    def context(self) -> int:
        """Tokens the model was made for; what is longer loses its end."""
        return int(self.model.config.max_position_embeddings)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text with the end-of-text token, at most `max_length` and what the model takes."""
        limit = min(max_length or self.context, self.context)
        end = self.tokenizer.eos_id
        return [[*ids[: limit - 1], end] for ids in self.tokenizer.encode_batch(texts)]


def load_embedder(path: str | Path, device: str = "auto", dtype: str = "auto") -> Embedder:
    """Load a model directory or a run (its newest checkpoint). A language model becomes the mean of its hidden states.

    Args:
        dtype: fp32 | bf16 | fp16, or auto: bf16 where the device is faster in it, else fp32.

    Raises:
        MoaiError: there is none, or it is not one of ours.
    """
    directory, target = resolve_model(path), pick_device(device)
    trained = read_config(directory / "config.json").embedding is not None
    model = load_for_vectors(directory, dtype=pick_dtype(dtype, target))
    return Embedder(model.to(target).eval(), load_tokenizer(directory), directory, trained)  # type: ignore[arg-type]


@torch.inference_mode()
def embed(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
    partial: PartialVectors | None = None,
) -> np.ndarray:
    """(texts, D) fp32, in the order of the texts. Texts of similar length go through the model together.

    Args:
        max_length: tokens of a text, its end included; what the model was made for when None.
        progress: called with the number of texts done since the last call.
        partial: where each batch is kept, and those of an earlier run are found.
    """
    ids, device = embedder.encode(texts, max_length), embedder.model.device
    vectors = np.zeros((len(ids), embedder.model.width), np.float32) if partial is None else partial.vectors
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    start = 0
    while start < len(order):
        longest = len(ids[order[start]])
        batch = order[start : start + max(1, batch_tokens // longest)]
        start += len(batch)
        if partial is not None and partial.done[batch].all():  # half a batch is done again: its rows are rounded alike
            progress(len(batch))
            continue
        rows = torch.full((len(batch), longest), embedder.tokenizer.pad_id)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            rows[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        found = embedder.model(rows.to(device), attention_mask=mask.to(device)).embeddings
        vectors[batch] = found.float().cpu().numpy()
        if partial is not None:
            partial.add(batch, vectors[batch])
        progress(len(batch))
    return vectors
