"""The settings of the kinds of caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moai_llm.runtime import MoaiError


@dataclass(frozen=True)
class KVOptions:
    """What the kinds take; each reads its own.

    Attributes:
        length: tokens a static cache has room for; the model's context when None.
        window: keys of a layer of full attention under `sliding`.
        group: tokens and channels that share a step in int8 and int4, an even number.
        residual: latest tokens that int8 and int4 leave as they are.
        directory: where the files of `mmap` lie; the system's place for temporary files when None.
        device: of the model: where it is a CPU there is nothing to offload.
    """

    length: int | None = None
    window: int | None = None
    group: int = 32
    residual: int = 128
    directory: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("window", 1), ("group", 2), ("residual", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MoaiError(f"{name} = {value} of a cache must be at least {least}")
        if self.group % 2:
            raise MoaiError(f"group = {self.group} of a cache must be even: 4-bit numbers lie in pairs")
        if self.directory is not None and not self.directory.is_dir():
            raise MoaiError(f"--kv-dir {self.directory}: no such directory")
