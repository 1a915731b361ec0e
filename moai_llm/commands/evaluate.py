"""Measure a model, and compare what was measured."""

from __future__ import annotations

import argparse
from importlib import import_module

# verb -> (module with `configure(parser)` and `run(arguments)`, what it does)
VERBS = {
    "perplexity": ("eval_perplexity", "loss, perplexity and bits per byte of your text, by file and language"),
    "tasks": ("eval_tasks", "benchmarks through lm-eval, from local files: MMLU, HellaSwag, ARC, GSM8K, ..."),
    "experts": ("eval_experts", "what a mixture of experts does with text: load, specialisation, co-activation"),
    "long": ("eval_long", "what is left of a long context: a pass key found again, perplexity by position"),
    "retrieval": ("eval_retrieval", "how well vectors find what belongs together"),
    "sts": ("eval_sts", "how well vectors follow the grades of pairs"),
    "compare": ("eval_compare", "whether one model is better than another, or only seems so"),
    "schema": ("eval_schema", "print the JSON Schema of result files"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, (name, what) in VERBS.items():
        module = import_module(f"moai_llm.commands.{name}")
        module.configure(verbs.add_parser(verb, help=what, description=module.__doc__))


def run(arguments: argparse.Namespace) -> None:
    import_module(f"moai_llm.commands.{VERBS[arguments.verb][0]}").run(arguments)
