"""Laws a language model obeys, tried on the user's own: it does not see the future, documents do not leak, a step of
many micro-batches is the step of one big batch, and an untrained model knows nothing.

In fp32 a law holds to rounding. What is compared is relative: how much moved that must not move, against how much moved
that must.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moai_llm.data.loader import Batch
from moai_llm.training.clipping import Clip
from moai_llm.training.doctor.finding import Finding
from moai_llm.training.loop import train_step
from moai_llm.training.precision import make_precision

LEAK = 1e-3  # of the effect that must be there: rounding stays below a thousandth of this, a leak is about 1
SAME = 1e-3  # relative difference of two gradients that must be equal
ODD, WRONG = 0.10, 0.25  # initial loss: how far from ln V, as a share of it


@torch.no_grad()
def causality(model: Any, ids: Tensor) -> Finding:
    """Changing a token must not change logits before it (the "crystal ball").

    Args:
        ids: (rows, length) at least three tokens long.
    """
    worst, at, layer = 0.0, 0, ""
    with _evaluating(model):
        before = _logits(model, ids)
        for t in sorted({1, ids.shape[1] // 2, ids.shape[1] - 1}):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
            after = _logits(model, changed)
            effect = float((after[:, t] - before[:, t]).abs().max())
            if not effect > 0:  # also where the logits are not numbers
                seen = f"the logits of token {t} do not depend on it"
                return Finding("causality", "fail", seen, "the weights are broken, or all zero: look at them")
            share = float((after[:, :t] - before[:, :t]).abs().max()) / effect
            if not share <= worst:
                worst, at = share, t
        if not worst <= LEAK:
            changed = ids.clone()
            changed[:, at] = (changed[:, at] + 1) % model.config.vocab_size
            layer = _first_difference(model, lambda: _logits(model, ids), lambda: _logits(model, changed), slice(0, at))
    numbers = {"largest_share": worst}
    if not worst <= LEAK:
        return Finding(
            "causality", "fail",
            f"token {at} changes logits before it, by {worst:.0%} of what it changes its own{layer}",
            "the model sees what it is to predict: its loss will be too good and its text bad. Look at the mask of "
            "that layer, the padding of a convolution, or whatever mixes a whole row", numbers,
        )  # fmt: skip
    return Finding("causality", "ok", f"no token changes a logit before it (at most {worst:.1g} of its own change)",
                   numbers=numbers)  # fmt: skip


@torch.no_grad()
def packing(model: Any, ids: Tensor) -> Finding:
    """Documents that share a row must not see each other, and each must give what it gives alone."""
    length = ids.shape[1]
    borders = sorted({0, length // 3, length // 3 + 1, length // 3 + length // 4 + 1, length})
    sizes = [b - a for a, b in zip(borders, borders[1:])]
    row = ids[:1]
    where = {
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None].to(ids.device),
        "seq_idx": torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])[None].int().to(ids.device),
    }
    first = sizes[0]
    changed = row.clone()
    changed[:, :first] = (changed[:, :first] + 1) % model.config.vocab_size
    with _evaluating(model):
        packed, after = _logits(model, row, **where), _logits(model, changed, **where)
        effect = float((after[:, :first] - packed[:, :first]).abs().max())
        leak = float((after[:, first:] - packed[:, first:]).abs().max()) / max(effect, 1e-30)
        alone = torch.cat([_logits(model, part) for part in row.split(sizes, 1)], 1)
        apart = float((packed - alone).abs().max()) / max(effect, 1e-30)
        layer = ""
        if not leak <= LEAK:
            layer = _first_difference(
                model,
                lambda: _logits(model, row, **where),
                lambda: _logits(model, changed, **where),
                slice(first, None),
            )
    numbers = {"leak": leak, "difference_to_alone": apart}
    if not leak <= LEAK:
        return Finding(
            "packing", "fail", f"a document changes the next one in its row, by {leak:.0%} of its own change{layer}",
            "that layer does not respect seq_idx: start its state anew, or mask, where a document begins. Until then "
            "train with data.packing=none", numbers,
        )  # fmt: skip
    if not apart <= LEAK:
        return Finding(
            "packing", "fail", f"a document in a row gives other logits than alone, by {apart:.0%}",
            "nothing leaks, but positions or states do not begin anew with a document: look at position_ids", numbers,
        )  # fmt: skip
    return Finding("packing", "ok", f"documents of a row do not see each other (at most {leak:.1g})", numbers=numbers)


@torch.no_grad()
def initial_loss(model: Any, ids: Tensor) -> Finding:
    """On random tokens an untrained model can do no better and should do no worse than a guess: ln V."""
    expected = math.log(model.config.vocab_size)
    with _evaluating(model):
        loss = float(model(ids, labels=ids, use_cache=False, return_logits=False).cross_entropy)
    seen = f"{loss:.3f} on random tokens; a guess has ln {model.config.vocab_size:,} = {expected:.3f}"
    numbers = {"loss": loss, "expected": expected}
    if not math.isfinite(loss):
        return Finding(
            "initial loss", "fail", seen, "the first loss is no number: look at the initial weights", numbers
        )
    if loss < expected - ODD * expected:
        advice = "an untrained model cannot know random tokens: it sees its targets, or labels are not shifted"
        return Finding("initial loss", "fail", seen, advice, numbers)
    far = (loss - expected) / expected
    if far > ODD:
        advice = "the initial logits are too large: lower model.initializer_range (0.02 is common), or look for a " \
                 "layer without a norm before it"  # fmt: skip
        return Finding("initial loss", "fail" if far > WRONG else "warn", seen, advice, numbers)
    return Finding("initial loss", "ok", seen, numbers=numbers)


def accumulation(model: Any, batch: Batch) -> Finding:
    """The gradient of micro-batches with unequal numbers of targets, summed, against that of the whole batch.

    Through the real training step.
    """
    batch = _uneven(batch)
    whole = _gradient(model, [batch])
    rows = batch["input_ids"].shape[0]
    parts = _gradient(model, [{key: t[i : i + 1] for key, t in batch.items()} for i in range(rows)])
    norm = float(whole.norm())
    far = float((parts - whole).norm()) / max(norm, 1e-30)
    numbers = {"difference": far, "grad_norm": norm}
    seen = f"{rows} micro-batches against one batch: gradients differ by {far:.1g} of their norm"
    if not far <= SAME:
        return Finding(
            "accumulation", "fail", seen,
            "a micro-batch must add its sum divided by num_items_in_batch, not its own mean: else short rows weigh "
            "more and train.micro_batch_size changes the training", numbers,
        )  # fmt: skip
    return Finding("accumulation", "ok", seen, numbers=numbers)


def _gradient(model: Any, batches: Sequence[Batch]) -> Tensor:
    """All gradients of one training step as a vector; the weights stay."""
    found: list[Tensor] = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)

    def keep(*_: Any) -> None:
        found.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trainable])
        )

    optimizer.register_step_pre_hook(keep)
    model.train()
    precision = make_precision("fp32", trainable[0].device, tf32=False)
    train_step(model, optimizer, precision, batches, lr=0.0, clip=Clip(model, max_norm=float("inf")))
    return found[0]


def _uneven(batch: Batch) -> Batch:
    """Row i learns only what stands behind the first i / rows of it."""
    labels = batch["labels"].clone()
    rows, length = labels.shape
    for i in range(rows):
        labels[i, : i * length // rows] = -100
    return {**batch, "labels": labels}


def _logits(model: Any, ids: Tensor, **where: Tensor) -> Tensor:
    return model(ids, use_cache=False, **where).logits.float()


def _first_difference(model: Any, one: Callable[[], Any], other: Callable[[], Any], positions: slice) -> str:
    """ ", first in layer 3 (Attention)": the first layer whose output differs there; "" where that cannot be told."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        return ""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for layer in layers]
    try:
        one()
        first, outputs = outputs, []
        other()
    finally:
        for hook in hooks:
            hook.remove()
    for i, (a, b) in enumerate(zip(first, outputs)):
        scale = max(float((a - b).abs().max()), 1e-30)
        if not float((a[:, positions] - b[:, positions]).abs().max()) <= LEAK * scale:
            return f", first in layer {i + 1} ({type(layers[i].mixer).__name__})"
    return ""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
