"""Loss, perplexity and bits per byte. Bits per byte does not depend on the tokenizer: use it to compare models of
different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from moai_llm.data.loader import Batch
from moai_llm.evaluation.scoring import Request, score
from moai_llm.inference import TextModel
from moai_llm.losses import Loss, shift_labels
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

PLAIN = Loss()
AHEAD = 16  # batches of windows that are read before the longest of them is run: like lengths then go together
WINDOW_TOKENS = {"cpu": 4096}
GPU_WINDOW_TOKENS = 65536


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


NOTHING = Perplexity(0.0, 0, 0)


@torch.no_grad()
def evaluate(
    model: Any, batches: Iterable[Batch], tokenizer: Tokenizer, autocast: AbstractContextManager[Any] | None = None
) -> Perplexity:
    """Plain next-token cross-entropy over packed batches, among the tokens there are: see `scoring.py`.

    Args:
        autocast: precision of the forward; the model's own when None.

    Raises:
        MoaiError: no batch has a target.
    """
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    total = NOTHING
    context = autocast or nullcontext()
    for batch in batches:
        targets = shift_labels(batch["labels"])
        inputs = {key: tensor.to(model.device) for key, tensor in batch.items() if key != "labels"}
        with context:
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            head = model.lm_head.weight[: tokenizer.vocab_size]
            sums = PLAIN.sums(hidden.flatten(0, 1), head, targets.flatten().to(model.device))
        wanted = targets[targets != -100]
        total += Perplexity(float(sums.cross_entropy), len(wanted), int(lengths[wanted].sum()))
    if not total.targets:
        raise MoaiError("nothing to predict: the text has fewer than two tokens")
    return total


class Document(NamedTuple):
    """What was found on one text, with what the caller gave along."""

    text: str
    given: Any
    found: Perplexity


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first predicted) of the pieces of a text: each token is predicted once, except those at the
    beginning of a piece that shares nothing with the one before it.

    A piece begins every `stride` tokens. From the second one on only what is new in it is predicted, each token after
    at least window - stride others.
    """
    predicted = 0
    for begin in range(0, max(1, tokens - 1), stride):
        end = min(begin + window, tokens)
        first = max(predicted, begin + 1)
        if first < end:
            yield begin, end, first
            predicted = end
        if end == tokens:
            return


def measure(
    text_model: TextModel,
    texts: Iterable[tuple[str, Any]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Document]:
    """Each text of at least two tokens, in order, as soon as it is known.

    Args:
        texts: a text and what is to come back with it.
        window: tokens of context at most; the model's when None.
        stride: tokens from the beginning of one window to that of the next; the window when None.
        batch_tokens: tokens that go through the model at once.
        progress: called with how many tokens are done.

    Raises:
        MoaiError: a window of fewer than two tokens, or a stride that leaves tokens out.
    """
    context = text_model.context
    size = min(window or context, context) if text_model.bounded else window or context
    step = stride or size
    if size < 2:
        raise MoaiError(f"--window {size}: a window holds at least two tokens")
    if not 1 <= step <= size:
        raise MoaiError(f"--stride {step}: from 1 to the window, which is {size}; tokens in between would be left out")
    lengths = text_model.tokenizer.byte_lengths()
    room = batch_tokens or WINDOW_TOKENS.get(text_model.model.device.type, GPU_WINDOW_TOKENS)
    requests: list[Request] = []
    waiting: list[tuple[str, Any, np.ndarray, int]] = []  # text, given, ids, how many of the requests are its
    tokens = done = 0

    def flush() -> Iterator[Document]:
        nonlocal done
        scored = iter(
            score(
                text_model.model, requests, vocabulary=text_model.tokenizer.vocab_size, share=False, batch_tokens=room
            )
        )
        for text, given, ids, count in waiting:
            parts = [next(scored) for _ in range(count)]
            targets = sum(len(part.log_probs) for part in parts)
            done += len(ids)
            progress(done)
            nats = -sum(part.total for part in parts)
            yield Document(text, given, Perplexity(nats, targets, predicted_bytes(ids)))

    def predicted_bytes(ids: np.ndarray) -> int:
        return sum(int(lengths[ids[first:end]].sum()) for _, end, first in windows(len(ids), size, step))

    for text, given in texts:
        ids = np.asarray(text_model.tokenizer.encode(text), dtype=np.int64)
        pieces = list(windows(len(ids), size, step))
        if not pieces:
            continue
        requests += [Request(ids[begin:end].tolist(), first - begin) for begin, end, first in pieces]
        waiting.append((text, given, ids, len(pieces)))
        tokens += sum(end - begin for begin, end, _ in pieces)
        if tokens >= AHEAD * room:
            yield from flush()
            requests, waiting, tokens = [], [], 0
    if waiting:
        yield from flush()


def evaluate_text(text_model: TextModel, text: str, window: int | None = None, stride: int | None = None) -> Perplexity:
    """Perplexity of one text, in windows of the model's context.

    Raises:
        MoaiError: the text has fewer than two tokens.
    """
    for document in measure(text_model, [(text, None)], window=window, stride=stride):
        return document.found
    raise MoaiError("nothing to predict: the text has fewer than two tokens")
