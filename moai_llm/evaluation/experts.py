"""What the experts of a model do with text: how evenly they are used, who is chosen together, and whether they
specialise in a language, a file or a kind of token.

Letters: L sparse layers, E experts, K chosen per token, T tokens, D documents. A choice is one of the K of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moai_llm.evaluation.token_classes import CLASSES, token_classes
from moai_llm.inference import TextModel
from moai_llm.modeling.moe import Router
from moai_llm.runtime import MoaiError

TOKEN_CLASS = "token class"
DEAD = 0.1  # of a fair share
PERMUTATIONS = 20
BATCH_TOKENS = {"cpu": 2048}
GPU_BATCH_TOKENS = 32768


class Choice(NamedTuple):
    """What one router said of T tokens."""

    ids: Tensor  # (T, K)
    weights: Tensor  # (T, K)
    probabilities: Tensor  # (T, E)


@contextmanager
def choices(model: Any) -> Iterator[list[Choice]]:
    """A list that each forward of the model adds to: one `Choice` for each sparse layer, in their order."""
    found: list[Choice] = []

    def hear(_: Any, __: Any, said: tuple[Tensor, ...]) -> None:
        weights, ids, probabilities, _logits = said
        found.append(Choice(ids, weights, probabilities))

    hooks = [module.register_forward_hook(hear) for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Counts:
    """Sums over tokens; those of several texts add.

    Attributes:
        layers: number of each sparse layer in the model.
        selected: (L, E) choices of each expert. pairs: (L, E, E) tokens that chose both.
        entropy, first: (L,) sums over tokens of the router's entropy in nats and of its largest weight.
        classes: (L, C, E) choices by token class. documents: of each document (L, E) choices.
        labels: of each document its file and language.
    """

    layers: list[int]
    k: int
    selected: np.ndarray
    pairs: np.ndarray
    entropy: np.ndarray
    first: np.ndarray
    classes: np.ndarray
    tokens: int = 0
    documents: list[np.ndarray] = field(default_factory=list)
    labels: list[dict[str, str]] = field(default_factory=list)

    @property
    def experts(self) -> int:
        return self.selected.shape[1]

    def by_label(self, kind: str) -> tuple[list[str], np.ndarray]:
        """Names of the labels of a kind, and (L, labels, E) choices."""
        if kind == TOKEN_CLASS:
            used = [i for i in range(len(CLASSES)) if self.classes[:, i].any()]
            return [CLASSES[i] for i in used], self.classes[:, used]
        names = sorted({labels[kind] for labels in self.labels})
        found = np.zeros((len(self.layers), len(names), self.experts), dtype=np.int64)
        for labels, counts in zip(self.labels, self.documents):
            found[:, names.index(labels[kind])] += counts
        return names, found

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in ("language", "file", TOKEN_CLASS) if len(self.by_label(kind)[0]) > 1]


def empty(model: Any) -> Counts:
    """Raises `MoaiError` where the model has no router."""
    layers = [i for i, kind in enumerate(getattr(model.config, "mlp_layer_types", None) or ()) if kind == "sparse"]
    if not layers or not any(isinstance(module, Router) for module in model.modules()):
        raise MoaiError("this model has no mixture of experts: no layer of its mlp_layer_types is sparse")
    count, experts = len(layers), model.config.num_experts
    shape = count, experts
    return Counts(
        layers, model.config.num_experts_per_tok, np.zeros(shape, np.int64), np.zeros((*shape, experts), np.int64),
        np.zeros(count), np.zeros(count), np.zeros((count, len(CLASSES), experts), np.int64),
    )  # fmt: skip


@torch.inference_mode()
def observe(
    text_model: TextModel,
    texts: Iterable[tuple[str, dict[str, str]]],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Counts:
    """Send texts through the model, each in windows of its context, and count what its routers choose.

    Args:
        texts: a text and its labels, `file` and `language`.

    Raises:
        MoaiError: the model has no mixture of experts; there is no text.
    """
    counts, classes = empty(text_model.model), token_classes(text_model.tokenizer)
    room = batch_tokens or BATCH_TOKENS.get(text_model.model.device.type, GPU_BATCH_TOKENS)
    waiting: list[tuple[int, list[int]]] = []  # document, tokens of a window
    with choices(text_model.model) as heard:
        for text, labels in texts:
            ids = text_model.tokenizer.encode(text)
            if not ids:
                continue
            counts.labels.append(labels)
            counts.documents.append(np.zeros(counts.selected.shape, np.int32))
            size = text_model.context
            waiting += [(len(counts.labels) - 1, ids[i : i + size]) for i in range(0, len(ids), size)]
            if sum(len(window) for _, window in waiting) >= 8 * room:
                _run(text_model, waiting, counts, classes, heard, room)
                waiting = []
                progress(counts.tokens)
        _run(text_model, waiting, counts, classes, heard, room)
    if not counts.tokens:
        raise MoaiError("nothing to look at: the texts have no tokens")
    return counts


def _run(
    text_model: TextModel,
    windows: list[tuple[int, list[int]]],
    counts: Counts,
    classes: np.ndarray,
    heard: list[Choice],
    room: int,
) -> None:
    """Windows of like length together, padded at their ends."""
    windows = sorted(windows, key=lambda window: -len(window[1]))
    while windows:
        longest = len(windows[0][1])
        batch, windows = windows[: max(1, room // longest)], windows[max(1, room // longest) :]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        real = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (_, window) in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window)
            real[row, : len(window)] = True
        heard.clear()
        text_model.model.base_model(input_ids=ids.to(text_model.model.device), use_cache=False)
        document = np.repeat([number for number, _ in batch], [len(window) for _, window in batch])
        add(counts, heard, real.flatten(), classes[ids[real].numpy()], document)
        heard.clear()


def add(counts: Counts, heard: Sequence[Choice], real: Tensor, classes: np.ndarray, document: np.ndarray) -> None:
    """Count what the routers said of a batch: `real` (T,) is false for padding; class and document are of the rest."""
    experts = counts.experts
    counts.tokens += len(classes)
    for layer, said in enumerate(heard):
        ids = said.ids.cpu()[real].numpy()  # (T, K)
        p = said.probabilities.float().cpu()[real].double()
        chosen = np.zeros((len(ids), experts), dtype=np.int64)
        np.put_along_axis(chosen, ids, 1, axis=1)
        counts.selected[layer] += chosen.sum(0)
        counts.pairs[layer] += (chosen.astype(np.float64).T @ chosen.astype(np.float64)).astype(np.int64)
        counts.entropy[layer] += float(-torch.special.xlogy(p, p).sum())
        counts.first[layer] += float(said.weights.float().cpu()[real].amax(-1).sum())
        np.add.at(counts.classes[layer], classes, chosen)
        for number in np.unique(document):
            counts.documents[number][layer] += chosen[document == number].sum(0)


# ---------------------------------------------------------------- what the counts say


@dataclass
class Layer:
    """One sparse layer.

    Attributes:
        shares: of all choices that fell on each expert; they add up to 1.
        cv: standard deviation of the shares over their mean. max_violation: the largest share over a fair one, less 1.
        effective: exp of the entropy of the shares: as many experts, evenly used, would be as spread.
        dead: experts with less than a tenth of a fair share.
        entropy: of the router's distribution, mean over tokens, over its largest possible; 0 is sure, 1 knows nothing.
        first: the mean weight of a token's first expert.
    """

    number: int
    shares: list[float]
    cv: float
    max_violation: float
    effective: float
    dead: int
    entropy: float
    first: float


def layers(counts: Counts) -> list[Layer]:
    found = []
    for i, number in enumerate(counts.layers):
        shares = counts.selected[i] / counts.selected[i].sum()
        fair, spread = 1 / counts.experts, _entropy(shares)
        entropy = counts.entropy[i] / counts.tokens / math.log(max(2, counts.experts))
        found.append(
            Layer(
                number, shares.tolist(), float(shares.std() / fair), float(shares.max() / fair - 1), math.exp(spread),
                int((shares < DEAD * fair).sum()), float(entropy), float(counts.first[i] / counts.tokens),
            )
        )  # fmt: skip
    return found


def lift(table: np.ndarray) -> np.ndarray:
    """(labels, E) choices -> how many times as often a label chooses an expert as all text does; 1 is no difference."""
    overall = table.sum(0) / max(1, table.sum())
    own = table / np.maximum(1, table.sum(1, keepdims=True))
    return np.divide(own, overall, out=np.ones_like(own), where=overall > 0)


def together(pairs: np.ndarray, k: int) -> np.ndarray:
    """(E, E) tokens that chose both -> how many times as often as if a token's experts were drawn independently of each
    other, each as often as it is; 1 is no relation. The diagonal is 1.
    """
    single = np.diag(pairs).astype(float)
    experts, tokens = len(pairs), single.sum() / k
    if k < 2 or not tokens:
        return np.ones(pairs.shape)
    # of K different experts out of E: two given ones come together a little less often than independent draws would
    expected = np.outer(single, single) / tokens * ((k - 1) * experts / (k * (experts - 1)))
    found = np.divide(pairs, expected, out=np.ones(pairs.shape), where=expected > 0)
    np.fill_diagonal(found, 1.0)
    return found


def information(table: np.ndarray) -> float:
    """How much of the label the expert tells, I(expert; label) / H(label), from 0 to 1; of a table (labels, E) of
    choices.

    Corrected by Miller and Madow for how much a finite number of choices seems to tell by chance.
    """
    total = table.sum()
    rows, columns = table.sum(1), table.sum(0)
    if not total or (rows > 0).sum() < 2:
        return 0.0
    found = _entropy(rows / total) + _entropy(columns / total) - _entropy(table.ravel() / total)
    cells = (table > 0).sum() - (rows > 0).sum() - (columns > 0).sum() + 1
    return float(max(0.0, found - max(0, cells) / (2 * total)) / _entropy(rows / total))


def null(counts: Counts, kind: str, permutations: int = PERMUTATIONS, seed: int = 0) -> np.ndarray:
    """(permutations, L) of `information` where the labels are dealt anew to the documents: what chance tells, since
    choices within a document are alike.
    """
    generator = np.random.default_rng(seed)
    names, _ = counts.by_label(kind)
    label = np.array([names.index(labels[kind]) for labels in counts.labels])
    documents = np.stack(counts.documents)  # (D, L, E)
    found = np.empty((permutations, len(counts.layers)))
    for i in range(permutations):
        dealt = generator.permutation(label)
        tables = np.stack([documents[dealt == j].sum(0) for j in range(len(names))], 1)  # (L, labels, E)
        found[i] = [information(table) for table in tables]
    return found


def _entropy(shares: np.ndarray) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
