"""How many rows of a step the memory holds: by the plan's arithmetic, by trying, and by what a step really took."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from moai_llm.architecture import Architecture
from moai_llm.planning.adapters import count
from moai_llm.planning.hardware import GIB, Accelerator, Hardware, find_device
from moai_llm.planning.layouts import OPTIMIZER_BYTES, Layout, memory
from moai_llm.planning.plan import Options, setting
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, has_fast_bf16, pick_device
from moai_llm.training.environment import memory_bytes, resident_bytes
from moai_llm.training.micro_batches import HIGH


def rows_of(recipe: Recipe) -> int:
    """`train.micro_batch_size`; of `auto` what the plan says, for whoever cannot try.

    Raises:
        MoaiError: `auto` with a model that the plan does not know.
    """
    given = recipe.train.micro_batch_size
    return planned_rows(recipe, pick_device(recipe.train.device)) if given == "auto" else given


def planned_rows(recipe: Recipe, device: torch.device) -> int:
    """The largest power of two, or all rows of a step, that by the plan takes at most `HIGH` of the device's memory."""
    hardware, whole = this_machine(device), max(1, recipe.train.batch_tokens // recipe.data.seq_len)

    def share(rows: int) -> float:
        of_rows = setting(recipe, hardware, rows, Options())
        return memory(recipe, Layout("one device"), of_rows, -(-whole // rows)).total / room(device)

    try:
        return largest(share, whole)
    except ValueError as error:
        raise MoaiError(f"train.micro_batch_size=auto: {error}: set a number") from None


def largest(share: Callable[[int], float | None], most: int) -> int:
    """One row doubled, up to `most`, while `share(rows)` of the memory, None where it runs out, is at most `HIGH`."""
    rows = 1
    while rows < most and (taken := share(min(2 * rows, most))) is not None and taken <= HIGH:
        rows = min(2 * rows, most)
    return rows


def tried_rows(accumulate: Callable[[int], object], device: torch.device, states: float, most: int) -> int:
    """The same by running forward and backward on a CUDA device.

    Args:
        accumulate: with so many rows, and what it left behind freed.
        states: bytes that the optimizer has not made yet.
    """

    def share(rows: int) -> float | None:
        forget_peak(device)
        try:
            accumulate(rows)
        except torch.OutOfMemoryError:
            return None
        return share_taken(device) + states / room(device)

    return largest(share, most)


def optimizer_bytes(recipe: Recipe, config: Architecture) -> float:
    """What the states of the optimizer take; they are made in the first step."""
    if recipe.train.host_optimizer:
        return 0.0
    of_matrices, of_others = OPTIMIZER_BYTES[recipe.optim.name]
    trained = count(recipe.lora, config) if recipe.lora.rank else config.parameters()["total"]
    return max(of_matrices, of_others) * trained


def room(device: torch.device) -> float:
    """Bytes this process could have: what it holds and what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return max(1.0, memory_bytes("MemAvailable") + resident_bytes())


def forget_peak(device: torch.device) -> None:
    """From here on `share_taken` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def share_taken(device: torch.device) -> float:
    """The share of `room` that was taken at once since `forget_peak`; on a CPU what the process holds now, since its
    allocator keeps what a step freed.
    """
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()
    return taken / room(device)


def this_machine(device: torch.device) -> Hardware:
    """The device as the plan knows it."""
    if device.type == "cuda":
        name, gib = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1] / GIB
        return Hardware(1, find_device(name, gib) or Accelerator(name, None, gib, bf16=has_fast_bf16(device)))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Hardware(1, Accelerator("cpu", None, pages * size / GIB, None, has_fast_bf16(device), "cpu", False))
