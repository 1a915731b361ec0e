"""What each kind of cache of keys and values costs on a model: bytes a token, perplexity, speed.

moai bench kv work/base --text book.txt
moai bench kv work/base --kinds int8,int4,sinks:4+window:256 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from moai_llm.commands.kv_options import KINDS, add_kv_settings, check_settings, settings_of
from moai_llm.commands.sampling import add_device
from moai_llm.runtime import MoaiError, make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text for the perplexity; default a sample in English"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="before the new ones; default 512, or what the context leaves"
    )
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens that are timed (default 64)")
    parser.add_argument(
        "--kinds", metavar="LIST",
        help=f"some of {','.join(KINDS)}, or policies as sinks:4+window:256; default what this model can have",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, default=32, metavar="N", help="tokens at once through the cache, for perplexity (32)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="interleaved rounds of the timing (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    add_kv_settings(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "new_tokens", "chunk", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MoaiError(f"--{name.replace('_', '-')} {value}: at least 1")
    asked = [name.strip() for name in arguments.kinds.split(",")] if arguments.kinds else []
    check_settings(arguments, set(asked) if asked else set(KINDS))
    text = _read(arguments.text) if arguments.text else _sample()
    from moai_llm.inference.kv.bench import bench, parse_kind
    from moai_llm.inference.kv.options import KVOptions
    from moai_llm.inference.load import load_model

    for name in asked:
        parse_kind(name)
    options = KVOptions(**settings_of(arguments))
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    prompt = arguments.prompt_tokens or max(1, min(512, model.context - arguments.new_tokens))
    total = prompt + arguments.new_tokens
    if total > model.context:
        raise MoaiError(f"--prompt-tokens and --new-tokens are {total} tokens; this model takes {model.context}")
    ids = model.tokenizer.encode(text)[:total]
    if len(ids) < 2:
        raise MoaiError("nothing to predict: the text has fewer than two tokens")
    console = make_console()
    kinds = asked or _possible(model.model, options)
    with ExitStack() as stack:
        tell: Callable[[str], object] = lambda _: None  # noqa: E731
        if console.is_terminal and not arguments.json:
            tell = stack.enter_context(console.status("")).update
        elif not arguments.json:
            tell = console.print
        rows = bench(model.model, ids, kinds, options, prompt, arguments.new_tokens, arguments.chunk,
                     arguments.rounds, tell)  # fmt: skip
    if arguments.json:
        print(json.dumps({"model": str(model.path), "text_tokens": len(ids), "rows": [asdict(row) for row in rows]}))
        return
    console.print(_table(rows))
    console.print(
        f"perplexity over {len(ids):,} tokens, {arguments.chunk} at a time through the cache; bytes after "
        f"{total:,} tokens; speed of {arguments.new_tokens} tokens after {prompt}, median of "
        f"{arguments.rounds} rounds in turns"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MoaiError(f"--text {path} is not UTF-8 text: {error}") from None


def _sample() -> str:
    from moai_llm.data.embedded import sample_texts

    return "\n\n".join(sample_texts()["en"])


def _possible(model, options) -> list[str]:
    """All kinds that this model can have where it is."""
    from moai_llm.inference.kv import make_cache

    found = []
    for kind in KINDS:
        try:
            make_cache(model.config, kind, None, options)
        except MoaiError:
            continue
        found.append(kind)
    return found


def _table(rows):
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("cache")
    for name in ("bytes a token", "predicted", "of dynamic", "perplexity", "change", "tokens/s", "of dynamic"):
        table.add_column(name, justify="right")
    base = rows[0].bytes_per_token
    for row in rows:
        table.add_row(
            row.name, f"{row.bytes_per_token:,.1f}{' on disk' if row.on_disk else ''}", f"{row.predicted:,.1f}",
            f"{row.bytes_per_token / base:.2f}x", f"{row.perplexity:.3f}", f"{round(row.change, 4) + 0.0:+.2%}",
            f"{row.tokens_per_second:,.1f}", f"{row.ratio:.2f}x",
        )  # fmt: skip
    return table
