"""Write a model for others: a directory of transformers' own class, or a GGUF file for llama.cpp and Ollama.

moai export runs/chat --format hf --out exported/chat
moai export runs/chat --format gguf --dtype q8_0 --out exported/chat-gguf
moai export runs/chat --list
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from rich.console import Console

    from moai_llm.config import MoaiConfig
    from moai_llm.export.source import Exported


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run (its newest checkpoint); with --list also a preset")
    parser.add_argument(
        "--format", choices=("hf", "gguf"), help="hf: a directory for transformers; gguf: for llama.cpp"
    )
    parser.add_argument(
        "--out", help="what to write: a directory, or with --format gguf a name that ends in .gguf for the file alone"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16", "q8_0", "q4_0"), default="fp32",
        help="of the weights: hf takes fp32 (default) and bf16, gguf all",
    )  # fmt: skip
    parser.add_argument(
        "--as", dest="target", metavar="NAME",
        help="which class or architecture to write, of those that --list shows; the first that fits by default",
    )  # fmt: skip
    parser.add_argument(
        "--split", metavar="NAME", help="gguf: llama.cpp's rule to split text by; the closest one by default"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is in --out")
    parser.add_argument(
        "--list", action="store_true", help="show what this model can be written as, and why not, and stop"
    )


def run(arguments: argparse.Namespace) -> None:
    console = make_console()
    if arguments.list:
        console.print(refusal_table(_config(arguments.model)))
        return
    if not arguments.format or not arguments.out:
        raise MoaiError("give --format hf or --format gguf, and --out; --list shows what this model can be written as")
    if arguments.format == "hf" and arguments.split:
        raise MoaiError("--split belongs to --format gguf: transformers reads how text is split in tokenizer.json")
    with stages(console) as progress:
        common = {"dtype": arguments.dtype, "overwrite": arguments.overwrite, "progress": progress}
        if arguments.format == "hf":
            from moai_llm.export.native import export_native

            made = export_native(arguments.model, arguments.out, family=arguments.target, **common)
        else:
            from moai_llm.export.gguf import export_gguf

            made = export_gguf(
                arguments.model, arguments.out, architecture=arguments.target, split=arguments.split, **common
            )
    _report(console, made, arguments.dtype)


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """What is done at the moment, and how far it is: a line that changes on a terminal, elsewhere a line a stage."""
    said = set()
    with console.status("reading the model ...") as status:

        def report(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")
            if not console.is_terminal and what not in said:
                said.add(what)
                console.print(f"{what} ...")

        yield report


def _config(name: str) -> MoaiConfig:
    from moai_llm.inference.load import resolve_model
    from moai_llm.recipe import get_config

    return get_config(resolve_model(name) if Path(name).is_dir() else name)


def refusal_table(config: MoaiConfig) -> Table:
    """What a model can be written as, and the reason where it cannot."""
    from moai_llm.export.layout import refusals as in_gguf
    from moai_llm.modeling.convert import refusals as in_transformers

    table = Table("--format", "--as", "", "why not", box=None, pad_edge=False)
    for form, reasons in (("hf", in_transformers(config)), ("gguf", in_gguf(config))):
        for name, reason in reasons.items():
            table.add_row(form, name, "no" if reason else "yes", reason or "")
    return table


def _report(console: Console, made: Exported, dtype: str) -> None:
    console.print(f"{made.path}: {made.target}, {dtype}, {made.size / 1e6:,.1f} MB")
    if made.found is not None:
        console.print(f"read again, it says what the model says: {made.found}, allowed is {made.found.allowed:.1e}")
    if made.rounding is not None:
        cost = made.rounding
        console.print(
            f"what {dtype} costs: {cost}; the most likely token is the same at {cost.agree:.1%} of them, KL divergence "
            f"{cost.divergence:.1e} nats"
        )
    texts, differ = made.tokenizer
    console.print(f"tokenizer: {differ} of {texts} sample texts get other ids")
    for note in made.notes:
        console.print(f"note: {note}")
