"""The training loop: pretraining, continued pretraining and fine-tuning differ only by their data, loss and starting
weights.

The loss of a step is the sum over all its targets divided by their number, counted before the first backward: a step
of many micro-batches is exactly the step of one big batch. What it must not know: how data is made, how a model is
evaluated or sampled (hooks), which bricks a model has.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.training.clipping import Clip
from moai_llm.training.fitting import forget_peak, optimizer_bytes, share_taken, tried_rows
from moai_llm.training.health import Health, Verdict
from moai_llm.training.micro_batches import split_rows
from moai_llm.training.monitor import Monitor
from moai_llm.training.objective import Counts, NextToken, Objective, add_up, to_floats
from moai_llm.training.precision import Precision
from moai_llm.training.profile import ProfileOptions, Profiler
from moai_llm.training.run import Run
from moai_llm.training.schedules import learning_rate
from moai_llm.training.watchdog import Watchdog

# called at a step border with (step, model); what it returns is logged
Hook = Callable[[int, MoaiForCausalLM], dict[str, float]]


class Trained(NamedTuple):
    """Where a call of `train` left the run."""

    checkpoint: Path
    finished: bool  # false: a signal stopped it before its last step


@dataclass
class StepResult:
    numbers: dict[str, float]  # what the objective says of the step, see `MicroBatch`
    grad_norm: float  # before clipping
    clip: float  # share of the norm that clipping left
    targets: int
    expert_load: Tensor | None  # (sparse layers, E) share of all selections in this step
    verdict: Verdict


def train(
    recipe: Recipe,
    *,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    fresh: bool = False,
    title: str = "train",
    quiet: bool = False,
    profile: ProfileOptions | None = None,
) -> Trained:
    """Run a recipe to its end, or to the next step border after SIGTERM or SIGINT. SIGUSR1 saves and goes on.

    Args:
        hooks: run every `eval.every` steps and at the end, after the checkpoint of that step; see `Hook`.
        resume: go on from the newest sound checkpoint of `train.out`, exactly where it stopped.
        fresh: delete the run in `train.out`, once everything else is known to be in order.
        profile: say where time and memory go.

    Raises:
        MoaiError: the recipe lacks data or a length, the directory already holds a run, a checkpoint cannot be
            written, or the steps cannot be taken (`health.py`).
    """
    if recipe.schedule.name == "plateau" and not hooks:
        raise MoaiError("schedule.name=plateau follows the evaluations and there are none: set data.valid")
    profile = profile or ProfileOptions()
    run = Run.begin(recipe, resume=resume, fresh=fresh, quiet=quiet, profile=profile)
    recipe, left = run.recipe, run.total - run.done
    with (
        Monitor.for_run(
            recipe, run.model.config, run.precision, run.total, run.done, title=title, quiet=quiet
        ) as monitor,
        Profiler(
            profile, run.out, run.precision.device, left, run.model, run.optimizer, monitor.note, monitor.log
        ) as profiler,
        _signals() as signals,
        Watchdog(recipe.health.hang_seconds, run.out) as watchdog,
        run,
    ):
        for line in run.notes:
            monitor.note(line)
        with watchdog.paused():
            _choose_micro_batch(run, monitor)
            _catch_up(hooks, run)
        clock, since, waited = time.perf_counter(), 0, 0.0
        while run.done < run.total:
            lr = learning_rate(run.done, run.total, recipe.optim.lr, recipe.schedule, run.eval_losses)
            batch = run.batch()
            if recipe.train.dynamic_micro_batch:
                forget_peak(run.precision.device)
            result = train_step(
                run.model, run.optimizer, run.precision, run.micro_batch.split(batch),
                run.objective, lr=lr, clip=run.clip, router_load=run.router_load,
                noise_seed=(recipe.train.seed, run.done + run.ahead), health=run.health,
                smaller=partial(run.micro_batch.split_smaller, batch),
            )  # fmt: skip
            watchdog.beat()
            if recipe.train.dynamic_micro_batch:
                run.micro_batch.follow(share_taken(run.precision.device))
            for line in run.micro_batch.take_notes():
                monitor.note(f"step {run.done + 1}: {line}")
            if result.verdict.reason:
                monitor.note(f"step {run.done + 1}: {result.verdict.action}, {result.verdict.reason}")
            if result.verdict.action == "stop":
                raise MoaiError(_cannot_go_on(run, result))
            if result.verdict.action == "rollback":
                with watchdog.paused():
                    run.roll_back(result.verdict.reason)
                    _catch_up(hooks, run)
                monitor.rewind(run.done, run.notes[-1])
                clock, since, waited = time.perf_counter(), 0, run.waited
                continue
            run.count(result.targets, result.expert_load if result.verdict.action == "take" else None)
            since += batch["input_ids"].numel()
            clock += profiler.step(run.done)
            stopping, saving = signals.stop.is_set(), signals.save.is_set()  # asked once a step
            signals.save.clear()
            last = run.done == run.total or stopping
            if run.done % recipe.log.every == 0 or last or run.done == 1:
                now = time.perf_counter()
                monitor.log(
                    run.done,
                    run.router_load,
                    tokens=run.done * run.rows * recipe.data.seq_len,
                    lr=lr,
                    tokens_per_second=since / (now - clock),
                    data_wait=(run.waited - waited) / (now - clock),
                    **run.stage(),
                    **_numbers(result),
                    skipped=run.health.skipped,
                )
                clock, since, waited = now, 0, run.waited
            else:
                monitor.advance(run.done)
            if run.done % recipe.checkpoint.every == 0 or last or saving:
                with watchdog.paused():
                    run.save()
                clock, since, waited = time.perf_counter(), 0, run.waited
            if recipe.eval.every and run.done % recipe.eval.every == 0 and not last or run.done == run.total:
                with watchdog.paused():
                    _run_hooks(hooks, run, monitor)
                clock, since, waited = time.perf_counter(), 0, run.waited
            if stopping:
                monitor.note(f"stopped after step {run.done} of {run.total}: {run.latest}; go on with --resume")
                break
    assert run.latest is not None
    return Trained(run.latest, run.done == run.total)


def train_step(
    model: MoaiForCausalLM,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    batches: Sequence[Batch],
    objective: Objective = NextToken(),  # noqa: B008 - has no state
    *,
    lr: float,
    clip: Clip,
    router_load: Tensor | None = None,
    noise_seed: tuple[int, int] = (0, 0),
    health: Health | None = None,
    smaller: Callable[[], Sequence[Batch]] | None = None,
) -> StepResult:
    """One optimizer step over micro-batches that together are one batch. A step that `health` finds bad changes no
    weights.

    Args:
        lr: of this step; a group of parameters takes its `lr_scale` of it.
        router_load: (sparse layers, E) the load of the step before, which the balance loss multiplies with: it is the
            same for every micro-batch, so that accumulating does not change the step. Uniform when None.
        noise_seed: (seed, step); with the number of the row it is all that the router's noise depends on.
        smaller: the same rows in smaller micro-batches; called where the device's memory did not hold these, and the
            step is begun again. It is an error when None.
    """
    device = precision.device
    counts = objective.count(batches)
    if counts.targets == 0:
        raise MoaiError("a batch without a single token to learn: raise train.batch_tokens or check the data's masks")
    if router_load is None:
        router_load = torch.full_like(model.model.expert_counts, 1 / model.config.num_experts)
    while True:
        try:
            sums = _accumulate(model, precision, batches, objective, counts, router_load, noise_seed)
            break
        except torch.OutOfMemoryError:
            if smaller is None:
                raise
        # after the `except`: what was raised held the frames of the step, and they its activations
        optimizer.zero_grad(set_to_none=True)
        model.model.take_expert_counts()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        batches = smaller()
    precision.scaler.unscale_(optimizer)
    clipped = clip()
    numbers, norm, scaled = to_floats(sums), float(clipped.norm), precision.scaler.is_enabled()
    verdict = Verdict("take") if health is None else health.judge(numbers["objective"], norm, scaled=scaled)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if verdict.action == "take":
        precision.scaler.step(optimizer)
    if scaled:
        precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    chosen = model.model.take_expert_counts()
    load = chosen / chosen.sum(-1, keepdim=True).clamp_min(1) if chosen.numel() else None
    return StepResult(numbers, norm, float(clipped.kept), counts.targets, load, verdict)


def _accumulate(
    model: MoaiForCausalLM,
    precision: Precision,
    batches: Sequence[Batch],
    objective: Objective,
    counts: Counts,
    router_load: Tensor,
    noise_seed: tuple[int, int],
) -> dict[str, Tensor]:
    """The gradient of a step, into the weights' `grad`; returns the numbers of its micro-batches, added up."""
    device, row, sums = precision.device, 0, dict[str, Tensor]()
    parts: list[tuple[Batch, Tensor]] = []
    for batch in batches:
        on_device = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        parts.append((on_device, noise_keys(*noise_seed, range(row, row + batch["input_ids"].shape[0]), device)))
        row += len(parts[-1][1])
    objective.look_ahead(model, parts, precision)
    for on_device, key in parts:
        with precision.autocast(), precision.saving():
            part = objective.forward(model, on_device, counts, router_load=router_load, noise_key=key)
        precision.scaler.scale(part.loss).backward()
        add_up(sums, part.numbers)
    return sums


