"""The options of every command that generates, and of every one that loads a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moai_llm.inference.sampling import Sampling


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 128, temperature: float = 0.8) -> None:
    """A flag for each field of `Sampling` but `logprobs`, which only some commands show."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, help=f"the longest answer (default {max_new_tokens})")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy (default {temperature})")
    add("--top-k", type=int, default=50, help="only the most likely tokens (default 50); 0 keeps all")
    add("--top-p", type=float, default=0.95, help="only the smallest set that holds this probability (default 0.95)")
    add("--min-p", type=float, default=0.0, help="only tokens at least this times as likely as the most likely one")
    add("--typical-p", type=float, default=1.0, help="only the most typical tokens that hold this probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1, tokens that were there are less likely")
    add("--presence-penalty", type=float, default=0.0, help="taken from the logit of each token of the answer")
    add("--frequency-penalty", type=float, default=0.0, help="the same, as often as the token is in the answer")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be given several times")
    add("--seed", type=int, help="the same seed gives the same text")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options of every command that loads a model."""
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="auto is bf16 where the device is faster in it, else fp32",
    )  # fmt: skip


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The `Sampling` of parsed arguments."""
    from dataclasses import fields

    from moai_llm.inference.sampling import Sampling

    given = {f.name: getattr(arguments, f.name) for f in fields(Sampling) if hasattr(arguments, f.name)}
    return Sampling(**{**given, "stop": tuple(arguments.stop or ())})
