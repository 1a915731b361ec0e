"""A few real steps of a recipe on this machine: how fast it is, and how much memory it takes beside the plan's number.

The step is the one of training (`train_step`): same model, precision, optimizer and micro-batch. Only its length is
cut: two micro-batches instead of all, and the optimizer's share is timed apart, so that the whole step can be told from
it. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from statistics import median

import torch

from moai_llm.architecture import Architecture
from moai_llm.data.loader import Batch, Loader
from moai_llm.data.shards import Store
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.planning.adapters import frozen_flops
from moai_llm.planning.hardware import Hardware
from moai_llm.planning.layouts import Layout, memory
from moai_llm.planning.plan import Options, setting
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, keep_freed_memory, pick_device, seed_everything
from moai_llm.training.build import build_model
from moai_llm.training.fitting import rows_of, this_machine
from moai_llm.training.measure import RealStep, random_batch

MICRO_BATCHES = 2  # of a measured step: with two, gradients are there while activations are, as in the real one
WARM_UP = 2  # steps that are not counted


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device."""

    recipe: Recipe  # with the vocabulary of the store
    device: str  # as the driver reports it
    hardware: Hardware
    steps: int
    data: str
    document_tokens: float | None
    micro_batch: int
    seconds: float  # of a micro-batch, the median
    optimizer_seconds: float  # of an optimizer step
    tokens_per_second: float  # of a whole step of the recipe
    flops_per_token: float
    peak: float  # bytes, measured
    predicted: float

    @property
    def mfu(self) -> float | None:
        """None where the peak of the device is not known."""
        tflops = self.hardware.device.tflops
        return None if tflops is None else self.tokens_per_second * self.flops_per_token / (tflops * 1e12)

    @property
    def memory_factor(self) -> float:
        return self.peak / self.predicted

    def summary(self) -> str:
        speed = f"{self.tokens_per_second:,.0f} tokens/s" + (
            "" if self.mfu is None else f", {self.mfu:.1%} of the peak"
        )
        return (
            f"measured     {self.steps} steps of {self.micro_batch} rows on {self.device}, {self.data}: {speed}\n"
            f"memory       {self.peak / 2**20:,.1f} MiB measured, {self.predicted / 2**20:,.1f} MiB predicted "
            f"({self.predicted / self.peak - 1:+.1%})\n"
        )


def calibrate(
    recipe: Recipe, hardware: Hardware | None, options: Options, *, steps: int = 20, quiet: bool = False
) -> Calibration:
    """Run `steps` steps of the recipe, on its store or on random tokens, and one more to count its memory.

    Args:
        hardware: what the plan is for: devices like the one here, or None.

    Raises:
        MoaiError: the plan is for other devices than this one, the device or the store is not there, or the device's
            memory does not hold the model.
    """
    device = pick_device(recipe.train.device)
    here = this_machine(device).device
    if hardware is not None and hardware.device.name != here.name:
        raise MoaiError(
            f"--calibrate measures this machine's {here.name}, which says nothing about {hardware}: leave out "
            "--hardware, or run it there"
        )
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    rows = options.micro_batch or rows_of(recipe)
    try:
        return _measure(recipe, replace(options, micro_batch=rows), device, steps, quiet)
    except torch.OutOfMemoryError:
        raise MoaiError(
            f"{device} does not hold {rows} rows of this recipe: pass a smaller --micro-batch, "
            "or see `moai plan` without --calibrate for what fits"
        ) from None


def corrected(found: Calibration, options: Options) -> Options:
    """The options of the plan that a calibration corrects."""
    return replace(
        options, tokens_per_second=found.tokens_per_second, memory_factor=found.memory_factor,
        document_tokens=found.document_tokens,
    )  # fmt: skip


def _measure(recipe: Recipe, options: Options, device: torch.device, steps: int, quiet: bool) -> Calibration:
    from rich.progress import track

    rows, seq_len = options.micro_batch or 1, recipe.data.seq_len
    model, batches, data, document_tokens = _model_and_data(recipe, rows, device, options)
    options = replace(options, document_tokens=document_tokens)
    step = RealStep(recipe, device, model)
    clock = _OptimizerClock(step.optimizer, device)
    spent: list[tuple[float, float]] = []
    for _ in track(range(WARM_UP + steps), "calibrating", disable=quiet, transient=True):
        began = _now(device)
        step.run(next(batches))
        spent.append((_now(device) - began, clock.seconds))
    counted = spent[WARM_UP:]
    in_optimizer = median(of for _, of in counted)
    micro = median((whole - of) / MICRO_BATCHES for whole, of in counted)
    peak = step.peak_bytes(next(batches))
    accumulation = max(1, -(-recipe.train.batch_tokens // (rows * seq_len)))
    hardware = this_machine(device)
    recipe = replace(recipe, model=_architecture(step.model))
    predicted = memory(recipe, Layout("one device"), setting(recipe, hardware, rows, options), MICRO_BATCHES).total
    per_token = 3 * recipe.model.flops(seq_len, options.document_tokens)["total"]
    per_token -= frozen_flops(recipe.lora, recipe.model) if recipe.lora.rank else 0.0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return Calibration(
        recipe, name, hardware, steps, data, document_tokens, rows, micro, in_optimizer,
        accumulation * rows * seq_len / (accumulation * micro + in_optimizer), per_token, peak, predicted,
    )  # fmt: skip


def _model_and_data(
    recipe: Recipe, rows: int, device: torch.device, options: Options
) -> tuple[MoaiForCausalLM | None, Iterator[list[Batch]], str, float | None]:
    """The model where a store says its vocabulary, the micro-batches of each step, what they are made of, and the mean
    length of a document.
    """
    seq_len = recipe.data.seq_len
    if recipe.data.stores():
        store = Store(recipe.data.stores()[0])
        loader = Loader(store, seq_len, recipe.train.seed, packing=recipe.data.packing, overlong=recipe.data.overlong)
        pieces = float(loader.packing.row_starts[-1]) / len(loader)
        model = build_model(recipe, store.tokenizer(), device)
        return model, _stored(loader, rows), str(store.path), seq_len / pieces
    if recipe.train.init_from:
        raise MoaiError("train.init_from needs its data: set data.train, or leave it out and calibrate fresh weights")
    documents = max(1, round(seq_len / min(seq_len, options.document_tokens or seq_len)))
    return None, _random(recipe, rows, documents), "random tokens", options.document_tokens


def _stored(loader: Loader, rows: int) -> Iterator[list[Batch]]:
    at = 0
    while True:
        yield [loader.rows(at + i * rows, rows) for i in range(MICRO_BATCHES)]
        at += MICRO_BATCHES * rows


def _random(recipe: Recipe, rows: int, documents: int) -> Iterator[list[Batch]]:
    seed = 0
    while True:
        seeds = range(seed, seed + MICRO_BATCHES)
        yield [random_batch(rows, recipe.data.seq_len, recipe.model.vocab_size, documents, s) for s in seeds]
        seed += MICRO_BATCHES


class _OptimizerClock:
    """Seconds that the last step of an optimizer took."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.seconds, self._began, self._device = 0.0, 0.0, device
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: object) -> None:
        self._began = _now(self._device)

    def _after(self, *_: object) -> None:
        self.seconds = _now(self._device) - self._began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _architecture(model: MoaiForCausalLM) -> Architecture:
    """What was built: the vocabulary is the tokenizer's."""
    return Architecture(**{field.name: getattr(model.config, field.name) for field in fields(Architecture)})
