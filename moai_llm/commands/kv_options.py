"""The options of the commands that generate through one of the caches of inference/kv."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm.runtime import MoaiError

if TYPE_CHECKING:
    from moai_llm.inference.load import TextModel

# KV_CACHES has the same names; a test compares them. That module imports torch, which --help must not
KINDS = ("dynamic", "static", "sliding", "int8", "int4", "fp8", "offload", "mmap")


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-cache", choices=KINDS, help="how keys and values are held; default the engine's slots")
    parser.add_argument(
        "--kv-keep", metavar="POLICY", help="window:N, sinks:S+window:N or heavy:K+window:N; forget the rest"
    )
    add_kv_settings(parser)


def add_kv_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-window", type=int, metavar="N", help="sliding: keys a layer of full attention sees")
    parser.add_argument("--kv-residual", type=int, metavar="N", help="int8, int4: latest tokens left as they are (128)")
    parser.add_argument("--kv-dir", type=Path, metavar="DIR", help="mmap: where its files lie; put them on a real disk")


def check_kv(arguments: argparse.Namespace) -> None:
    """What can be told before a model is loaded.

    Raises:
        MoaiError: a setting of another kind, or a policy that cannot be read.
    """
    check_settings(arguments, {arguments.kv_cache} if arguments.kv_cache else set())
    if arguments.kv_keep is not None:
        from moai_llm.inference.kv.keep import parse_keep

        parse_keep(arguments.kv_keep)


def check_settings(arguments: argparse.Namespace, kinds: set[str]) -> None:
    for name, of in (("kv_window", {"sliding"}), ("kv_residual", {"int8", "int4"}), ("kv_dir", {"mmap"})):
        if getattr(arguments, name) is not None and not kinds & of:
            raise MoaiError(
                f"--{name.replace('_', '-')} is a setting of {' and '.join(sorted(of))}: name the kind as well"
            )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `KVOptions` that were given."""
    given = {"window": arguments.kv_window, "residual": arguments.kv_residual, "directory": arguments.kv_dir}
    return {name: value for name, value in given.items() if value is not None}


def kv_of(arguments: argparse.Namespace, model: TextModel, length: int | None = None) -> Callable[[], Any] | None:
    """What makes the cache that was asked for; None for the engine's own.

    Args:
        length: tokens that a static cache must hold; the model's context when None.
    """
    if arguments.kv_cache is None and arguments.kv_keep is None:
        return None
    from moai_llm.inference.kv import kv_cache

    options = {**settings_of(arguments), **({"length": length} if length else {})}
    return kv_cache(model, arguments.kv_cache or "dynamic", arguments.kv_keep, **options)
