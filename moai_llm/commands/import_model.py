"""Bring a model of transformers here, to train on: Qwen2, Qwen3, Qwen3MoE, Llama, Mistral, Mixtral, Mamba, Jamba.

moai import Qwen/Qwen3-0.6B --out models/qwen3
moai data prepare my_text/ --tokenizer models/qwen3 --out work/text
moai train RECIPE data.train=work/text train.init_from=models/qwen3 train.out=runs/qwen3
"""

from __future__ import annotations

import argparse

from moai_llm.commands.export import stages
from moai_llm.runtime import make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, or a name on the Hugging Face Hub")
    parser.add_argument("--out", required=True, help="model directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in --out")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.export.import_native import import_native

    console = make_console()
    with stages(console) as progress:
        made = import_native(arguments.model, arguments.out, overwrite=arguments.overwrite, progress=progress)
    console.print(f"{made.path}: {made.origin}, {made.parameters:,} parameters")
    console.print(f"read again, it says what the {made.origin} says: {made.found}, allowed is {made.found.allowed:.1e}")
    for note in made.notes:
        console.print(f"note: {note}")
    console.print(
        f"train it on, beginning with\n"
        f"  moai data prepare FILES --tokenizer {made.path} --out STORE\n"
        f"  moai train RECIPE data.train=STORE train.init_from={made.path} train.out=RUN"
    )