def _choose_micro_batch(run: Run, monitor: Monitor) -> None:
    """`train.micro_batch_size=auto`; on a CUDA device by trying, else it stays what the plan says."""
    if run.recipe.train.micro_batch_size != "auto" or run.done:
        return
    device, size = run.precision.device, run.micro_batch
    if device.type == "cuda":
        states = optimizer_bytes(run.recipe, run.model.config)
        size.rows = tried_rows(partial(_try_rows, run), device, states, size.most)
        torch.cuda.empty_cache()
    monitor.note(f"train.micro_batch_size=auto: {size.rows} rows, {-(-size.most // size.rows)} micro-batches a step")


def _try_rows(run: Run, rows: int) -> None:
    """Forward and backward of two micro-batches, so that gradients are there while activations are; nothing is left."""
    batches = split_rows(run.loader.step(run.ahead), rows)[:2]
    load = torch.full_like(run.model.model.expert_counts, 1 / run.model.config.num_experts)
    try:
        counts = run.objective.count(batches)
        _accumulate(run.model, run.precision, batches, run.objective, counts, load, (run.recipe.train.seed, 0))
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        run.model.model.take_expert_counts()


def noise_keys(seed: int, step: int, rows: Iterable[int], device: torch.device) -> Tensor:
    """(rows,) int64, different for each (seed, step, row of the step)."""
    of_step = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9
    mixed = [(of_step + row * 0x94D049BB133111EB) % 2**62 for row in rows]
    return torch.tensor(mixed, dtype=torch.int64, device=device)


