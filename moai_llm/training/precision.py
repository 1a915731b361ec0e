"""Numeric precision of a run: what autocast computes in, whether gradients need a scale. Weights and states stay
fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moai_llm.runtime import MoaiError, has_fast_bf16
from moai_llm.training import fp8

# fp8 is bf16 around layers of its own, see `fp8.py`
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """`autocast()` around each forward, `scaler` around each backward (active for fp16 only)."""

    name: str
    device: torch.device
    scaler: torch.amp.GradScaler
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each forward of a step, see `offload.py`

    def autocast(self) -> AbstractContextManager[None]:
        dtype = AUTOCAST[self.name]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)


def make_precision(name: str, device: torch.device, tf32: bool = True) -> Precision:
    """Resolve `auto` and set TF32.

    Raises:
        MoaiError: fp16 on a CPU, where it is several times slower than fp32 and overflows; fp8 on a device without it.
    """
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise MoaiError("fp16 on a CPU is slower than fp32: use train.precision=bf16 or fp32")
    if name == "fp8":
        fp8.require_device(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    return Precision(name, device, torch.amp.GradScaler(device.type, enabled=name == "fp16"))
