"""Train and extend tokenizers on your text, see how they cut text into tokens, compare them with others."""

from __future__ import annotations

import argparse

from moai_llm.commands import tokenizer_report, tokenizer_show, tokenizer_template, tokenizer_train, tokenizer_transfer

# verb -> (what adds its arguments, what runs it, what it does)
VERBS = {
    "train": (tokenizer_train.configure_train, tokenizer_train.train, "learn a vocabulary from text"),
    "extend": (tokenizer_train.configure_extend, tokenizer_train.extend, "grow a vocabulary by merges of a domain"),
    "show": (tokenizer_show.configure, tokenizer_show.run, "colour the tokens of a text"),
    "report": (tokenizer_report.configure, tokenizer_report.run, "compare tokenizers: length, losses, speed"),
    "transfer": (tokenizer_transfer.configure, tokenizer_transfer.run, "give a trained model another tokenizer"),
    "template": (tokenizer_template.configure, tokenizer_template.run, "see a conversation rendered, set the template"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, (add_arguments, _, what) in VERBS.items():
        add_arguments(verbs.add_parser(verb, help=what))


def run(arguments: argparse.Namespace) -> None:
    VERBS[arguments.verb][1](arguments)
