"""The training loop: pretraining, continued pretraining and fine-tuning differ only by their data, loss and starting
weights.

The loss of a step is the sum over all its targets divided by their number, counted before the first backward: a step
of many micro-batches is exactly the step of one big batch. What it must not know: how data is made, how a model is
evaluated or sampled (hooks), which bricks a model has.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm import recipe as recipes
from moai_llm.data.loader import Batch
from moai_llm.data.shards import Store
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, keep_freed_memory, pick_device, seed_everything, write_atomically
from moai_llm.training.build import build_model, build_objective
from moai_llm.training.checkpoint import Checkpoints, restore
from moai_llm.training.monitor import Monitor
from moai_llm.training.objective import NextToken, Objective, add_up, to_floats
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import Precision, make_precision
from moai_llm.training.schedules import learning_rate
from moai_llm.training.start import discard, find_start, total_steps, with_model_of

logger = logging.getLogger("moai_llm")
# called at a step border with (step, model); what it returns is logged
Hook = Callable[[int, MoaiForCausalLM], dict[str, float]]


class Trained(NamedTuple):
    """Where a call of `train` left the run."""

    checkpoint: Path
    finished: bool  # false: a signal stopped it before its last step


@dataclass
class StepResult:
    numbers: dict[str, float]  # what the objective says of the step, see `MicroBatch`
    grad_norm: float
    targets: int
    expert_load: Tensor | None  # (sparse layers, E) share of all selections in this step


def train(
    recipe: Recipe,
    *,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    fresh: bool = False,
    title: str = "train",
    quiet: bool = False,
) -> Trained:
    """Run a recipe to its end, or to the next step border after SIGTERM or SIGINT.

    Args:
        hooks: run every `eval.every` steps and at the end, after the checkpoint of that step; see `Hook`.
        resume: go on from the newest sound checkpoint of `train.out`, exactly where it stopped.
        fresh: delete the run in `train.out`, once everything else is known to be in order.

    Raises:
        MoaiError: the recipe lacks data or a length, the directory already holds a run, a checkpoint cannot be
            written, or the loss is not finite.
    """
    if not recipe.data.train:
        raise MoaiError("data.train is not set: give a store made by `moai data prepare`, e.g. data.train=data/wiki")
    out = Path(recipe.train.out)
    checkpoints = Checkpoints(out / "checkpoints", recipe.checkpoint.keep_last)
    latest, begun = find_start(recipe, checkpoints, resume=resume, fresh=fresh)
    device = pick_device(recipe.train.device)
    precision = make_precision(recipe.train.precision, device, recipe.train.tf32)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    store = Store(recipe.data.train)
    tokenizer = store.tokenizer()
    rows = max(1, recipe.train.batch_tokens // recipe.data.seq_len)
    objective = build_objective(recipe, tokenizer)
    loader = objective.loader(
        store, recipe.data.seq_len, recipe.train.seed, packing=recipe.data.packing, overlong=recipe.data.overlong,
        step_rows=rows,
    )  # fmt: skip
    if loader.packing.dropped_tokens:
        logger.warning(
            "%s of %s %s are longer than data.seq_len %s and %s: raise it to keep them whole",
            int((loader.packing.lengths > recipe.data.seq_len).sum()), len(loader.packing.lengths),
            loader.packing.unit, recipe.data.seq_len,
            "are left out" if loader.packing.dropped_documents else "lose their end",
        )  # fmt: skip
    model = build_model(recipe, tokenizer, device, latest)
    if recipe.train.init_from:
        recipe = with_model_of(recipe, model.config)
    optimizer = make_optimizer(model, recipe.optim)
    total, planned = total_steps(recipe, loader, rows), total_steps(begun, loader, rows)
    position = {"data": store.fingerprint, "seq_len": recipe.data.seq_len, "rows": rows, "seed": recipe.train.seed,
                **objective.identity()}  # fmt: skip
    start, targets_seen, load = 0, 0, None
    if latest is not None:
        state = restore(latest, model, optimizer)
        if state["position"] != position:
            raise MoaiError(f"{latest} was trained on other data or batches: {state['position']} is not {position}")
        start, targets_seen = state["step"], state["targets"]
        load = None if state["router_load"] is None else torch.tensor(state["router_load"], device=device)
        precision.scaler.load_state_dict(state["scaler"])
        if total < start:
            raise MoaiError(f"{latest} has done {start} steps, so this run cannot end after {total}: make it longer")
    yaml = recipes.dump(recipe)
    if fresh:
        discard(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "recipe.yaml", yaml)
    objective.prepare(model, store, precision, resumed=latest is not None, quiet=quiet)
    with Monitor(out, total, start, title=title, quiet=quiet) as monitor, _stop_signals() as stop:
        monitor.note(f"data, {recipe.data.packing}: {loader.packing.summary()}")
        if start:
            monitor.note(f"resumed from {latest}")
        if total != planned:
            monitor.note(f"continues to {total} steps, was {planned}")
        clock, since, done = time.perf_counter(), 0, start
        for step in range(start, total):
            lr = learning_rate(step, total, recipe.optim.lr, recipe.schedule)
            batch = loader.rows(step * rows, rows)
            result = train_step(
                model, optimizer, precision, _micro_batches(batch, recipe.train.micro_batch_size), objective, lr=lr,
                max_grad_norm=recipe.train.max_grad_norm, router_load=load, noise_seed=(recipe.train.seed, step),
            )  # fmt: skip
            _require_finite(result, step, checkpoints)
            targets_seen, load, done = targets_seen + result.targets, result.expert_load, step + 1
            since += batch["input_ids"].numel()
            stopping = stop.is_set()  # asked once a step: a signal that comes later is seen after the next one
            last = done == total or stopping
            if done % recipe.log.every == 0 or last or done == 1:
                now = time.perf_counter()
                monitor.log(
                    done,
                    tokens=done * rows * recipe.data.seq_len,
                    lr=lr,
                    tokens_per_second=since / (now - clock),
                    **_numbers(result),
                )
                clock, since = now, 0
            else:
                monitor.advance(done)
            if done % recipe.checkpoint.every == 0 or last:
                state = {"targets": targets_seen, "position": position, "scaler": precision.scaler.state_dict(),
                         "router_load": None if load is None else load.tolist()}  # fmt: skip
                latest = checkpoints.save(done, model, tokenizer, yaml, optimizer, state)
                clock, since = time.perf_counter(), 0
            if recipe.eval.every and done % recipe.eval.every == 0 and not last or done == total:
                _run_hooks(hooks, done, model, monitor)
                clock, since = time.perf_counter(), 0
            if stopping:
                monitor.note(f"stopped after step {done} of {total}: {latest}; go on with --resume")
                break
    assert latest is not None
    return Trained(latest, done == total)


def train_step(
    model: MoaiForCausalLM,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    batches: Sequence[Batch],
    objective: Objective = NextToken(),  # noqa: B008 - has no state
    *,
    lr: float,
    max_grad_norm: float,
    router_load: Tensor | None = None,
    noise_seed: tuple[int, int] = (0, 0),
) -> StepResult:
    """One optimizer step over micro-batches that together are one batch.

    Args:
        router_load: (sparse layers, E) the load of the step before, which the balance loss multiplies with: it is the
            same for every micro-batch, so that accumulating does not change the step. Uniform when None.
        noise_seed: (seed, step); with the micro-batch's number it is all that the router's noise depends on.
    """
    device = precision.device
    counts = objective.count(batches)
    if counts.targets == 0:
        raise MoaiError("a batch without a single token to learn: raise train.batch_tokens or check the data's masks")
    if router_load is None:
        router_load = torch.full_like(model.model.expert_counts, 1 / model.config.num_experts)
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        on_device = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        with precision.autocast():
            part = objective.forward(
                model, on_device, counts, router_load=router_load, noise_key=noise_key(*noise_seed, i, device)
            )
        precision.scaler.scale(part.loss).backward()
        add_up(sums, part.numbers)
    precision.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    chosen = model.model.take_expert_counts()
    load = chosen / chosen.sum(-1, keepdim=True).clamp_min(1) if chosen.numel() else None
    return StepResult(to_floats(sums), float(norm), counts.targets, load)


def noise_key(seed: int, step: int, micro_batch: int, device: torch.device) -> Tensor:
    """An int64 tensor that is different for each (seed, step, micro-batch)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB) % 2**62
    return torch.tensor(mixed, dtype=torch.int64, device=device)


