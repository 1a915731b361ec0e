"""Continue a prompt with a model directory or a run."""

from __future__ import annotations

import argparse
import sys

from moai_llm.commands.sampling import add_sampling, sampling_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from the standard input")
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.inference.load import load_model
    from moai_llm.inference.session import Session, stream_text

    model = load_model(arguments.model, arguments.device, arguments.dtype)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    print(prompt, end="", flush=True)
    for piece in stream_text(Session(model), model.tokenizer.encode(prompt), sampling_of(arguments)):
        print(piece, end="", flush=True)
    print()
