"""Can this model learn: does every layer get a gradient, every expert tokens, and does it learn a batch by heart."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.training.clipping import Clip
from moai_llm.training.doctor.finding import Finding
from moai_llm.training.loop import noise_keys, train_step
from moai_llm.training.precision import make_precision

FAR_APART = 1e4  # largest over smallest gradient norm of the layers
PER_EXPERT = 20  # selections an expert should expect, to call it dead if it gets none
STARVED = 0.1  # of its even share
DEAD = 0.01
STEPS, SECONDS = 100, 90.0  # of learning by heart
LEARNED, LITTLE = 0.5, 0.9  # of the first loss


def gradient_flow(model: Any, batch: Batch) -> Finding:
    """One backward: every parameter must get a gradient that is a number and not all zero."""
    model.train()
    model.zero_grad(set_to_none=True)
    ids = batch["input_ids"]
    model(**batch, use_cache=False, noise_key=noise_keys(0, 0, range(len(ids)), ids.device)).loss.backward()
    model.model.take_expert_counts()
    squares: dict[str, float] = defaultdict(float)
    frozen, silent, broken = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        square = 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
        squares[_part(name)] += square
        if not math.isfinite(square):
            broken.append(name)
        elif square == 0:
            silent.append(name)
    model.zero_grad(set_to_none=True)
    norms = {part: math.sqrt(square) if math.isfinite(square) else math.nan for part, square in squares.items()}
    numbers = {"norms": norms, "frozen": frozen, "without_gradient": silent}
    if broken:
        advice = "an operation of that layer overflows: look at it in fp32, and at its initial weights"
        return Finding("gradient flow", "fail", f"gradients that are no numbers: {_some(broken)}", advice, numbers)
    if frozen:
        advice = "requires_grad is off: these never learn. Turn it on, unless you froze them on purpose"
        return Finding("gradient flow", "fail", f"frozen: {_some(frozen)}", advice, numbers)
    if silent:
        advice = "nothing that is learned depends on these: they are detached, multiplied by zero, or not used"
        return Finding("gradient flow", "fail", f"no gradient reaches {_some(silent)}", advice, numbers)
    layers = {part: norm for part, norm in norms.items() if part.startswith("layer ")}
    low, high = min(layers, key=layers.__getitem__), max(layers, key=layers.__getitem__)
    seen = f"gradient norms of the layers from {layers[low]:.2g} ({low}) to {layers[high]:.2g} ({high})"
    if layers[high] > FAR_APART * layers[low]:
        advice = "gradients vanish on the way: look for a layer without a residual path or with tiny initial weights"
        return Finding("gradient flow", "warn", seen, advice, numbers)
    return Finding("gradient flow", "ok", seen, numbers=numbers)


@torch.no_grad()
def expert_use(model: Any, ids: Tensor) -> Finding | None:
    """Which experts the model's routers choose for these tokens; None without experts. Routing noise is off."""
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    if "sparse" not in model.config.mlp_layer_types:
        return None
    model.train()  # counts are kept only while training
    model.model.take_expert_counts()
    for row in ids.split(8):
        model.model(row, use_cache=False, noise_key=None)
    counts = model.model.take_expert_counts()
    load = (counts / counts.sum(-1, keepdim=True).clamp_min(1)).tolist()
    return experts_of(load, f"on {ids.numel():,} tokens", enough=ids.numel() * chosen >= PER_EXPERT * experts)


def experts_of(load: Sequence[Sequence[float]], where: str, *, enough: bool = True) -> Finding:
    """The verdict on a load: a list for each sparse layer, the share of all selections that fell on each expert.

    Args:
        enough: whether so few selections cannot be chance.
    """
    lowest = [min(shares) * len(shares) for shares in load]
    dead = [(i, sum(share * len(shares) < DEAD for share in shares)) for i, shares in enumerate(load)]
    total = sum(count for _, count in dead)
    numbers = {"lowest_of_even_share": lowest, "dead": total}
    if total:
        layers = ", ".join(f"{count} in sparse layer {i + 1}" for i, count in dead if count)
        seen = f"{total} of {sum(map(len, load))} experts are as good as dead {where}: {layers}"
        if not enough:
            return Finding("experts", "warn", seen, "too few tokens to be sure: give it more data", numbers)
        advice = (
            "a dead expert gets no gradient: raise model.router_aux_loss_coef, or lower optim.lr while routers settle"
        )
        return Finding("experts", "fail", seen, advice, numbers)
    seen = f"the least used expert gets {min(lowest):.0%} of its even share {where}"
    if min(lowest) < STARVED:
        return Finding(
            "experts", "warn", seen, "watch expert_cv, and raise model.router_aux_loss_coef if it grows", numbers
        )
    return Finding("experts", "ok", seen, numbers=numbers)


def overfit(model: Any, batch: Batch, *, steps: int = STEPS, seconds: float = SECONDS) -> Finding:
    """A model that can learn learns one batch by heart. Changes the weights of `model`: run it last."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return Finding("overfit one batch", "fail", "no parameter learns", "turn requires_grad on")
    # a rate that small models like and large ones survive
    lr = min(1e-2, 0.6 / model.config.hidden_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    precision = make_precision("fp32", batch["input_ids"].device, tf32=False)
    model.train()
    losses: list[float] = []
    clip = Clip(model)
    began = time.perf_counter()
    for step in range(steps):
        warm = lr * min(1.0, (step + 1) / 5)
        result = train_step(model, optimizer, precision, [batch], lr=warm, clip=clip, noise_seed=(0, step))
        losses.append(result.numbers["loss"])
        enough = losses[-1] < 0.9 * LEARNED * losses[0]
        if enough or not math.isfinite(losses[-1]) or time.perf_counter() - began > seconds:
            break
    seen = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps on {batch['input_ids'].numel()} tokens"
    numbers = {"first": losses[0], "last": losses[-1], "steps": len(losses), "lr": lr}
    if not losses[-1] < LITTLE * losses[0]:
        advice = (
            "the model does not learn even what it sees every step: look at the other checks first, then at the loss"
        )
        return Finding("overfit one batch", "fail", seen, advice, numbers)
    if losses[-1] > LEARNED * losses[0]:
        advice = "slow, though it learns: a large model on a slow machine may only need more steps"
        return Finding("overfit one batch", "warn", seen, advice, numbers)
    return Finding("overfit one batch", "ok", seen, numbers=numbers)


def _part(name: str) -> str:
    """model.layers.3.mixer.q_proj.weight -> layer 4; anything else by its module."""
    words = name.split(".")
    if "layers" in words:
        return f"layer {int(words[words.index('layers') + 1]) + 1}"
    return words[-2] if len(words) > 1 else name


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
