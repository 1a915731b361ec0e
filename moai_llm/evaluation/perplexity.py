"""Loss, perplexity and bits per byte. Bits per byte does not depend on the tokenizer: use it to compare models of
different ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moai_llm.data.loader import Batch
from moai_llm.inference.load import TextModel
from moai_llm.losses import Loss, shift_labels
from moai_llm.runtime import MoaiError

PLAIN = Loss()


@dataclass(frozen=True)
class Perplexity:
    nats: float  # summed over targets
    targets: int
    bytes: int  # of text those targets stand for

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.nats + other.nats, self.targets + other.targets, self.bytes + other.bytes)


@torch.no_grad()
def evaluate(
    model: Any, batches: Iterable[Batch], byte_lengths: np.ndarray, autocast: AbstractContextManager[Any] | None = None
) -> Perplexity:
    """Plain next-token cross-entropy over packed batches.

    Args:
        byte_lengths: (V,) bytes of text per token id (`Tokenizer.byte_lengths`).
        autocast: precision of the forward; the model's own when None.

    Raises:
        MoaiError: no batch has a target.
    """
    lengths = torch.from_numpy(byte_lengths)
    total = Perplexity(0.0, 0, 0)
    context = autocast or nullcontext()
    for batch in batches:
        targets = shift_labels(batch["labels"])
        inputs = {key: tensor.to(model.device) for key, tensor in batch.items() if key != "labels"}
        with context:
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            sums = PLAIN.sums(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten().to(model.device))
        wanted = targets[targets != -100]
        total += Perplexity(float(sums.cross_entropy), len(wanted), int(lengths[wanted].sum()))
    if not total.targets:
        raise MoaiError("nothing to predict: the text has fewer than two tokens")
    return total


def evaluate_text(text_model: TextModel, text: str, window: int | None = None) -> Perplexity:
    """Perplexity of one text, in windows of the model's context."""
    size = min(window or text_model.context, text_model.context)
    ids = text_model.tokenizer.encode(text)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    batches = ({"input_ids": t, "labels": t} for t in (torch.tensor([piece]) for piece in pieces if len(piece) > 1))
    return evaluate(text_model.model, batches, text_model.tokenizer.byte_lengths())
