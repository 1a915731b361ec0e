"""Published peaks of accelerators, and how hardware is written: "8xA100-80GB".

Sources: NVIDIA's data sheets of the A100 (2021), A40, H100, H200, L4, L40S, T4 and V100, of the DGX B200 (its eighth),
and the GA102, Ada and RTX Blackwell architecture papers for the three GeForce cards. bf16 (fp16 where there is no bf16)
tensor operations with fp32 accumulation, dense: where a sheet gives the figure with sparsity, half of it. Nothing in
this table is estimated; hardware that is not in it is given by its own numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from moai_llm.runtime import MoaiError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device. A peak of None is not known, and nothing is guessed for it."""

    name: str
    tflops: float | None  # dense, in half precision
    memory: float  # GiB
    bandwidth: float | None = None  # GB/s
    bf16: bool = True
    kind: str = "cuda"
    fp8: bool = True  # products in it: from compute capability 8.9 on


ACCELERATORS = {
    device.name: device
    for device in (
        Accelerator("A100-40GB", 312, 40, 1555, fp8=False),
        Accelerator("A100-80GB", 312, 80, 2039, fp8=False),
        Accelerator("A40", 149.7, 48, 696, fp8=False),
        Accelerator("H100-SXM", 989.5, 80, 3350),
        Accelerator("H100-PCIe", 756, 80, 2000),
        Accelerator("H200", 989.5, 141, 4800),
        Accelerator("B200", 2250, 180, 8000),
        Accelerator("L4", 121, 24, 300),
        Accelerator("L40S", 362, 48, 864),
        Accelerator("RTX-3090", 71, 24, 936, fp8=False),
        Accelerator("RTX-4090", 165.2, 24, 1008),
        Accelerator("RTX-5090", 209.5, 32, 1792),
        Accelerator("T4", 65, 16, 320, bf16=False, fp8=False),
        Accelerator("V100-16GB", 125, 16, 900, bf16=False, fp8=False),
        Accelerator("V100-32GB", 125, 32, 900, bf16=False, fp8=False),
    )
}


@dataclass(frozen=True)
class Hardware:
    """Some equal devices."""

    count: int
    device: Accelerator

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


def parse_hardware(text: str, tflops: float | None = None, memory: float | None = None) -> Hardware:
    """ "8xA100-80GB", "4 x RTX 4090", "H200"; `tflops` and `memory` (GiB) add to what is known, or describe another.

    Raises:
        MoaiError: the device is not in the table and not described, or the name fits several.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = (int(found[1] or 1), found[2].strip()) if found else (1, text)
    if count < 1:
        raise MoaiError(f"--hardware {text!r}: at least one device")
    named = {_plain(known): device for known, device in ACCELERATORS.items()}
    fits = [device for known, device in named.items() if known.startswith(_plain(name)) and _plain(name)]
    exact = named.get(_plain(name))
    if exact is None and len(fits) > 1 and memory is None:
        raise MoaiError(f"--hardware {text!r} may be {' or '.join(device.name for device in fits)}")
    device = exact or (fits[0] if len(fits) == 1 else None)
    if device is None:
        if memory is None:
            known = ", ".join(ACCELERATORS)
            raise MoaiError(
                f"the peak and memory of {name!r} are not known{did_you_mean(name, ACCELERATORS)}; known are {known}. "
                "Give another by --peak-tflops (dense, half precision) and --memory (GiB)"
            )
        cpu = _plain(name) == "cpu"
        return Hardware(count, Accelerator(name, tflops, memory, None, not cpu, "cpu" if cpu else "cuda", not cpu))
    return Hardware(count, replace(device, tflops=tflops or device.tflops, memory=memory or device.memory))


def find_device(reported: str, gib: float) -> Accelerator | None:
    """The entry of the name that a driver reports, "NVIDIA A100-SXM4-80GB", and its memory."""
    plain = _plain(reported)
    close = [d for d in ACCELERATORS.values() if _plain(re.sub(r"-(\d+GB|SXM|PCIe)$", "", d.name)) in plain]
    close = [d for d in close if abs(d.memory - gib) < 0.1 * d.memory]
    close = [d for d in close if not d.name.endswith(("SXM", "PCIe")) or ("pcie" in plain) == d.name.endswith("PCIe")]
    return max(close, key=lambda d: len(d.name)) if close else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
