"""moai tokenizer report: tokenizers side by side, in the terminal, as JSON and as a page."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from moai_llm.commands.sources import add_reading_options, read_options, show_skipped
from moai_llm.runtime import MoaiError, logger, make_console, write_atomically

if TYPE_CHECKING:
    from moai_llm.data.sources import Reading, Skipped
    from moai_llm.tokenizer import Tokenizer

QUIET_SECONDS = 5.0  # between two lines of progress where there is no terminal


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizers", nargs="+", help="tokenizers to compare, or a folder that holds some")
    parser.add_argument(
        "--text", action="append", default=[], metavar="[LABEL=]PATH",
        help="text to measure on, again for each language or domain, such as ko=articles.jsonl; "
        "without it a small text in ko, en, ja and zh, with code, finance and emoji",
    )  # fmt: skip
    add_reading_options(parser)
    parser.add_argument(
        "--parallel", metavar="LABEL,LABEL",
        help="texts that are translations of each other: compare the tokens of all with those of the first",
    )  # fmt: skip
    parser.add_argument("--limit-mb", metavar="N", type=float, help="read N megabytes of each label and no more")
    parser.add_argument("--no-speed", action="store_true", help="leave the speeds out: the same report each time")
    parser.add_argument("--json", metavar="FILE", help="write every number there")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there, one file that needs no other")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.embedded import PARALLEL, sample_texts
    from moai_llm.data.sources import Skipped
    from moai_llm.tokenizer.report import compare
    from moai_llm.tokenizer.report_table import print_report

    for file in (arguments.json, arguments.html):
        if file and Path(file).is_dir():
            raise MoaiError(f"{file} is a folder: name a file to write")
    if arguments.limit_mb is not None and not arguments.limit_mb > 0:
        raise MoaiError(f"--limit-mb must be above 0, got {arguments.limit_mb:g}")
    console = make_console()
    tokenizers = open_all(list(chain.from_iterable(map(_inside, arguments.tokenizers))))
    parallel: Sequence[str]
    if arguments.text:
        skipped = Skipped(arguments.skip_bad)
        texts = _given_texts(arguments.text, read_options(arguments), skipped)
        parallel = _parallel(arguments.parallel, list(texts))
    else:
        if arguments.map or arguments.parallel:
            raise MoaiError("--map and --parallel speak of the texts of --text, and there are none")
        skipped = Skipped()
        texts, parallel = {label: iter(documents) for label, documents in sample_texts().items()}, PARALLEL
    if arguments.limit_mb:
        texts = {label: _first_bytes(documents, arguments.limit_mb * 1e6) for label, documents in texts.items()}
    said = time.monotonic()

    with console.status("measuring ...") as status:

        def progress(label: str, size: int) -> None:
            nonlocal said
            line = f"{label}: {size / 1e6:,.1f} MB"
            status.update(line)
            if not console.is_terminal and time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                logger.info(line)

        timed = not arguments.no_speed
        report = compare(tokenizers, texts, parallel=parallel, timed=timed, progress=progress)
    if arguments.json:
        content = json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
        _write(arguments.json, content + "\n")
    if arguments.html:
        from moai_llm.tokenizer.report_page import page

        _write(arguments.html, page(report))
    print_report(report, console)
    show_skipped(console, skipped)
    for file in filter(None, (arguments.json, arguments.html)):
        console.print(f"written to {file}", markup=False)


def open_all(sources: Sequence[str]) -> dict[str, Tokenizer]:
    """Load tokenizers under the shortest names that tell them apart, and try each.

    Raises:
        MoaiError: one of them cannot be loaded or cannot encode; the message names it.
    """
    from moai_llm.tokenizer import load_tokenizer
    from moai_llm.tokenizer.report import check

    opened = {name: load_tokenizer(source) for source, name in zip(sources, short_names(sources))}
    check(opened)
    return opened


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each path: its last part, with as many folders before it as it takes to be the only one.

    >>> short_names(["a/tok", "b/tok", "c/other"])
    ['a/tok', 'b/tok', 'other']
    """
    parts = [_parts(source) for source in sources]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths)]
        twins = [i for i, name in enumerate(names) if names.count(name) > 1 and lengths[i] < len(parts[i])]
        if not twins:
            break
        for i in twins:
            lengths[i] += 1
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _parts(source: str) -> tuple[str, ...]:
    path = Path(source)
    if not path.exists():
        return (source,)
    path = path.resolve()
    path = path.parent if path.name == "tokenizer.json" else path
    return path.parts[1:] if path.is_dir() else (*path.parts[1:-1], path.stem)


def _inside(source: str) -> list[str]:
    """The tokenizers in a folder of tokenizers; anything else as it is."""
    path = Path(source)
    if not path.is_dir() or (path / "tokenizer.json").exists():
        return [source]
    found = [p for p in sorted(path.iterdir()) if p.suffix == ".tiktoken" or (p / "tokenizer.json").is_file()]
    return [str(p) for p in found] or [source]


def _given_texts(given: Sequence[str], reading: Reading, skipped: Skipped) -> dict[str, Iterator[str]]:
    """Label -> documents of `--text` arguments. The beginning of each is read here, so that mistakes show at once."""
    from moai_llm.data.sources import read_texts

    pairs = [_label_and_path(text) for text in given]
    unnamed = iter(short_names([path for label, path in pairs if not label]))
    paths: dict[str, list[str]] = {}
    for label, path in pairs:
        paths.setdefault(label or next(unnamed), []).append(path)
    texts: dict[str, Iterator[str]] = {}
    for label, sources in paths.items():
        documents = read_texts(sources, reading=reading, skipped=skipped)
        first = next(documents, None)
        if first is None:
            raise MoaiError(f"{', '.join(sources)}: there is no text in it")
        texts[label] = (text for text, _ in chain([first], documents))
    return texts


def _label_and_path(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    if not equals or Path(text).exists() or set("/\\?") & set(label):  # git:FOLDER?ext=py has no label
        return "", text
    if not label or not path:
        raise MoaiError(f"--text {text}: give LABEL=PATH, such as ko=articles.jsonl, or a path")
    return label, path


def _parallel(given: str | None, labels: list[str]) -> list[str]:
    named = [label.strip() for label in given.split(",")] if given else []
    if wrong := [label for label in named if label not in labels]:
        raise MoaiError(f"--parallel {given}: there is no text {wrong[0]!r}; the labels are {', '.join(labels)}")
    if given and len(set(named)) < 2:
        raise MoaiError(f"--parallel {given}: name at least two labels, such as en,ko")
    return named


def _first_bytes(documents: Iterable[str], limit: float) -> Iterator[str]:
    """Documents until their size reaches the limit; the one that crosses it is cut."""
    left = limit
    for document in documents:
        size = len(document.encode("utf-8", "replace"))
        if size >= left:
            yield document.encode("utf-8", "replace")[: int(left)].decode("utf-8", "ignore")
            return
        yield document
        left -= size


def _write(file: str, content: str) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
