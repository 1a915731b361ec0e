"""Log-probabilities of given tokens, fast: sequences of like length in a batch, what several share computed once, and
logits formed only where a token is asked for.

A model may have more rows than its tokenizer has tokens, so that sizes are round. They stand for no token, and no
answer is ever drawn from them; so a probability is always one among the tokens that there are: here, in
`perplexity.evaluate`, `long_context.token_scores` and `inference.server.scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moai_llm.evaluation.prefixes import Node, fork, tree
from moai_llm.modeling.model import MoaiForCausalLM, new_cache
from moai_llm.modeling.rope import BY_LENGTH
from moai_llm.ops.logit_chunks import default_chunk_rows

BATCH_TOKENS = {"cpu": 4096}  # tokens of a batch, padding included
GPU_BATCH_TOKENS = 32768
KEPT = 8  # keys that a batch may look back at, for each token of a batch
WORTH = {"cpu": 64}  # tokens that a shared beginning must save: a call of the model costs about half as many
GPU_WORTH = 2048


class Request(NamedTuple):
    """A sequence of tokens, and the first of them that is asked for: at least 1, for the first has no context."""

    tokens: Sequence[int]
    start: int


class Scored(NamedTuple):
    """For each token that was asked for its log-probability (fp64) and whether the model finds no other more likely."""

    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        return float(self.log_probs.sum())


class Batch(NamedTuple):
    """Rows that go through the model together: the ends of these nodes, after the same past."""

    nodes: list[Node]
    cache: Any
    keep: bool  # the cache is needed afterwards


@torch.inference_mode()
def score(
    model: Any,
    requests: Sequence[Request],
    *,
    vocabulary: int,
    share: bool = True,
    batch_tokens: int | None = None,
    worth: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scored]:
    """What a model thinks of the tokens of each request, in the order of the requests.

    Args:
        vocabulary: how many ids have a probability: the tokenizer's, which may be fewer than the model has rows.
        share: compute what requests share only once, where that is worth it.
        batch_tokens: tokens of a batch, padding included.
        worth: tokens that a shared beginning must save.
        progress: called with how many requests are done.
    """
    assert all(1 <= request.start < len(request.tokens) for request in requests)
    device = model.device.type
    inputs = [list(request.tokens[:-1]) for request in requests]
    exact = _by_length(model)
    share = share and not exact and isinstance(model, MoaiForCausalLM)
    room = batch_tokens or BATCH_TOKENS.get(device, GPU_BATCH_TOKENS)
    enough = (WORTH.get(device, GPU_WORTH) if worth is None else worth) if share else 1 << 60
    found = [Scored(np.empty(len(r.tokens) - r.start), np.zeros(len(r.tokens) - r.start, dtype=bool)) for r in requests]
    done = 0
    waiting: list[tuple[list[Node], Any]] = [(tree(inputs, enough), None)]
    while waiting:  # depth first, so that few caches are kept at a time
        nodes, past = waiting.pop()
        for batch in _batches(nodes, past, room, exact):
            hidden, cache = _forward(model, batch, inputs)
            _read(model, hidden, batch.nodes, requests, found, vocabulary)
            for node in batch.nodes:
                finished = {i for child in node.children for i in child.members}
                done += len(node.members) - len(finished)
            if batch.keep:
                waiting.append((batch.nodes[0].children, cache))
            progress(done)
    return found


def _by_length(model: Any) -> bool:
    """Whether the model's RoPE depends on how long a row becomes: then only rows of one length go together."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type") in BY_LENGTH


def _batches(nodes: list[Node], past: Any, room: int, exact: bool) -> Iterator[Batch]:
    """Nodes that go on by themselves, each after a cache of its own; the others together, the longest first."""
    for node in nodes:
        if node.children:
            yield Batch([node], past, True)
    seen = past.get_seq_length() if past is not None else 0
    rows: list[Node] = []
    for node in sorted((n for n in nodes if not n.children), key=lambda n: n.begin - n.end):
        longest = rows[0].end - rows[0].begin if rows else 0
        full = (len(rows) + 1) * longest > room or (len(rows) + 1) * (seen + longest) > KEPT * room
        if rows and (full or exact and node.end - node.begin != longest):
            yield Batch(rows, past, False)
            rows = []
        rows.append(node)
    if rows:
        yield Batch(rows, past, False)


def _forward(model: Any, batch: Batch, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Any]:
    """Hidden states (rows, L, d), shorter rows padded at their end, where no token of theirs looks; and the cache."""
    pieces = [inputs[node.members[0]][node.begin : node.end] for node in batch.nodes]
    ids = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
    options: dict[str, Any] = {"use_cache": False}
    if batch.cache is not None:
        options = {"use_cache": True, "past_key_values": fork(batch.cache, len(pieces))}
    elif batch.keep:
        options = {"use_cache": True, "past_key_values": new_cache(model.config)}
    output = model.base_model(input_ids=ids.to(model.device), **options)
    return output.last_hidden_state, options.get("past_key_values")


def _read(
    model: Any,
    hidden: Tensor,
    nodes: Sequence[Node],
    requests: Sequence[Request],
    found: Sequence[Scored],
    vocabulary: int,
) -> None:
    """Write what these hidden states say of the tokens asked for. Where several ask at one place, its logits are formed
    once.
    """
    wanted, rows, targets, into, count = [], [], [], [], 0
    for row, node in enumerate(nodes):
        begins = {i: max(node.begin, requests[i].start - 1) for i in node.members}  # where a member first asks
        first = min(begins.values())
        if first >= node.end:
            continue
        wanted.append(hidden[row, first - node.begin : node.end - node.begin])
        for i, begin in begins.items():
            if begin < node.end:
                rows.append(np.arange(count + begin - first, count + node.end - first))
                targets.append(np.asarray(requests[i].tokens[begin + 1 : node.end + 1], dtype=np.int64))
                offset = begin + 1 - requests[i].start
                into.append((i, slice(offset, offset + node.end - begin)))
        count += node.end - first
    if not wanted:
        return
    all_rows, all_targets = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(targets))
    log_probs, greedy = (t.numpy() for t in _log_probs(model, torch.cat(wanted), all_rows, all_targets, vocabulary))
    done = 0
    for i, part in into:
        count = part.stop - part.start
        found[i].log_probs[part], found[i].greedy[part] = log_probs[done : done + count], greedy[done : done + count]
        done += count


def _log_probs(model: Any, hidden: Tensor, rows: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Of `targets` (N,) at `rows` (N,) of hidden (R, d): log-probabilities (N,) fp64 and whether each is the largest.

    The logits of a part of the rows are in memory at a time.
    """
    head = model.get_output_embeddings()
    size = default_chunk_rows(vocabulary, hidden.device.type)
    log_probs = torch.empty(len(rows), dtype=torch.float64)
    greedy = torch.empty(len(rows), dtype=torch.bool)
    for start in range(0, len(hidden), size):
        logits = head(hidden[start : start + size])[:, :vocabulary]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        here = ((rows >= start) & (rows < start + size)).nonzero().squeeze(1)
        row, target = (rows[here] - start).to(logits.device), targets[here].to(logits.device)
        normaliser = torch.logsumexp(logits, -1)
        log_probs[here] = (logits[row, target] - normaliser[row]).double().cpu()
        greedy[here] = (logits.argmax(-1)[row] == target).cpu()
    return log_probs, greedy
