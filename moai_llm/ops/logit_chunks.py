"""The output layer in chunks of rows: what every loss over a vocabulary from hidden states is made of.

The logits of all rows, rows times vocabulary, are never in memory. A loss sees those of one chunk, and where it has a
gradient it writes it over them; the gradients of hidden states and weight follow before the next chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moai_llm.ops.linear import linear_into

# sees the logits (n, V) of the rows of a slice; overwrites them with dL/dlogits where a gradient is wanted
Visit = Callable[[Tensor, slice], None]


def over_chunks(
    hidden: Tensor,
    weight: Tensor,
    valid: Tensor,
    visit: Visit,
    chunk_rows: int,
    *,
    grad_hidden: bool = False,
    grad_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Call `visit` with hidden[valid] @ weight^T, `chunk_rows` rows at a time.

    Args:
        hidden: (T, d). weight: (V, d), cast to the dtype of `hidden`. valid: (R,) ascending numbers of rows; the slices
            that `visit` gets count among these.

    Returns:
        dL/dhidden (T, d) in the dtype of `hidden` and dL/dweight (V, d) in that of `weight`, from what `visit` wrote;
        empty where they are not wanted.
    """
    everything = valid.shape[0] == hidden.shape[0]
    rows = hidden if everything else hidden[valid]
    w = weight.to(hidden.dtype)
    d_hidden = torch.zeros_like(hidden) if grad_hidden else hidden.new_empty(0)
    # the first chunk writes it and the others add to it: at a large vocabulary to fill it with zeros takes its time
    d_weight = torch.empty_like(weight) if grad_weight else weight.new_empty(0)
    if not rows.shape[0]:
        d_weight.zero_()
    buffer = rows.new_empty(min(chunk_rows, rows.shape[0]), w.shape[0])  # one for all chunks
    for start in range(0, rows.shape[0], chunk_rows):
        part = slice(start, start + chunk_rows)
        h = rows[part]
        logits = linear_into(h, w, buffer[: len(h)])
        visit(logits, part)
        if grad_hidden and everything:
            torch.mm(logits, w, out=d_hidden[part])
        elif grad_hidden:
            d_hidden[valid[part]] = logits @ w
        if grad_weight and hidden.dtype == weight.dtype:
            torch.addmm(d_weight, logits.t(), h, beta=int(start > 0), out=d_weight)
        elif grad_weight:
            product = logits.t() @ h
            d_weight.add_(product) if start else d_weight.copy_(product)
    return d_hidden, d_weight


def blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of a chunk for what is computed in fp32. On a CPU a few megabytes at a time: the passes over a
    block then find it in the caches.
    """
    size = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else max(1, logits.shape[0])
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the products run in: autocast's dtype where that is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_chunk_rows(vocab_size: int, device_type: str, memory: int | None = None) -> int:
    """Rows whose fp32 logits fill a budget, at least 64: 256 MiB on a CPU and 1 GiB elsewhere, less where the memory is
    small. On a CPU more than 1024 rows gain nothing.

    Args:
        memory: bytes of the device, all of them: what is free differs from run to run, and with it the last bits.
    """
    memory = device_memory(device_type) if memory is None else memory
    budget, most = (min(2**28, memory // 64), 1024) if device_type == "cpu" else (min(2**30, memory // 32), 8192)
    return max(64, min(most, budget // (4 * vocab_size)))


def device_memory(device_type: str) -> int:
    """Bytes of memory the device has; a lot where that cannot be asked."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if device_type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**40


def scaled(kept: Tensor, scale: Tensor) -> Tensor:
    """A gradient that the forward kept, times `scale` (): in its own memory where nobody can ask for it again."""
    scale = scale.to(kept.dtype)
    if _is_last_backward(scale):
        return kept.detach().mul_(scale)  # detached: as an output of the op it is a part of the graph
    return kept * scale


def _is_last_backward(gradient: Tensor) -> bool:
    """Whether the backward that is running, with this incoming gradient, uses the graph up: it neither keeps it
    (`retain_graph`, `create_graph`) nor is compiled, nor walks it for a batch of gradients at once.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_batchedtensor(gradient)
        or torch._C._functorch.is_legacy_batchedtensor(gradient)
        or torch.is_grad_enabled()
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )
