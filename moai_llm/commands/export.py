"""Write a model for others: a directory of transformers' own class, as it is or with its matrices packed, a GGUF file
for llama.cpp and Ollama, or a model of vectors for sentence-transformers.

moai export runs/chat --format hf --out exported/chat
moai export runs/chat --format gguf --dtype q8_0 --out exported/chat-gguf
moai export runs/chat --format compressed-tensors --dtype int4 --out exported/chat-int4
moai export runs/vectors --format sentence-transformers --out exported/vectors
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
        "--format", choices=("hf", "gguf", "compressed-tensors", "sentence-transformers"),
        help="hf: for transformers; gguf: for llama.cpp; compressed-tensors: packed, for transformers and vLLM; "
        "sentence-transformers: of a model of vectors",
    )  # fmt: skip
    parser.add_argument(
        "--out", help="what to write: a directory, or with --format gguf a name that ends in .gguf for the file alone"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16", "q8_0", "q4_0", "int8", "int4"),
        help="of the weights: hf takes fp32 (default) and bf16, gguf those and fp16, q8_0 and q4_0, compressed-tensors "
        "int4 (default) and int8",
    )  # fmt: skip
    parser.add_argument(
        "--as", dest="target", metavar="NAME",
        help="which class or architecture to write, of those that --list shows; the first that fits by default",
    )  # fmt: skip
    parser.add_argument(
        "--split", metavar="NAME", help="gguf: llama.cpp's rule to split text by; the closest one by default"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="compressed-tensors: weights that share a scale (default 128)"
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
        raise MoaiError(
            "give --format hf, gguf, compressed-tensors or sentence-transformers, and --out; --list shows what this "
            "model can be written as"
        )
    if arguments.group_size is not None and arguments.format != "compressed-tensors":
        raise MoaiError("--group-size belongs to --format compressed-tensors: leave it out")
    if arguments.format != "gguf" and arguments.split:
        raise MoaiError("--split belongs to --format gguf: transformers reads how text is split in tokenizer.json")
    if arguments.format == "sentence-transformers":
        _export_vectors(arguments, console)
        return
    with stages(console) as progress:
        dtype = arguments.dtype or ("int4" if arguments.format == "compressed-tensors" else "fp32")
        common = {"dtype": dtype, "overwrite": arguments.overwrite, "progress": progress}
        if arguments.format == "hf":
            from moai_llm.export.native import export_native

            made = export_native(arguments.model, arguments.out, family=arguments.target, **common)
        elif arguments.format == "compressed-tensors":
            from moai_llm.export.compressed import export_compressed

            group = arguments.group_size or 128
            made = export_compressed(arguments.model, arguments.out, family=arguments.target, group=group, **common)
        else:
            from moai_llm.export.gguf import export_gguf

            made = export_gguf(
                arguments.model, arguments.out, architecture=arguments.target, split=arguments.split, **common
            )
    _report(console, made, dtype)


def _export_vectors(arguments: argparse.Namespace, console: Console) -> None:
    from moai_llm.export.sentence_transformers import TOLERANCE, export_sentence_transformers

    if arguments.dtype not in (None, "fp32"):
        raise MoaiError(
            f"vectors are written in fp32, not in {arguments.dtype}: sentence-transformers rounds by itself"
        )
    with stages(console) as progress:
        made = export_sentence_transformers(
            arguments.model, arguments.out, family=arguments.target, overwrite=arguments.overwrite, progress=progress
        )
    console.print(f"{made.path}: {made.target}, vectors of {made.width} numbers, {made.size / 1e6:,.1f} MB")
    console.print(
        f"read again by sentence-transformers, it gives the same vectors: largest difference {made.largest:.1e} over "
        f"{made.texts} texts, allowed is {TOLERANCE:.0e}"
    )
    for note in made.notes:
        console.print(f"note: {note}")


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
