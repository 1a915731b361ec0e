"""The `moai` command: a dict of verbs, each a small module imported only when it is used."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from moai_llm import __version__
from moai_llm.runtime import MoaiError, did_you_mean

# verb -> (module with `configure(parser)` and `run(arguments)`, what it does)
COMMANDS = {
    "quickstart": ("moai_llm.commands.quickstart", "from text to a chat model in a few minutes, on a CPU"),
    "tokenizer": ("moai_llm.commands.tokenizer", "train a tokenizer, look at what it does"),
    "data": ("moai_llm.commands.data", "prepare text or conversations for training, look inside"),
    "recipes": ("moai_llm.commands.recipes", "list the model presets, or print one"),
    "plan": ("moai_llm.commands.plan", "memory, days and cost of a run, before it is started"),
    "train": ("moai_llm.commands.train", "train a recipe: pretraining and fine-tuning"),
    "sweep": ("moai_llm.commands.sweep", "train a recipe for every combination of some keys, and compare"),
    "generate": ("moai_llm.commands.generate", "continue a prompt"),
    "chat": ("moai_llm.commands.chat", "talk to a model in the terminal"),
    "embed": ("moai_llm.commands.embed", "turn texts into vectors"),
    "serve": ("moai_llm.commands.serve", "a server of OpenAI's API for a model, and a page to talk to it"),
    "eval": ("moai_llm.commands.evaluate", "measure a model"),
    "card": ("moai_llm.commands.card", "write a model card from what the files of a model say"),
    "bench": ("moai_llm.commands.bench", "what a choice costs: kinds of caches"),
    "doctor": ("moai_llm.commands.doctor", "what is wrong with this machine, a model or a run, and what to do"),
    "report": ("moai_llm.commands.report", "one page of plots from one or several training runs"),
    "export": ("moai_llm.commands.export", "write a model for transformers, llama.cpp or Ollama"),
    "import": (
        "moai_llm.commands.import_model",
        "bring a model of Qwen, Llama, Mistral, Mamba or Jamba here, to train on",
    ),
    "ops": ("moai_llm.commands.ops", "which kernels run on this machine, and why"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaint about an unknown flag names the nearest known one."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help shows what it takes\n")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        # overrides may stand before and after flags: moai train RECIPE --resume train.steps=3000
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        parsed, unknown = parse(arguments)
        if unknown:
            known = [flag for parser in self._family(arguments) for flag in parser._option_string_actions]
            self.error(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0].split('=')[0], known)}")
        return parsed

    def _family(self, arguments: Sequence[str]) -> list[argparse.ArgumentParser]:
        """This parser and the subparsers the arguments name."""
        family: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                family += [parser for name, parser in action.choices.items() if name in arguments]
        return family


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for a user's mistake (one clear message), 2 for a wrong command line, 130 for
    Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"moai {__version__}")
        return
    verb = arguments[0]
    if verb not in COMMANDS:
        sys.exit(f"moai: there is no command {verb!r}{did_you_mean(verb, COMMANDS)}\n{_help()}")
    _set_environment()
    module = import_module(COMMANDS[verb][0])
    parser = Parser(prog=f"moai {verb}", description=module.__doc__)
    module.configure(parser)
    parsed = parser.parse_all(arguments[1:])
    try:
        if os.environ.get("MOAI_OPS"):
            from moai_llm.ops.dispatch import check_environment

            check_environment()
        module.run(parsed)
    except MoaiError as error:
        sys.exit(f"moai {verb}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"moai {verb}: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `moai recipes | head`


def _set_environment() -> None:
    """Before torch is imported: waiting threads yield their core (a busy machine is else many times slower), no
    library bars.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("moai_llm").setLevel(logging.INFO)
    # transformers imports torchao wherever it is installed, which then tells of kernels that nobody asked for
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: moai COMMAND ...", "", "From raw text to a language model that chats.", "", *lines, "",
         "moai COMMAND --help explains one. Begin with: moai quickstart"]
    )  # fmt: skip
