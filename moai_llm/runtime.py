"""What every room may need and no room owns: the user's error type, the logger, device and dtype, seeds, optional
imports.

torch is imported inside the functions that need it, because `moai --help` must not wait for it.
"""

from __future__ import annotations

import difflib
import logging
import os
import random
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

logger = logging.getLogger("moai_llm")


class MoaiError(ValueError):
    """A mistake in what the user gave us. The message says what is wrong and what to do; the CLI prints it without a
    traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the end of a message, "" where nothing known is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(module: str, extra: str) -> Any:
    """Import an optional dependency, or raise a `MoaiError` that names the extra which installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MoaiError(f"this needs the package {module!r}: pip install 'moai-llm[{extra}]'") from error


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA when there is one, else the CPU; any other name is taken as it is.

    Raises:
        MoaiError: the named device is not on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoaiError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 on this device (AVX512-BF16 or AMX on a CPU, Ampere or later
    on CUDA).
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:  # not Linux: no cheap way to know, and fp32 is always right
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def processors() -> int:
    """How many processors this process may use: those it is bound to, and no more than its container has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as file:
            quota, period = file.read().split()
        return max(1, min(count, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such limit
        return count


def make_console() -> Console:
    """Standard output for people; wide tables stay whole when it is a file or a pipe."""
    from rich.console import Console

    plain = Console()
    return Console(highlight=False, width=None if plain.is_terminal else 200)


def keep_freed_memory() -> None:
    """Let the C allocator keep what is freed instead of handing it back to the system and faulting it in again.

    A training step allocates and frees the same large tensors over and over; with glibc's defaults the page faults cost
    a CPU run a good tenth of its time. Where there is no glibc this does nothing.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # the constants of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 26)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators. Data order does not depend on them."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a new one that is whole: what was there stays if writing fails."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir() -> str:
    """Where things built for this machine are kept: `$MOAI_CACHE`, else `$XDG_CACHE_HOME/moai_llm`, else
    `~/.cache/moai_llm`.
    """
    base = os.environ.get("MOAI_CACHE")
    if base:
        return base
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "moai_llm")
