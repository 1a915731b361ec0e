"""Measure what a choice costs on this machine, with a model of yours."""

from __future__ import annotations

import argparse

from moai_llm.commands import bench_kv

# verb -> (what adds its arguments, what runs it, what it does)
VERBS = {"kv": (bench_kv.configure, bench_kv.run, "caches of keys and values: bytes, perplexity, speed")}


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, (add_arguments, _, what) in VERBS.items():
        add_arguments(verbs.add_parser(verb, help=what))


def run(arguments: argparse.Namespace) -> None:
    VERBS[arguments.verb][1](arguments)
