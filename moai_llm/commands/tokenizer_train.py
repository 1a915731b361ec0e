"""`moai tokenizer train` and `moai tokenizer extend`: read and sample sources, learn, measure, write."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moai_llm.commands.sources import ReadProgress, add_reading_options, read_options, show_skipped
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.tokenizer import Tokenizer
    from moai_llm.tokenizer.sample import Sample

# mode -> (engine, share of the sample)
MODES = {"default": ("tokenizers", 1.0), "fast": ("words", 1.0), "turbo": ("words", 0.2), "ultrafast": ("words", 0.02)}
# peak memory beside the interpreter's, in bytes for each byte of the sample: `python -m benchmarks.run tokenizer`
MEMORY = {"tokenizers": 12, "words": 9}
COUNTS = "word_counts.npz"
ONE = "text"  # the label where no languages are named
_LABELLED = re.compile(r"([A-Za-z][\w-]{0,31})=(.+)", re.DOTALL)
SOURCE_HELP = "files, folders or data sets; ko=PATH says its language, {language} in it stands for each of --languages"


def configure_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--vocab-size", type=int, default=32000, help="tokens, bytes and special tokens included")
    modes = _add_common(parser)
    modes.add_argument(
        "--fast", action="store_true", help="the same vocabulary from our own trainer, several times faster"
    )
    parser.add_argument("--algorithm", choices=("bpe", "unigram"), default="bpe", help="default bpe")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="more control tokens")
    parser.add_argument(
        "--chat-template", default="chatml", metavar="TEMPLATE", help="chatml (default), llama3, gemma or a Jinja file"
    )
    parser.add_argument(
        "--counts", metavar="FILE", help=f"learn from the {COUNTS} of an earlier training, not from sources"
    )
    parser.add_argument("--code", action="store_true", help="also measure on source code found on this machine")


def configure_extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", help="the tokenizer to extend: a directory, a tokenizer.json, or a name like o200k_base"
    )
    parser.add_argument("--source", nargs="+", required=True, dest="sources", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens of the result, those of the base included"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> Any:
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--languages", nargs="+", metavar="LANGUAGE", help="languages that get an equal share each")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--turbo", action="store_true", help="learn from a fifth of the text")
    modes.add_argument("--ultrafast", action="store_true", help="learn from a fiftieth of the text: for tests only")
    parser.add_argument("--sample-mb", type=float, help="megabytes of text to learn from, all languages together")
    parser.add_argument(
        "--max-documents", type=int, metavar="N", help="read at most so many documents of each language"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    add_reading_options(parser)
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace a tokenizer that is there")
    return modes


def train(arguments: argparse.Namespace) -> None:
    from moai_llm.tokenizer.chat import set_template, template_tokens
    from moai_llm.tokenizer.load import END_OF_TEXT, PAD
    from moai_llm.tokenizer.sample import BYTES_PER_TOKEN, sample_texts
    from moai_llm.tokenizer.stages import Stage, save_stages
    from moai_llm.tokenizer.train import check_vocab_size, train_tokenizer
    from moai_llm.tokenizer.unigram import train_unigram
    from moai_llm.tokenizer.words import count_words, load_word_counts

    console = make_console()
    mode = _mode(arguments)
    engine, share = MODES[mode]
    template, more = arguments.chat_template, arguments.special_tokens
    special = tuple(dict.fromkeys((END_OF_TEXT, PAD, *more, *template_tokens(template))))
    check_vocab_size(arguments.vocab_size, special)
    _check(arguments)
    sample: Sample | None = None
    if arguments.counts:
        if arguments.sources or arguments.languages or mode != "default":
            raise MoaiError("--counts takes the place of sources, languages and speed modes: leave them out")
        words, engine = load_word_counts(arguments.counts), "words"
    else:
        budget = _budget(arguments) or max(1 << 22, BYTES_PER_TOKEN * arguments.vocab_size)
        sources = by_language(arguments.sources, arguments.languages)
        most = int(budget * share)
        each = f", {_size(most // len(sources))} for each of {len(sources)} languages," if len(sources) > 1 else ""
        console.print(
            f"learning from {_size(most)} of text or less{each} in about {_size(_memory(most, engine))} of memory"
        )
        if mode == "ultrafast":
            console.print("--ultrafast learns from a fiftieth of the text and is for tests only: see the price below")
        opened = _Sources(console, sources, arguments)
        with opened.shown:
            sample = sample_texts(
                opened.texts, budget, share=share, most_documents=arguments.max_documents, seed=arguments.seed,
                progress=opened.progress,
            )  # fmt: skip
        _show_sample(console, sample)
        show_skipped(console, opened.skipped)
        words = count_words(sample)
    console.print(f"{len(words):,} distinct words")
    with _learning(console, f"learning {arguments.vocab_size:,} tokens", arguments.vocab_size) as learned:
        if arguments.algorithm == "unigram":
            tokenizer = train_unigram(words, arguments.vocab_size, special_tokens=special, seed=arguments.seed)
        elif engine == "tokenizers" and sample is not None:
            tokenizer = train_tokenizer(sample, arguments.vocab_size, special_tokens=special, engine="tokenizers")
        else:
            tokenizer = train_tokenizer(words, arguments.vocab_size, special_tokens=special, progress=learned)
    set_template(tokenizer, template)
    tokenizer.save(arguments.out)
    words.save(Path(arguments.out) / COUNTS)
    settings = {"algorithm": arguments.algorithm, "mode": mode, "seed": arguments.seed, "counts": arguments.counts}
    size = tokenizer.vocab_size
    save_stages(
        arguments.out, [Stage("train", 0, size, size, tokenizer.fingerprint, settings, _corpus(arguments, sample))]
    )
    _show_price(console, tokenizer, sample, arguments.code)
    console.print(
        f"written to {arguments.out}. Next: moai data prepare FILES --tokenizer {arguments.out} --out STORE\n"
        f"Another size from the same words: moai tokenizer train --counts {Path(arguments.out) / COUNTS} --vocab-size N"
    )


def extend(arguments: argparse.Namespace) -> None:
    from moai_llm.tokenizer import load_tokenizer
    from moai_llm.tokenizer.extend import extend_tokenizer, new_tokens, word_counter
    from moai_llm.tokenizer.sample import sample_texts
    from moai_llm.tokenizer.stages import Stage, load_stages, save_stages
    from moai_llm.tokenizer.words import WordCounts

    console = make_console()
    _check(arguments)
    base = load_tokenizer(arguments.base)
    stages = load_stages(arguments.base, base)
    sources = by_language(arguments.sources, arguments.languages)
    share, budget = MODES[_mode(arguments)][1], _budget(arguments)
    new = new_tokens(base, arguments.vocab_size)
    words = WordCounts()
    count = word_counter(base, words)
    opened = _Sources(console, sources, arguments)
    with opened.shown:
        sample = sample_texts(
            opened.texts, budget, share=share, most_documents=arguments.max_documents,
            seed=arguments.seed, sink=None if budget else count, progress=opened.progress,
        )  # fmt: skip
    for piece in sample:  # none where they were counted as they came
        count(piece)
    _show_sample(console, sample)
    show_skipped(console, opened.skipped)
    with _learning(console, f"learning {new:,} tokens beyond the {base.vocab_size:,} of the base", new) as learned:
        tokenizer = extend_tokenizer(base, words, arguments.vocab_size, progress=learned)
    tokenizer.save(arguments.out)
    settings = {"mode": _mode(arguments), "seed": arguments.seed}
    if not stages:
        stages = [Stage("base", 0, base.vocab_size, base.vocab_size, base.fingerprint, {"from": str(arguments.base)})]
    corpus, size = _corpus(arguments, sample), tokenizer.vocab_size
    stages.append(Stage("extend", base.vocab_size, new, size, tokenizer.fingerprint, settings, corpus))
    save_stages(arguments.out, stages)
    _show_gain(console, base, tokenizer, sample)
    console.print(
        f"written to {arguments.out}; every id below {base.vocab_size:,} means what it did.\n"
        f"A model of the base goes on with: moai tokenizer transfer --model MODEL --tokenizer {arguments.out} --out NEW"
    )


def by_language(sources: Sequence[str], languages: Sequence[str] | None) -> dict[str, list[str]]:
    """Sources by label, in the order of the languages.

    Raises:
        MoaiError: no sources, a language without one, or a source without a language where languages are named.
    """
    if not sources:
        raise MoaiError(
            "name what to learn from: files, folders or data sets, e.g. moai tokenizer train my_text/ --out T"
        )
    found: dict[str, list[str]] = {label: [] for label in languages or []}
    for source in sources:
        if "{language}" in source:
            if not languages:
                raise MoaiError(f"{source}: {{language}} stands for each of --languages, which are not given")
            for label in languages:
                found[label].append(source.replace("{language}", label))
            continue
        match = _LABELLED.fullmatch(source)
        if match and not Path(source).exists():
            if languages and match[1] not in languages:
                raise MoaiError(f"{source}: {match[1]} is not among --languages {' '.join(languages)}")
            found.setdefault(match[1], []).append(match[2])
        elif languages:
            raise MoaiError(f"{source}: say its language, {languages[0]}={source}, or put {{language}} into the path")
        else:
            found.setdefault(ONE, []).append(source)
    missing = [label for label, paths in found.items() if not paths]
    if missing:
        raise MoaiError(f"--languages names {missing[0]}, but no source is given for it: {missing[0]}=PATH")
    return found


class _Sources:
    """The texts of each label, how far reading them is, and the account of what is not read. Every source is there
    before any is read.
    """

    def __init__(self, console: Console, sources: Mapping[str, list[str]], arguments: argparse.Namespace) -> None:
        from moai_llm.data.sources import Skipped, Source, expand, read_texts

        self.skipped = Skipped(arguments.skip_bad)
        found = {label: expand(paths, skipped=self.skipped) for label, paths in sources.items()}
        self.shown = ReadProgress(console, [source for part in found.values() for source in part])
        reading = replace(read_options(arguments), progress=self.shown.read)

        def texts(sources: list[Source]) -> Iterator[str]:
            return (text for text, _ in read_texts(sources, reading=reading, skipped=self.skipped))

        self.texts: dict[str, Iterable[str]] = {label: texts(part) for label, part in found.items()}

    def progress(self, label: str, documents: int, size: int) -> None:
        if documents % 64 == 0:
            self.shown.update(f"{label}, {documents:,} documents, {_size(size)}")


def _mode(arguments: argparse.Namespace) -> str:
    return next((mode for mode in MODES if getattr(arguments, mode, False)), "default")


def _check(arguments: argparse.Namespace) -> None:
    if (Path(arguments.out) / "tokenizer.json").exists() and not arguments.overwrite:
        raise MoaiError(f"{arguments.out} holds a tokenizer already: choose another --out or pass --overwrite")
    for name in ("sample_mb", "max_documents"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise MoaiError(f"--{name.replace('_', '-')} must be positive, got {value:g}")


def _budget(arguments: argparse.Namespace) -> int | None:
    return None if arguments.sample_mb is None else int(arguments.sample_mb * 1e6)


def _corpus(arguments: argparse.Namespace, sample: Sample | None) -> dict[str, dict[str, object]]:
    if sample is None:
        return {}
    sources = by_language(arguments.sources, arguments.languages)
    return {
        label: {"sources": sources[label], "documents": sample.documents[label], "bytes_read": sample.read[label],
                "bytes_learned_from": sample.sizes[label]}
        for label in sample.read
    }  # fmt: skip


def _show_sample(console: Console, sample: Sample) -> None:
    table = Table("", "documents", "read", "learned from", "held out", box=None, pad_edge=False)
    for label, read in sample.read.items():
        held = sum(len(text.encode("utf-8", "replace")) for text in sample.held_out[label])
        table.add_row(label, f"{sample.documents[label]:,}", _size(read), _size(sample.sizes[label]), _size(held))
    console.print(table)


def _show_price(console: Console, tokenizer: Tokenizer, sample: Sample | None, code: bool) -> None:
    """What the vocabulary is worth, by language, on text it was not learned from."""
    from moai_llm.data.embedded import sample_texts
    from moai_llm.tokenizer.code import code_samples, measure_code
    from moai_llm.tokenizer.report import measure, price_table

    seen = sample is not None and not any(sample.held_out.values())
    texts = sample_texts() if sample is None else sample.texts if seen else sample.held_out
    where = "our built-in texts" if sample is None else "what it was learned from (too little to hold some out)"
    console.print(f"measured on {where if seen or sample is None else 'held-out text'}:")
    console.print(price_table(measure(tokenizer, {label: pieces for label, pieces in texts.items() if pieces})))
    if not code:
        return
    samples = code_samples()
    table = Table("code", "bytes", "bytes per token", "borders at sub-words", "from", box=None, pad_edge=False)
    measured = {row.label: row for row in measure_code(tokenizer, samples)}
    for label, where in samples.where.items():
        row = measured.get(label)
        cells = (
            (f"{row.text_bytes:,}", f"{row.bytes_per_token:.2f}", f"{row.alignment:.0%}") if row else ("-", "-", "-")
        )
        table.add_row(label, *cells, where)
    console.print(table)


def _show_gain(console: Console, base: Tokenizer, extended: Tokenizer, sample: Sample) -> None:
    """How many tokens the extension saves on text it was not learned from."""
    from moai_llm.tokenizer.report import measure

    texts = {label: pieces for label, pieces in sample.held_out.items() if pieces}
    if not texts:
        console.print("too little text to hold some out: the gain is not measured; see moai tokenizer report")
        return
    table = Table("held-out text", "tokens before", "after", "change", "lossless", box=None, pad_edge=False)
    for old, new in list(zip(measure(base, texts), measure(extended, texts)))[: -1 if len(texts) == 1 else None]:
        change, lossless = new.tokens / max(1, old.tokens) - 1, "yes" if new.round_trip_failures == 0 else "no"
        table.add_row(new.label, f"{old.tokens:,}", f"{new.tokens:,}", f"{change:+.1%}", lossless)
    console.print(table)


def _memory(sample: int, engine: str) -> int:
    """Bytes of memory that learning from a sample takes, the interpreter included."""
    return sample * MEMORY[engine] + (200 << 20)


def _size(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:,.1f} kB"


@contextmanager
def _learning(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left where the engine tells how far it is; plain lines off a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console.print(f"{what} ...")
    last = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("merges", total=None)

        def report(done: int) -> None:
            nonlocal last
            bar.update(task, total=total, completed=done)
            if not console.is_terminal and time.monotonic() - last > 30:
                last = time.monotonic()
                console.print(f"{done:,} of {total:,}")

        yield report
