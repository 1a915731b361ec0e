"""Turn texts into vectors.

moai embed runs/vectors texts.jsonl --out vectors.npy
moai embed runs/vectors data/ --out vectors.parquet

What is done stands in FILE.partial. A run that was killed goes on there when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console, require

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console


EVERY = 10.0  # seconds between two lines of progress where there is no terminal


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    add_source_options(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE",
        help="vectors alone: .npy; with the texts and where they stood: .jsonl or .parquet",
    )  # fmt: skip
    add_length(parser)
    parser.add_argument("--overwrite", action="store_true", help="begin again, and replace the file that is there")
    add_device(parser)


def add_length(parser: argparse.ArgumentParser) -> None:
    """The option of every command that makes vectors."""
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="tokens of a text; default what the model was made for"
    )


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sources import Skipped, read_texts
    from moai_llm.inference.embed import BATCH_TOKENS, embed, load_embedder
    from moai_llm.inference.vector_file import PartialVectors

    out, console = Path(arguments.out), make_console()
    if out.suffix not in WRITERS:
        raise MoaiError(f"--out {out}: vectors are written as {', '.join(WRITERS)}")
    if out.exists() and not arguments.overwrite:
        raise MoaiError(f"{out} exists already: choose another place or pass --overwrite")
    if out.suffix == ".parquet":
        require("pyarrow", "data")
    check_length(arguments.max_length)
    sources, reading = open_sources(arguments, console)
    skipped = Skipped(reading.skip_bad)
    rows = list(read_texts(sources, reading=reading, skipped=skipped))
    if not rows:
        raise MoaiError("the sources hold no texts")
    embedder = load_embedder(arguments.model, arguments.device, arguments.dtype)
    warn_untrained(console, embedder)
    texts = [text for text, _ in rows]
    kept = out.with_name(out.name + ".partial")
    if arguments.overwrite:
        kept.unlink(missing_ok=True)
    partial = PartialVectors(kept, embedder, texts, arguments.max_length, BATCH_TOKENS)
    if partial.done.any():
        console.print(f"{partial.done.sum():,} of {len(texts):,} texts are done")
    with progress_of(console, len(texts)) as done:
        vectors = embed(
            embedder, texts, max_length=arguments.max_length, batch_tokens=BATCH_TOKENS, progress=done, partial=partial
        )
    limit = min(arguments.max_length or embedder.context, embedder.context)
    long = sum(len(ids) == limit for ids in embedder.encode(texts, arguments.max_length))
    with _whole(out) as temporary:
        WRITERS[out.suffix](temporary, rows, vectors)
    partial.close()
    show_skipped(console, skipped)
    if long:
        console.print(f"{long:,} texts reach {limit:,} tokens, the most that is read of one")
    console.print(f"{len(vectors):,} vectors of {vectors.shape[1]} numbers: {out}")


def check_length(length: int | None) -> None:
    if length is not None and length < 2:
        raise MoaiError(f"--max-length {length}: a text has two tokens at least, its end included")


def warn_untrained(console: Console, embedder: Any) -> None:
    if not embedder.trained:
        console.print(
            f"{embedder.path} is a language model that was not trained for vectors: they are the means of its hidden "
            "states. Train it with loss.type=info_nce"
        )


@contextmanager
def progress_of(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line now and then."""
    from rich.progress import Progress

    done, said = 0, time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("texts", total=total)

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            shown.advance(task, count)
            if not console.is_terminal and time.monotonic() - said > EVERY and done < total:
                said = time.monotonic()
                console.print(f"{done:,} of {total:,} texts")

        yield advance


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A name to write to; `out` has the content only when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_npy(file: Path, rows: Sequence[tuple[str, str]], vectors: np.ndarray) -> None:
    import numpy as np

    with file.open("wb") as opened:
        np.save(opened, vectors)


def _write_jsonl(file: Path, rows: Sequence[tuple[str, str]], vectors: np.ndarray) -> None:
    with file.open("w", encoding="utf-8") as opened:
        for (text, place), vector in zip(rows, vectors):
            line = {"text": text, "source": place, "vector": [float(str(x)) for x in vector]}
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_parquet(file: Path, rows: Sequence[tuple[str, str]], vectors: np.ndarray) -> None:
    pa = require("pyarrow", "data")
    parquet = require("pyarrow.parquet", "data")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"text": [text for text, _ in rows], "source": [place for _, place in rows], "vector": lists})
    parquet.write_table(table, file)


WRITERS = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
