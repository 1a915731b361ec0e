"""Talk to a fine-tuned model in the terminal, or let it answer what comes through a pipe.

moai chat work/chat
moai chat work/chat --once "What is inflation?"
moai chat work/chat --load talk.json

/help lists the commands of a chat. Piped input is answered line by line as one conversation, and the output is then the
answers alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moai_llm.commands.kv_options import add_kv_cache, check_kv, kv_of
from moai_llm.commands.sampling import add_sampling, sampling_of
from moai_llm.runtime import MoaiError, cache_dir


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory, a run, a quickstart directory, an export, or adapters")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--load", metavar="FILE", help="go on from a conversation that /save has written")
    parser.add_argument("--once", metavar="PROMPT", help="print one answer and leave; - reads the question from stdin")
    parser.add_argument(
        "--history-file", type=Path, metavar="FILE",
        help="where the lines you type are kept (default: chat_history in MOAI_CACHE)",
    )  # fmt: skip
    parser.add_argument("--no-history", action="store_true", help="neither read nor keep the lines you type")
    add_kv_cache(parser)
    add_sampling(parser, max_new_tokens=256, temperature=0.3)


def run(arguments: argparse.Namespace) -> None:
    check_kv(arguments)
    sampling = sampling_of(arguments)  # a wrong value is told before a model is loaded
    question = sys.stdin.read().strip() if arguments.once == "-" else arguments.once
    if question is not None and not question.strip():
        raise MoaiError("--once needs a question")
    if question is None and sys.stdin.isatty():
        print(f"loading {arguments.model} ...", file=sys.stderr, flush=True)
    from moai_llm.inference.chat import Chat, require_template
    from moai_llm.inference.chat_commands import Commands
    from moai_llm.inference.chat_terminal import run_once, run_terminal
    from moai_llm.inference.load import ADAPTER, load_model, resolve_model
    from moai_llm.tokenizer import load_tokenizer

    path = Path(arguments.model)
    if not (path / ADAPTER).is_file():  # a large model takes a while to load, and may be none to chat with
        require_template(load_tokenizer(resolve_model(path)), path)
    model = load_model(path, arguments.device, arguments.dtype)
    chat = Chat(model, sampling, cache=kv_of(arguments, model))
    commands, told = Commands(chat), ""
    if arguments.load:
        told = commands.load(arguments.load).text
    if arguments.system:
        chat.set_system(arguments.system)
    if question is not None:
        run_once(chat, question)
        return
    if told and sys.stdin.isatty():
        print(told, file=sys.stderr)
    history = None if arguments.no_history else arguments.history_file or Path(cache_dir()) / "chat_history"
    run_terminal(chat, commands, history)
