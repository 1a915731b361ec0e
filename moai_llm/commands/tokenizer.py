"""Train a tokenizer on your text, and see how it cuts text into tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.text import Text

from moai_llm.runtime import MoaiError, make_console

COLORS = ("black on bright_yellow", "black on bright_cyan", "black on bright_green", "black on bright_magenta")


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,show}")
    train = verbs.add_parser("train", help="learn a byte-level BPE vocabulary")
    train.add_argument("sources", nargs="+", help="text, JSON lines, CSV or Parquet files, or folders of them")
    train.add_argument("--vocab-size", type=int, default=32000, help="tokens, bytes and special tokens included")
    train.add_argument("--out", required=True, help="directory to write")
    train.add_argument("--column", help="column that holds the text; found by itself when it has a usual name")
    train.add_argument("--overwrite", "--force", action="store_true", help="replace a tokenizer that is there")
    show = verbs.add_parser("show", help="colour the tokens of a text")
    show.add_argument("tokenizer", help="a tokenizer or model directory, or o200k_base")
    show.add_argument("text", help="what to cut into tokens")


def run(arguments: argparse.Namespace) -> None:
    {"train": _train, "show": _show}[arguments.verb](arguments)


def _train(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sources import read_texts
    from moai_llm.tokenizer.train import train_tokenizer

    if (Path(arguments.out) / "tokenizer.json").exists() and not arguments.overwrite:
        raise MoaiError(f"{arguments.out} holds a tokenizer already: choose another --out or pass --overwrite")
    console = make_console()
    sample: list[str] = []

    def texts():
        for text, _ in read_texts(arguments.sources, arguments.column):
            if len(sample) < 200:
                sample.append(text[:2000])
            yield text

    with console.status("learning merges ..."):
        tokenizer = train_tokenizer(texts(), arguments.vocab_size)
    tokenizer.save(arguments.out)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(sample))
    size = sum(len(text.encode("utf-8", "replace")) for text in sample)
    console.print(
        f"{tokenizer.vocab_size:,} tokens, {size / tokens:.2f} bytes per token on the first {len(sample)} documents"
    )
    console.print(f"written to {arguments.out}. Next: moai data prepare FILES --tokenizer {arguments.out} --out STORE")


def _show(arguments: argparse.Namespace) -> None:
    from moai_llm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    ids = tokenizer.encode(arguments.text)
    line = Text()
    for i, token in enumerate(ids):
        piece = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
        line.append(piece.replace("\n", "⏎\n"), style=COLORS[i % len(COLORS)])
    console = make_console()
    console.print(line)
    size = len(arguments.text.encode())
    console.print(f"{len(ids)} tokens, {size} bytes, {size / max(1, len(ids)):.2f} bytes per token: {ids}")