def _micro_batches(batch: Batch, size: int) -> list[Batch]:
    count = batch["input_ids"].shape[0]
    return [{key: t[i : i + size] for key, t in batch.items()} for i in range(0, count, size)]


def _numbers(result: StepResult) -> dict[str, float]:
    numbers = {**result.numbers, "grad_norm": result.grad_norm}
    if result.expert_load is not None:
        load = result.expert_load
        # coefficient of variation over experts, the worst layer: 0 is perfect balance
        numbers["expert_cv"] = float((load.std(-1, unbiased=False) / load.mean(-1)).max())
    return numbers


def _run_hooks(hooks: Sequence[Hook], step: int, model: MoaiForCausalLM, monitor: Monitor) -> None:
    numbers: dict[str, float] = {}
    model.eval()
    for hook in hooks:
        numbers.update(hook(step, model))
    model.train()
    if numbers:
        monitor.log(step, **numbers)
        monitor.note("  ".join([f"step {step}:", *(f"{name} {value:.4f}" for name, value in numbers.items())]))


def _require_finite(result: StepResult, step: int, checkpoints: Checkpoints) -> None:
    if math.isfinite(result.numbers["objective"]):
        return
    good = checkpoints.steps()
    advice = f"the last checkpoint is step {good[-1]}" if good else "there is no checkpoint yet"
    raise MoaiError(
        f"the loss is {result.numbers['objective']} at step {step + 1} ({advice}): "
        "lower optim.lr, raise schedule.warmup, or use train.precision=fp32"
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by the first SIGTERM or SIGINT; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before: dict[int, Any] = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
