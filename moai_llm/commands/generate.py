"""Continue a prompt with a model directory or a run."""

from __future__ import annotations

import argparse
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from the standard input")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 128) -> None:
    """The options of every command that generates."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help=f"the longest answer (default {max_new_tokens})"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=50, help="only the most likely tokens (default 50); 0 keeps all")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only the smallest set that holds this probability (default 0.95)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1, tokens that were there are less likely"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options of every command that loads a model."""
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="auto is bf16 where the device is faster in it, else fp32",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.inference.generate import Session, load_model, stream_text

    model = load_model(arguments.model, arguments.device, arguments.dtype)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    print(prompt, end="", flush=True)
    for piece in stream_text(Session(model), model.tokenizer.encode(prompt), sampling_of(arguments)):
        print(piece, end="", flush=True)
    print()


def sampling_of(arguments: argparse.Namespace):
    """The `Sampling` of parsed arguments."""
    from dataclasses import fields

    from moai_llm.inference.generate import Sampling

    return Sampling(**{f.name: getattr(arguments, f.name) for f in fields(Sampling)})
