"""The standard library as test data: every so many of its files, the same ones each time."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def stdlib_sources(step: int) -> list[str]:
    """Every `step`-th UTF-8 file, line ends as they are on disk."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "lib2to3", "test"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    sources = []
    for path in files[::step]:
        try:
            sources.append(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return sources
