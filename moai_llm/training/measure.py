"""What a step really takes on this device: bytes that live at once, and seconds."""

from __future__ import annotations

import os
from collections.abc import Callable

# kineto reports its own start and stop on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402

from moai_llm.data.loader import Batch  # noqa: E402


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
