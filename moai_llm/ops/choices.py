"""What `moai ops` and `moai doctor` say of each op: which implementation runs here, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moai_llm.ops.dispatch import Unavailable, all_ops


@dataclass(frozen=True)
class Choice:
    """One op on one device. `missing` maps an implementation that cannot run, or gains nothing, to its reason."""

    op: str
    fp32: str
    bf16: str
    implementations: list[str]
    missing: dict[str, str]
    faster_missing: dict[str, str]  # of what cannot run, that which would be preferred to what runs in fp32


def choices(device: torch.device) -> Iterator[Choice]:
    """Every op, by name. Loads each implementation, which builds those in C++ at the first time."""
    for name, op in sorted(all_ops().items()):
        missing, idle = {}, {}
        for key, implementation in op.implementations.items():
            try:
                implementation.load()
            except Unavailable as reason:
                missing[key] = str(reason)
            useless = implementation.unless and implementation.unless(torch.bfloat16)  # fp32 is never the question
            if useless:
                idle[key] = useless
        fp32, bf16 = op.pick(device.type), op.pick(device.type, torch.bfloat16)
        order = op.order.get(device.type, op.order["any"])
        before = order[: order.index(fp32)] if fp32 in order else []
        faster = {key: missing[key] for key in before if key in missing}
        yield Choice(name, fp32, bf16, list(op.implementations), idle | missing, faster)
