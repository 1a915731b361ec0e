"""A learning rate from a short test: the rate rises from far too low to far too high while a copy of the model trains
on the data of the run, and the loss shows where learning sets in and where it breaks (arXiv 1506.01186, section 3.3).

Nothing of the run changes: its model, its random state and its directory are as they were.
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moai_llm.data.loader import Loader, open_stages
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, keep_freed_memory, pick_device, seed_everything
from moai_llm.training.build import active_parameters, build_model, build_objective
from moai_llm.training.clipping import Clip
from moai_llm.training.feed import open_data
from moai_llm.training.fitting import rows_of
from moai_llm.training.loop import train_step
from moai_llm.training.lr_guide import guide, kind_of_run
from moai_llm.training.micro_batches import split_rows
from moai_llm.training.objective import NextToken, Objective
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import Precision, make_precision

STEPS = 100
BELOW, ABOVE = 30.0, 100.0  # how far outside the usual range the test begins and ends
SPAN = 3  # steps on either side that a smoothed loss is the mean of
SAFETY = 4.0  # the suggestion is so many times below the rate of the lowest loss, where it is about to rise again
BAR = 44

Progress = Callable[[int, float, float], None]  # step, learning rate, loss


@dataclass(frozen=True)
class Found:
    """Rates and losses of the test, in its order; the loss smoothed over its neighbours."""

    rates: list[float]
    losses: list[float]

    @property
    def smooth(self) -> list[float]:
        windows = (self.losses[max(0, i - SPAN) : i + SPAN + 1] for i in range(len(self.losses)))
        return [sum(window) / len(window) for window in windows]

    @property
    def lowest(self) -> int:
        """The step of the lowest smoothed loss."""
        smooth = self.smooth
        return min(range(len(smooth)), key=smooth.__getitem__)

    @property
    def broken(self) -> bool:
        """Half of what was learned is lost again, or, where little was, a third was added to the lowest loss."""
        smooth = self.smooth
        first, lowest, last = smooth[0], min(smooth), smooth[-1]
        learned = first - lowest > lowest / 20
        return last - lowest > ((first - lowest) / 2 if learned else lowest / 3)

    @property
    def suggested(self) -> float | None:
        """None where the loss never fell: its noise alone must not look like learning."""
        smooth = self.smooth
        noise = max((abs(a - b) for a, b in zip(self.losses, smooth)), default=0.0)
        return self.rates[self.lowest] / SAFETY if smooth[0] - smooth[self.lowest] > noise / 2 else None


def find_lr(recipe: Recipe, progress: Progress = lambda step, lr, loss: None, steps: int = STEPS) -> Found:
    """Test the learning rates of a recipe from its beginning: a fresh model, or that of `train.init_from`.

    Raises:
        MoaiError: the recipe has no data, or the loss is not finite from the first step on.
    """
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    tokenizer = open_stages(recipe.data)[0].sources[0].store.tokenizer()
    objective = build_objective(recipe, tokenizer)
    if objective.reads != "rows":
        raise MoaiError(f"--find-lr looks at the loss of the next token, and loss.type={recipe.loss.type} is none")
    loader = open_data(recipe, max(1, recipe.train.batch_tokens // recipe.data.seq_len), device)
    assert isinstance(loader, Loader)
    store = loader.sources[-1].store
    model = build_model(recipe, tokenizer, device)
    kind = kind_of_run(store.manifest.kind, recipe.train.init_from, lora=recipe.lora.rank > 0)
    low, high = guide(kind, active_parameters(model), recipe.optim.name) or (1e-2, 1.0)  # of plain SGD
    precision = make_precision(recipe.train.precision, device, recipe.train.tf32)
    objective.prepare(model, store, precision, resumed=False, quiet=True)
    low, high = low / BELOW, high * ABOVE
    return sweep(model, recipe, loader, precision, low, high, steps, progress, objective=objective, keep=False)


def sweep(
    model: MoaiForCausalLM, recipe: Recipe, loader: Loader, precision: Precision, low: float, high: float, steps: int,
    progress: Progress = lambda step, lr, loss: None, *,
    objective: Objective | None = None, keep: bool = True,
) -> Found:  # fmt: skip
    """Train a copy of the model for at most so many steps, the learning rate rising from `low` to `high` by the same
    factor each step, until the loss has broken.

    Args:
        keep: false where nobody needs the model afterwards: it is then trained itself, without a copy.
        keep: false where nobody needs the model afterwards: it is then trained itself, which saves a copy.
    """
    rates: list[float] = []
    losses: list[float] = []
    with torch.random.fork_rng(devices=[precision.device] if precision.device.type == "cuda" else []):
        trial, load = (copy.deepcopy(model) if keep else model).train(), None
        optimizer = make_optimizer(trial, recipe.optim, on_host=recipe.train.host_optimizer)
        clip, rows = Clip(trial, recipe.clip, recipe.train.max_grad_norm), rows_of(recipe)
        for step in range(steps):
            lr = low * (high / low) ** (step / max(1, steps - 1))
            batches = split_rows(loader.step(step), rows)
            result = train_step(
                trial, optimizer, precision, batches, objective or NextToken(), lr=lr, clip=clip, router_load=load,
                noise_seed=(recipe.train.seed, step),
            )  # fmt: skip
            load = result.expert_load
            if not math.isfinite(result.numbers["loss"]):
                break
            rates.append(lr)
            losses.append(result.numbers["loss"])
            progress(step + 1, lr, result.numbers["loss"])
            if Found(rates, losses).broken:
                break
    if not losses:
        raise MoaiError("the loss is not finite at the first step: check the data and train.precision")
    return Found(rates, losses)


def plot(found: Found, lines: int = 22) -> str:
    """Bars of the smoothed loss over the learning rate, for a terminal."""
    smooth, suggested = found.smooth, found.suggested
    top, bottom = smooth[0], smooth[found.lowest]
    every = max(1, -(-len(smooth) // lines))
    shown = range(0, len(smooth), every)
    near = min(shown, key=lambda i: abs(math.log(found.rates[i] / (suggested or found.rates[i]))))
    text = []
    for i in shown:
        width = round(BAR * min(1.0, max(0.0, (smooth[i] - bottom) / (top - bottom or 1.0))))
        marks = " <- suggested" if suggested and i == near else ""
        marks += " <- lowest loss" if i <= found.lowest < i + every else ""
        text.append(f"{found.rates[i]:.1e}  {smooth[i]:7.3f}  {'#' * width}{marks}")
    return "\n".join(["     lr     loss", *text])


def write_csv(found: Found, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["step", "lr", "loss", "smoothed"])
        for i, numbers in enumerate(zip(found.rates, found.losses, found.smooth), 1):
            writer.writerow([i, *numbers])
