"""Talk to a fine-tuned model in the terminal. Piped input is answered line by line."""

from __future__ import annotations

import argparse

from moai_llm.commands.kv_options import add_kv_cache, check_kv, kv_of
from moai_llm.commands.sampling import add_sampling, sampling_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory, a run, or a quickstart directory")
    parser.add_argument("--system", help="system message")
    add_kv_cache(parser)
    add_sampling(parser, max_new_tokens=256)
    parser.set_defaults(temperature=0.3)


def run(arguments: argparse.Namespace) -> None:
    check_kv(arguments)
    from moai_llm.inference.chat import Chat, run_terminal
    from moai_llm.inference.load import load_model

    model = load_model(arguments.model, arguments.device, arguments.dtype)
    run_terminal(Chat(model, sampling_of(arguments), arguments.system, kv_of(arguments, model)))
