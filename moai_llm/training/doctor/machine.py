"""Checks of the machine: what is installed, what it can do, what runs on it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

import moai_llm
from moai_llm.ops.choices import choices
from moai_llm.runtime import has_fast_bf16
from moai_llm.training import environment
from moai_llm.training.doctor.finding import Finding

OLDEST_PYTHON = (3, 10)
BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and the two averages of AdamW
LITTLE_DISK = 5e9  # bytes: less holds few checkpoints of anything
DEVELOPERS = ("dev", "docs", "bench")  # extras that a user does not miss
# extras whose module is not called like its package
MODULES = {"pyyaml": "yaml", "tree-sitter": "tree_sitter"}


def machine(device: torch.device, folder: Path) -> Iterator[Finding]:
    """All of this file; `folder` is where runs would be written."""
    yield versions()
    yield processor()
    yield accelerator(device)
    yield memory(device)
    yield disk(folder)
    yield kernels(device)
    yield extras()


def versions() -> Finding:
    """Python, this package and torch."""
    seen = f"moai-llm {moai_llm.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("versions", "fail", seen, "Python 3.10 is the oldest that is tested: install a newer one")
    return Finding("versions", "ok", seen)


def processor() -> Finding:
    """Threads against cores, and what makes the CPU's matrix products fast."""
    cores, threads, features = environment.usable_cores(), torch.get_num_threads(), environment.cpu_features()
    fast = "bf16 products are fast" if has_fast_bf16(torch.device("cpu")) else "no fast bf16 products, fp32 is used"
    able = ", ".join(features) or "no flags known"
    seen = f"{environment.cpu_name()}, {threads} threads on {cores} cores, {able}; {fast}"
    numbers = {"cores": cores, "threads": threads}
    if threads > cores:
        advice = f"threads wait for each other where there are more than cores: export OMP_NUM_THREADS={cores}"
        return Finding("processor", "warn", seen, advice, numbers)
    if threads == 1 and cores > 1:
        return Finding("processor", "warn", seen, f"one thread of {cores}: unset OMP_NUM_THREADS", numbers)
    return Finding("processor", "ok", seen, numbers=numbers)


def accelerator(device: torch.device) -> Finding:
    """Whether a GPU that is there can be used."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        seen = f"{found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        if not has_fast_bf16(device):
            return Finding("accelerator", "warn", f"{seen}, without bf16", "use train.precision=fp16")
        return Finding("accelerator", "ok", seen)
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        if torch.version.cuda is None:
            advice = "this torch is built for the CPU: install one for CUDA, see https://pytorch.org/get-started"
            return Finding("accelerator", "warn", "an NVIDIA driver is here, but this torch cannot use it", advice)
        if not torch.cuda.is_available():
            advice = "see whether `nvidia-smi` runs, and whether the driver is new enough for this torch"
            return Finding("accelerator", "warn", "an NVIDIA driver is here, but CUDA does not start", advice)
    return Finding("accelerator", "ok", f"none that is used; runs go to {device}")


def memory(device: torch.device) -> Finding:
    """Memory that is free now, and the largest model that AdamW trains in it, activations aside."""
    free = free_bytes(device)
    holds = f"room for weights, gradients and AdamW of {free / BYTES_PER_PARAMETER / 1e9:.2g}B parameters"
    return Finding("memory", "ok", f"{size(free)} free on {device.type}: {holds}", numbers={"free_bytes": free})


def size(count: float) -> str:
    """Bytes for people: 5300000 -> "5.3 MB"."""
    scale, unit = next(((s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= s), (1e3, "kB"))
    return f"{count / scale:,.1f} {unit}"


def free_bytes(device: torch.device) -> int:
    """Bytes that a model could take now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else environment.memory_bytes("MemAvailable")


def disk(folder: Path, needed: float = LITTLE_DISK) -> Finding:
    """Room where runs are written."""
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    seen = f"{size(free)} free for {folder}"
    if free < needed:
        advice = f"checkpoints may need {size(needed)}: free space, set train.out or lower checkpoint.keep_last"
        return Finding("disk", "warn", seen, advice, {"free_bytes": free})
    return Finding("disk", "ok", seen, numbers={"free_bytes": free})


def kernels(device: torch.device) -> Finding:
    """Which implementation of each op runs, and why a faster one does not."""
    picked, missed = [], []
    for choice in choices(device):
        picked.append(f"{choice.op} {choice.fp32}")
        missed += [f"{choice.op} cannot run {name} ({reason})" for name, reason in choice.faster_missing.items()]
    numbers = {"picked": picked}
    if missed:
        advice = "; ".join(missed) + ". Slower implementations take over; `moai ops` shows all"
        return Finding("kernels", "warn", ", ".join(picked), advice, numbers)
    return Finding("kernels", "ok", ", ".join(picked), numbers=numbers)


def extras() -> Finding:
    """Optional packages. None is missed until a command asks for it, so this never complains."""
    try:
        needed = [Requirement(text) for text in metadata.requires("moai-llm") or ()]
        names = [n for n in metadata.metadata("moai-llm").get_all("Provides-Extra") or () if n not in DEVELOPERS]
    except metadata.PackageNotFoundError:
        return Finding("extras", "ok", "this package is not installed, only found on the path: extras are not known")
    here: list[str] = []
    lacking: list[str] = []
    for name in names:
        of_extra = [r for r in needed if r.marker and r.marker.evaluate({"extra": name}) and not _without(r)]
        (here if all(_there(r.name) for r in of_extra) else lacking).append(name)
    seen = f"here: {', '.join(here) or 'none'}"
    if lacking:
        seen += f"; to add others: pip install 'moai-llm[{','.join(lacking)}]'"
    return Finding("extras", "ok", seen, numbers={"here": here, "lacking": lacking})


def _without(requirement: Requirement) -> bool:
    """Whether it is needed without any extra, too."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _there(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec(MODULES.get(package, package.replace("-", "_"))) is not None
    return True
