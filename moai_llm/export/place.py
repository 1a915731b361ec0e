"""Where an export goes: written beside its place, looked at, and only then put there by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moai_llm.runtime import MoaiError

MODEL = "model.gguf"


def require_free(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse an `out` that holds something, unless `overwrite` is set, and one that would touch what is read.

    Raises:
        MoaiError: it is refused; the message says what to do.
    """
    place, read = out.resolve(), source.resolve()
    if read.is_relative_to(place) or place.is_relative_to(read):
        raise MoaiError(f"--out {out}: {source} is only read; choose a place apart from it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise MoaiError(f"{out} exists already: choose another place or pass --overwrite")
    ours = out.is_file() and out.suffix == ".gguf" or any((out / name).is_file() for name in ("config.json", MODEL))
    if not ours:
        raise MoaiError(f"{out} is there and holds no exported model, so it is not replaced: choose another --out")


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A fresh directory beside `out`, which takes its place when the block ends well; what was there goes then.

    Where `out` ends in `.gguf`, it is the file `model.gguf` of that directory that takes its place.

    Raises:
        MoaiError: it cannot be written; what was there is untouched.
    """
    out = out.resolve()
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    replaced = temporary.with_name(f"{temporary.name}-old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        made = temporary / MODEL if out.suffix == ".gguf" else temporary
        if out.exists():
            os.replace(out, replaced)
        os.replace(made, out)
    except Exception as error:  # safetensors raises its own type for a full disk
        if isinstance(error, MoaiError) or not (
            isinstance(error, OSError) or "SafetensorError" in type(error).__name__
        ):
            raise
        raise MoaiError(f"{out} cannot be written: {error}") from None
    finally:
        if replaced.exists() and not out.exists():
            os.replace(replaced, out)
        for path in (temporary, replaced):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