def _numbers(result: StepResult) -> dict[str, float]:
    numbers = {**result.numbers, "grad_norm": result.grad_norm, "clip": result.clip}
    if result.expert_load is not None:
        load = result.expert_load
        # coefficient of variation over experts, the worst layer: 0 is perfect balance
        numbers["expert_cv"] = float((load.std(-1, unbiased=False) / load.mean(-1)).max())
    return numbers


def _run_hooks(hooks: Sequence[Hook], run: Run, monitor: Monitor | None = None) -> None:
    numbers: dict[str, float] = {}
    run.model.eval()
    for hook in hooks:
        numbers.update(hook(run.done, run.model))
    run.model.train()
    if numbers and monitor is not None:
        monitor.log(run.done, **numbers)
        said = (f"{name} {value:.4f}" for name, value in numbers.items())
        monitor.note("  ".join([f"step {run.done}:", *said]))
    if run.recipe.schedule.name == "plateau":
        if "eval_loss" not in numbers:
            raise MoaiError(
                "schedule.name=plateau follows the loss of the evaluations, and no hook says it: set data.valid"
            )
        run.eval_losses.append(numbers["eval_loss"])


def _catch_up(hooks: Sequence[Hook], run: Run) -> None:
    """The evaluation of the step that a run goes on from, which its checkpoint was written before, for a schedule that
    follows it.
    """
    every = run.recipe.eval.every
    if run.recipe.schedule.name == "plateau" and 0 < run.done < run.total and run.done % every == 0:
        _run_hooks(hooks, run)


def _cannot_go_on(run: Run, result: StepResult) -> str:
    good = run.checkpoints.steps()
    advice = f"the last checkpoint is step {good[-1]}" if good else "there is no checkpoint yet"
    return (
        f"step {run.done + 1} cannot be taken: {result.verdict.reason} ({advice}): lower optim.lr, raise "
        "schedule.warmup, use train.precision=fp32, or leave the data out with health.rollback=true"
    )


class _Signals(NamedTuple):
    stop: threading.Event
    save: threading.Event


@contextmanager
def _signals() -> Iterator[_Signals]:
    """`stop` is set by the first SIGTERM or SIGINT (a second SIGINT interrupts as usual), `save` by SIGUSR1."""
    signals = _Signals(threading.Event(), threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if signals.stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.stop.set()

    def save(number: int, frame: FrameType | None) -> None:
        signals.save.set()

    handlers: dict[int, Any] = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    before: dict[int, Any] = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
