"""The plan of a run: size, operations, memory in each layout, the micro-batch to take, days and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from moai_llm.planning.activations import Setting
from moai_llm.planning.adapters import frozen_flops
from moai_llm.planning.hardware import GIB, Hardware
from moai_llm.planning.inference import cache_bytes
from moai_llm.planning.layouts import OPTIMIZER_BYTES, Layout, layouts, memory
from moai_llm.planning.step import PARTS, Memory
from moai_llm.recipe import OptimConfig, Recipe
from moai_llm.runtime import MoaiError

MFU = 0.4  # share of the published peak that a well-kept run of this kind reaches; measure yours with --calibrate
RESERVE = 0.1  # share of the memory left to the driver, the libraries and what the allocator cannot use
DAY = 86400.0


@dataclass(frozen=True)
class Options:
    """What a plan is made for, beyond the recipe."""

    tokens: float | None = None
    mfu: float = MFU
    reserve: float = RESERVE
    price: float | None = None  # of a device and hour
    document_tokens: float | None = None
    context: int | None = None  # of a sequence that is generated; data.seq_len when None
    micro_batch: int | None = None  # take this one
    memory_factor: float = 1.0  # measured / predicted
    tokens_per_second: float | None = None  # of one device, measured


@dataclass(frozen=True)
class Fit:
    """One layout, with the largest micro-batch that fits, or the smallest where none does."""

    layout: Layout
    micro_batch: int
    accumulation: int
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Advice:
    """Keys to change, and the memory with them."""

    overrides: tuple[str, ...]
    layout: str
    total: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    hardware: Hardware | None
    options: Options
    parameters: dict[str, int]
    flops: dict[str, float]  # of a forward pass, a token
    flops_per_token: float  # of training
    recomputed: float  # of that much again, where activations are recomputed
    fits: list[Fit]
    advice: list[Advice]
    tokens: float | None
    seconds: float | None
    cache: float  # bytes a sequence
    notes: list[str]

    @property
    def best(self) -> Fit | None:
        """The simplest layout that fits."""
        return next((fit for fit in self.fits if fit.fits), None)

    @property
    def total_flops(self) -> float | None:
        return None if self.tokens is None else self.tokens * self.flops_per_token

    @property
    def cost(self) -> float | None:
        if self.seconds is None or self.options.price is None or self.hardware is None:
            return None
        return self.seconds / 3600 * self.hardware.count * self.options.price

    def needed_mfu(self, days: float) -> float | None:
        """The share of the peak that would end the run in so many days."""
        if self.total_flops is None or self.hardware is None or self.hardware.device.tflops is None:
            return None
        return self.total_flops / (days * DAY * self.hardware.count * self.hardware.device.tflops * 1e12)

    def to_tree(self) -> dict[str, Any]:
        """Plain types, for JSON. Bytes, seconds, operations."""
        best = self.best
        return {
            "hardware": None if self.hardware is None else asdict(self.hardware),
            "options": asdict(self.options),
            "parameters": self.parameters,
            "flops": {
                "forward_per_token": self.flops, "training_per_token": self.flops_per_token,
                "recomputed_per_token": self.recomputed, "total": self.total_flops,
                "six_n": 6.0 * self.parameters["active"],
            },
            "tokens": self.tokens, "seconds": self.seconds, "cost": self.cost,
            "layouts": [_fit_tree(fit) for fit in self.fits],
            "recommended": None if best is None else _fit_tree(best),
            "advice": [asdict(advice) for advice in self.advice],
            "cache_bytes_per_sequence": self.cache, "notes": self.notes,
        }  # fmt: skip


def make_plan(recipe: Recipe, hardware: Hardware | None, options: Options) -> Plan:
    """Plan a recipe on some hardware, or without days where that is None.

    Raises:
        MoaiError: the model has a brick from outside the package, or the hardware no fp8.
    """
    a, seq_len = recipe.model, recipe.data.seq_len
    if recipe.train.precision == "fp8" and hardware is not None and not hardware.device.fp8:
        raise MoaiError(
            f"train.precision=fp8 needs compute capability 8.9 (Ada, Hopper) or later, and {hardware.device.name} has "
            "no products in fp8: set train.precision=bf16"
        )
    try:
        counts, flops = a.parameters(), a.flops(seq_len, options.document_tokens)
    except ValueError as error:
        raise MoaiError(f"this model cannot be planned: {error}") from None
    notes = list(_notes(recipe, hardware))
    fits = _fits(recipe, hardware, options)
    per_token = 3 * flops["total"] - (frozen_flops(recipe.lora, a) if recipe.lora.rank else 0.0)
    tokens = options.tokens or _tokens(recipe)
    advice = [] if hardware is None or any(fit.fits for fit in fits) else list(_advice(recipe, hardware, options))
    return Plan(
        recipe, hardware, options, counts, flops, per_token,
        _recomputed(recipe, options), fits, advice, tokens,
        _seconds(tokens, per_token, hardware, options), cache_bytes(a, options.context or seq_len), notes,
    )  # fmt: skip


def _recomputed(recipe: Recipe, options: Options) -> float:
    """Operations a token of the layers that are recomputed."""
    a, run = recipe.model, recipe.train
    assert a.layer_types and a.mlp_layer_types
    chosen = [i for i in range(len(a.layer_types)) if run.recomputes(i)]
    of_chosen = replace(
        a, layer_types=[a.layer_types[i] for i in chosen], mlp_layer_types=[a.mlp_layer_types[i] for i in chosen]
    )
    return of_chosen.flops(recipe.data.seq_len, options.document_tokens)["layers"] if chosen else 0.0


def half_precision(recipe: Recipe, hardware: Hardware | None) -> bool:
    """Whether autocast is on: `auto` means bf16 where the device has it."""
    name = recipe.train.precision
    if name == "auto":
        return hardware is None or hardware.device.bf16
    return name != "fp32"


def setting(recipe: Recipe, hardware: Hardware | None, rows: int, options: Options) -> Setting:
    seq_len = recipe.data.seq_len
    documents = seq_len / min(seq_len, options.document_tokens or seq_len)
    kind = hardware.device.kind if hardware else "cuda"
    return Setting(rows, seq_len, half_precision(recipe, hardware), kind, documents)


def _fit(recipe: Recipe, hardware: Hardware | None, layout: Layout, options: Options) -> Fit | None:
    """None where a step has fewer rows than the layout has replicas."""
    step_rows = max(1, recipe.train.batch_tokens // recipe.data.seq_len)
    rows = -(-step_rows // layout.data)
    if step_rows < layout.data:
        return None
    sizes = sorted((d for d in range(1, min(rows, 1024) + 1) if rows % d == 0), reverse=True)
    if options.micro_batch is not None:
        sizes = [min(options.micro_batch, rows)]
    elif hardware is None:
        given = recipe.train.micro_batch_size
        sizes = [1 if given == "auto" else min(given, rows)]
    limit = hardware.device.memory * GIB * (1 - options.reserve) if hardware else float("inf")
    for size in sizes:
        accumulation = -(-rows // size)
        found = memory(recipe, layout, setting(recipe, hardware, size, options), accumulation)
        found = _scaled(found, options.memory_factor)
        if found.total <= limit or size == sizes[-1]:
            return Fit(layout, size, accumulation, found, found.total <= limit)
    raise AssertionError("a row at least")


def _scaled(found: Memory, factor: float) -> Memory:
    """A measured factor corrects what is not known to the byte: activations and the loss, never the states."""
    known = found.weights + found.gradients + found.optimizer
    rest = found.total - known
    wanted = max(0.0, found.total * factor - known)
    share = wanted / rest if rest else 1.0
    return replace(found, activations=found.activations * share, loss=found.loss * share)


def _advice(recipe: Recipe, hardware: Hardware, options: Options) -> Iterator[Advice]:
    """What to change, one after the other and all together, until it fits; at the end more devices."""
    overrides: list[str] = []
    changed, limit = recipe, hardware.device.memory * GIB * (1 - options.reserve)
    for name, change in _changes(recipe):
        key = name.partition("=")[0]
        if key == "data.seq_len" and min(_states(fit.memory) for fit in _fits(changed, hardware, options)) > limit:
            break  # no row is short enough
        changed = change(changed)
        overrides = [*(item for item in overrides if not item.startswith(f"{key}=")), name]
        fits = _fits(changed, hardware, options)
        best = min(fits, key=lambda fit: (not fit.fits, 0 if fit.fits else fit.memory.total))
        yield Advice(tuple(overrides), best.layout.name, best.memory.total, best.fits)
        if best.fits:
            return
    for count in (2, 4, 8, 16, 32, 64):
        if count > hardware.count:
            more = replace(hardware, count=count)
            fit = next((fit for fit in _fits(recipe, more, options) if fit.layout.zero == 3 and fit.fits), None)
            if fit is not None:
                yield Advice((f"--hardware {more}",), fit.layout.name, fit.memory.total, True)
                return


def _fits(recipe: Recipe, hardware: Hardware | None, options: Options) -> list[Fit]:
    found = layouts(recipe.model, hardware.count if hardware else 1)
    fits = [_fit(recipe, hardware, layout, options) for layout in found]
    return [fit for fit in fits if fit is not None]


def _states(found: Memory) -> float:
    """What no shorter row makes smaller."""
    return found.weights + found.gradients + found.optimizer


def _changes(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    ways: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    for way in ways[ways.index(recipe.train.activation_checkpointing) + 1 :]:
        yield (
            f"train.activation_checkpointing={way}",
            lambda r, way=way: replace(r, train=replace(r.train, activation_checkpointing=way)),
        )
    if OPTIMIZER_BYTES[recipe.optim.name][0] > 4 and "adamw_8bit" in optimizer_names():
        yield "optim.name=adamw_8bit", lambda r: replace(r, optim=replace(r.optim, name="adamw_8bit"))
    length = recipe.data.seq_len
    while length >= 512:
        length //= 2
        yield f"data.seq_len={length}", lambda r, n=length: replace(r, data=replace(r.data, seq_len=n))


def optimizer_names() -> tuple[str, ...]:
    """What `optim.name` may be."""
    return get_args(get_type_hints(OptimConfig)["name"])


def _tokens(recipe: Recipe) -> float | None:
    run = recipe.train
    if run.tokens is not None:
        return float(run.tokens)
    return None if run.steps is None else float(run.steps * run.batch_tokens)


def _fit_tree(fit: Fit) -> dict[str, Any]:
    parts = {part: getattr(fit.memory, part) for part in PARTS}
    return {
        "layout": fit.layout.name, "runs_in_this_version": fit.layout.runs_here, "micro_batch_size": fit.micro_batch,
        "accumulation": fit.accumulation, "bytes": {**parts, "peak": fit.memory.total}, "fits": fit.fits,
    }  # fmt: skip


def _seconds(tokens: float | None, per_token: float, hardware: Hardware | None, options: Options) -> float | None:
    if tokens is None or hardware is None:
        return None
    if options.tokens_per_second is not None:
        return tokens / (options.tokens_per_second * hardware.count)
    if hardware.device.tflops is None:
        return None
    return tokens * per_token / (hardware.count * hardware.device.tflops * 1e12 * options.mfu)


def _notes(recipe: Recipe, hardware: Hardware | None) -> Iterator[str]:
    if hardware and hardware.count > 1:
        yield "This version trains on one device: the other layouts are arithmetic, there is no launcher for them yet."
    if hardware and hardware.device.kind == "cuda" and not hardware.device.bf16 and recipe.train.precision != "fp16":
        yield (
            f"{hardware.device.name} has no bf16, and train.precision=auto means fp32 there: set train.precision=fp16, "
            "whose peak the days are reckoned with."
        )
    elif not half_precision(recipe, hardware) and hardware and hardware.device.kind == "cuda":
        yield "fp32 runs below the half-precision peak that the days are reckoned with: calibrate, or lower --mfu."
    if recipe.train.precision == "fp8":
        yield "Memory and days are those of train.precision=bf16: what products in fp8 change is not modelled."
    if recipe.train.compile:
        yield "Memory is that of a run without train.compile, which changes what is kept."
    if recipe.train.host_activations:
        yield "Memory is that of a run whose activations stay on the device: what train.offload moves is not modelled."
    if hardware is None or hardware.device.kind == "cuda":
        yield "Memory formulas are measured on CPUs only; the CUDA paths are counted from the code."
