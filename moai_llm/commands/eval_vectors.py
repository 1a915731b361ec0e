"""What `moai eval retrieval` and `moai eval sts` share: options, texts, vectors, numbers on disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm.commands.embed import add_length, check_length, progress_of, warn_untrained
from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from moai_llm.data.embedding_records import Related


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    add_source_options(parser)
    parser.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="another model to measure; once for each"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    add_length(parser)
    add_device(parser)


def read(arguments: argparse.Namespace, console: Console, score_max: float = 1.0) -> list[Related]:
    from moai_llm.data.embedding_records import COLUMNS, EmbeddingOptions, read_related
    from moai_llm.data.sources import Skipped, read_records

    check_length(arguments.max_length)
    sources, reading = open_sources(arguments, console, COLUMNS)
    skipped = Skipped(reading.skip_bad)
    records = read_records(sources, reading, skipped=skipped)
    found = [r for r, _ in read_related(records, skipped, reading.mapping, EmbeddingOptions(score_max=score_max))]
    show_skipped(console, skipped)
    return found


def vectors_of(name: str, texts: list[str], arguments: argparse.Namespace, console: Console) -> np.ndarray:
    from moai_llm.inference.embed import embed, load_embedder

    embedder = load_embedder(name, arguments.device, arguments.dtype)
    warn_untrained(console, embedder)
    with progress_of(console, len(texts)) as done:
        return embed(embedder, texts, max_length=arguments.max_length, progress=done)


def write(file: str | None, found: Mapping[str, Any]) -> None:
    if file:
        write_atomically(Path(file), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
