"""Compile a C++ file of this folder for this very CPU, keep the library, load it with ctypes.

A generic build of such a kernel gains little, because the vectors it is about differ between machines; a compiler and
two seconds at first use gain all of it. Where something is missing, `Unavailable` says what, and another implementation
takes over.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moai_llm.ops.dispatch import Unavailable
from moai_llm.runtime import cache_dir

logger = logging.getLogger("moai_llm")

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
TARGETS = ["-march=native", "-mcpu=native"]  # the second where a compiler does not know the first

_loaded: dict[str, ctypes.CDLL | Unavailable] = {}


def load(source: str) -> ctypes.CDLL:
    """The library of a C++ file of this folder: from the cache, or built now. Asked again, the answer is the same.

    Raises:
        Unavailable: no compiler, one that fails, a cache that cannot be used, a library that does not load.
    """
    if source not in _loaded:
        try:
            _loaded[source] = _load(os.path.join(os.path.dirname(__file__), source))
        except Unavailable as error:
            _loaded[source] = error
    library = _loaded[source]
    if isinstance(library, Unavailable):
        raise library
    return library


def loaded() -> dict[str, str]:
    """C++ file -> the library made from it, of those that are loaded."""
    return {source: library._name for source, library in _loaded.items() if isinstance(library, ctypes.CDLL)}


def _load(source: str) -> ctypes.CDLL:
    name = os.path.splitext(os.path.basename(source))[0].replace("_", " ")
    compiler = _compiler()
    with open(source, "rb") as file, open(os.path.join(os.path.dirname(source), "native.h"), "rb") as shared:
        code = file.read() + shared.read()
    built_by = "\0".join([_run([*compiler, "--version"]), *FLAGS, *TARGETS, _cpu()])
    key = hashlib.sha256(code + built_by.encode()).hexdigest()[:32]
    folder = _folder()
    kept = _kept(folder, key)
    if kept is not None:
        logger.debug("native %s: %s", name, kept)
        return _open(kept)
    start = time.perf_counter()
    path = _build(compiler, source, folder, key)
    library = _open(path)
    logger.info("built the native %s for this CPU in %.1f s: %s", name, time.perf_counter() - start, path)
    return library


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = [command for command in (chosen[:1] or ["c++", "g++", "clang++"]) if shutil.which(command)]
    if not found:
        raise Unavailable(
            f"the compiler CXX={chosen[0]} is not there" if chosen else "no C++ compiler (c++, g++, clang++)"
        )
    return chosen or found[:1]


def _cpu() -> str:
    """What the CPU calls itself and can do: a library built for another one may not run here."""
    lines = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if not line.strip():  # the first core is enough
                    break
                if line.startswith(("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")):
                    lines.append(line)
    except OSError:
        lines = [platform.processor()]
    return platform.machine() + "\n" + "".join(lines)


def _folder() -> str:
    folder = os.path.join(cache_dir(), "native")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
    except OSError as error:
        raise Unavailable(f"no cache: {error}") from error
    if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022):
        raise Unavailable(f"the cache {folder} can be written by others, who could put a library there")
    return folder


def _kept(folder: str, key: str) -> str | None:
    """The library built before. A damaged one can load and then kill the process: its name says what must be in it."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{key}-*.so")):
        try:
            if os.path.basename(path) == f"{key}-{_digest(path)}.so":
                return path
            os.unlink(path)
        except OSError:  # another process has just removed it
            continue
    return None


def _build(compiler: list[str], source: str, folder: str, key: str) -> str:
    """Several processes may build at once: each under a name of its own, and the renaming is atomic."""
    try:
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    except OSError as error:
        raise Unavailable(f"no cache: {error}") from error
    os.close(handle)
    try:
        for target in TARGETS:
            try:
                _run([*compiler, *FLAGS, target, source, "-o", temporary])
                break
            except Unavailable:
                if target == TARGETS[-1]:
                    raise
        path = os.path.join(folder, f"{key}-{_digest(temporary)}.so")
        os.replace(temporary, path)
    except OSError as error:
        raise Unavailable(f"no cache: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return path


def _run(command: list[str]) -> str:
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler does not run: {error}") from error
    if result.returncode:
        lines = result.stderr.splitlines()
        lines = [line for line in lines if "error: " in line] or lines[-1:]
        raise Unavailable(f"{command[0]} failed with code {result.returncode}{': ' + lines[0] if lines else ''}")
    return result.stdout


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:32]


def _open(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise Unavailable(f"the built library does not load: {error}") from error
    library.moai_use_team.argtypes = [ctypes.c_void_p]
    library.moai_use_team(_openmp_parallel())
    return library


def _openmp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch itself uses, for kernels to share its threads."""
    try:
        # symbols are looked up in what torch._C depends on, and so not in a second runtime that happens to be loaded
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def raise_if_failed(code: int, function: Any, *_: Any) -> None:
    """For `errcheck` of a kernel that returns 0, or 1 where there was no memory."""
    if code:
        raise MemoryError(f"{function.__name__} found no memory to work in")


Given = TypeVar("Given", Tensor, Tensor | None)


def ready(tensor: Given, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Given:
    """The same, contiguous; None stays None. A kernel sees only addresses: what does not fit must be refused here.

    Raises:
        TypeError: not `dtype` on the CPU, or not of `shape` where one is given.
    """
    if tensor is None:
        return None
    if tensor.dtype is dtype and tensor.is_cpu and (shape is None or tensor.shape == shape):
        return tensor.contiguous()
    needed, got = f"{dtype} {shape or ''}".strip(), f"{tensor.dtype} {tuple(tensor.shape)}"
    raise TypeError(f"a native kernel needs {needed} on the CPU here, got {got} on {tensor.device}")


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """What a kernel reads and writes: of tensors that are `ready`, and that live until it returns."""
    return [None if t is None else t.data_ptr() for t in tensors]


Random = Callable[..., Tensor]


def self_check(check: Callable[[Random], None]) -> None:
    """Run `check(random)` whatever surrounds the first use (fake tensors, inference mode, autocast, activation
    checkpointing): a kernel that the compiler got wrong must not answer anybody. `random(*shape)` is uniform in
    [-1/2, 1/2], always the same.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32).sub_(0.5)

    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),  # hides those outside
    ):
        check(random)


def require_close(got: Tensor, truth: Tensor, tolerance: float) -> None:
    """
    Raises:
        Unavailable: the built kernel is wrong.
    """
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    if not error < tolerance:
        raise Unavailable(f"the built library is wrong: a result is off by {error:.1e} in {got.dtype}")
