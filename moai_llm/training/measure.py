"""What a step really takes on this device: bytes that live at once, and seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from moai_llm.config import MoaiConfig
from moai_llm.data.loader import Batch
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.ops.nf4_weight import stored_bytes
from moai_llm.recipe import Recipe
from moai_llm.training.build import prepare_model
from moai_llm.training.clipping import Clip
from moai_llm.training.loop import train_step
from moai_llm.training.offload import HostActivations, require_host
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision


class RealStep:
    """The optimizer step of a recipe, on a model of its own or a given one, outside of any run."""

    def __init__(self, recipe: Recipe, device: torch.device, model: MoaiForCausalLM | None = None) -> None:
        self.recipe, self.device = recipe, device
        require_host(recipe, device)
        self.precision = make_precision(recipe.train.precision, device, recipe.train.tf32)
        self.model = model or prepare_model(MoaiForCausalLM(MoaiConfig(**asdict(recipe.model))), recipe, device)
        if recipe.train.host_activations:
            self.precision = replace(self.precision, saving=HostActivations(self.model).hooks)
        self.optimizer = make_optimizer(self.model, recipe.optim, on_host=recipe.train.host_optimizer)
        self.clip = Clip(self.model, recipe.clip, recipe.train.max_grad_norm)

    def run(self, batches: Sequence[Batch]) -> None:
        train_step(self.model, self.optimizer, self.precision, batches, lr=self.recipe.optim.lr, clip=self.clip)

    def peak_bytes(self, batches: Sequence[Batch]) -> int:
        """The most bytes of a step that live at once, all that lives between steps included. The optimizer must have
        made its states: run a step before.
        """
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        lasting = [*self.model.parameters(), *self.model.buffers(), *states]
        if self.device.type == "cpu":
            lasting += [tensor for batch in batches for tensor in batch.values()]
        held = sum(stored_bytes(tensor) for tensor in lasting if tensor.device.type == self.device.type)
        return held + peak_bytes(lambda: self.run(batches), self.device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How many bytes of tensors `run` holds at once at most, beyond those that live before it.

    Counted by the allocator itself: on CUDA in its statistics, on a CPU in the events that it reports to the profiler
    for each block it gives out and takes back. So what an op holds inside is counted too, while the process' resident
    memory also holds libraries, code and blocks that were freed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and stop on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def random_batch(rows: int, seq_len: int, vocab_size: int, documents: int = 1, seed: int = 0) -> Batch:
    """Rows of random tokens, as `data/loader.py` makes them of `documents` documents of about the same length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, seq_len), generator=generator)
    place = torch.arange(seq_len)
    number = place * documents // seq_len
    first = torch.searchsorted(number, torch.arange(documents))
    positions = place - first[number]
    labels = ids.masked_fill(positions == 0, -100)
    numbers = number.to(torch.int32)
    return {
        "input_ids": ids, "labels": labels, "position_ids": positions.repeat(rows, 1),
        "seq_idx": numbers.repeat(rows, 1),
    }  # fmt: skip
