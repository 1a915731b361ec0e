"""What a run ran on: versions, device, commit and command line, kept in RUN/environment.json, one entry a session.

A machine's name, user and folders are left out: a report is made to be shown.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import moai_llm
from moai_llm.runtime import write_atomically

PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "safetensors", "numpy", "numba")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve")


def describe(device: torch.device) -> dict[str, Any]:
    """This machine and what is installed on it, as plain data."""
    found: dict[str, Any] = {
        "moai_llm": moai_llm.__version__,
        "commit": commit(Path(moai_llm.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    if os.environ.get("MOAI_OPS"):
        found["MOAI_OPS"] = os.environ["MOAI_OPS"]
    return found


def record(out: Path, device: torch.device, start: int = 0) -> str:
    """Add this session to RUN/environment.json; a run that begins at step 0 begins the file anew. Returns the id that
    all sessions of the run share.
    """
    file = out / "environment.json"
    before = read(out) if start else {}
    session = {"from_step": start, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command()}
    held = {"id": before.get("id") or uuid.uuid4().hex[:12], "sessions": before.get("sessions", [])}
    held["sessions"].append({**session, **describe(device)})
    write_atomically(file, json.dumps(held, ensure_ascii=False, indent=1) + "\n")
    return str(held["id"])


def read(out: Path) -> dict[str, Any]:
    """What `record` kept; {} where nothing is there or readable."""
    try:
        found = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def command() -> list[str]:
    """The command line, the program by its name alone."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return ["moai" if name == "__main__.py" else name, *sys.argv[1:]]


def commit(folder: Path) -> str | None:
    """The commit of the working copy a folder lies in, with a `+` where files differ from it; None outside of one."""
    try:
        git = ["git", "-C", str(folder)]
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10)
        # an environment inside someone else's repository: that commit says nothing about this package
        if top.returncode or Path(top.stdout.strip()).resolve() != folder.parent.resolve():
            return None
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Of what makes matrix products fast, what this CPU has; [] where that cannot be told."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in CPU_FEATURES if name in flags]


def usable_cores() -> int:
    """Cores this process may use, which in a container may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(kind: str = "MemTotal") -> int:
    """Memory of the machine, or with `MemAvailable` what a new process could take; 0 where that cannot be told."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            found = next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{kind}:")), 0)
    except OSError:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 0
    limit = _container_limit()
    return min(found, limit) if limit else found


def resident_bytes() -> int:
    """Memory this process holds; its peak where only that can be told, 0 where nothing can."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process ever held; 0 where that cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux kilobytes


def _container_limit() -> int:
    """The limit of a container's memory (cgroup v2), 0 where there is none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(key)), "")
    except OSError:
        return ""
    return line.partition(":")[2].strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
