"""What `moai data` knows of conversations: the options of `prepare` and the verb `schema`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.data.embedding_records import EmbeddingOptions
    from moai_llm.data.sft import ChatOptions, Detected
    from moai_llm.data.shards import Kind
    from moai_llm.data.sources import Record

EXAMPLES, LINES = 2, 12  # conversations of a source that are shown, lines of a message
COLORS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What kind of records there are, and what is learned of them."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--chat", action="store_true", help="the records are conversations: learn what the assistant says"
    )
    kind.add_argument("--preference", action="store_true", help="the records hold a chosen and a rejected answer")
    kind.add_argument("--embedding", action="store_true", help="the records hold texts that belong together")
    parser.add_argument("--score-max", type=float, metavar="N", help="with --embedding: the largest grade (default 1)")
    parser.add_argument(
        "--augment", metavar="MODULE:FUNCTION",
        help="with --embedding: your function from texts to as many, what belongs to texts that stand alone",
    )  # fmt: skip
    parser.add_argument("--learn", choices=("all", "last"), help="of a conversation, which answers (default all)")
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="tokens a conversation, or with --embedding a text, may have"
    )
    parser.add_argument(
        "--truncate",
        choices=("drop", "end", "turns"),
        help="what happens to a longer one: it is dropped (default), loses its end, or its oldest turns",
    )


def read_options(
    arguments: argparse.Namespace,
) -> tuple[Kind, ChatOptions | EmbeddingOptions | None, Collection[str]]:
    """(the kind of store, what to learn of conversations or how to read texts, what --map can name).

    Raises:
        MoaiError: an option that does nothing.
    """
    if arguments.embedding:
        return _embedding_options(arguments)
    for option, value in (("--score-max", arguments.score_max), ("--augment", arguments.augment)):
        if value is not None:
            raise MoaiError(f"{option} does nothing without --embedding")
    given = {"--learn": arguments.learn, "--max-length": arguments.max_length, "--truncate": arguments.truncate}
    if not (arguments.chat or arguments.preference):
        for option, value in given.items():
            if value is not None:
                raise MoaiError(f"{option} is for conversations: it does nothing without --chat or --preference")
        return "text", None, ("text",)
    from moai_llm.data.sft import COLUMNS, PAIR_COLUMNS, ChatOptions

    if arguments.truncate and arguments.max_length is None:
        raise MoaiError("--truncate does nothing without --max-length TOKENS")
    options = ChatOptions(arguments.learn or "all", arguments.max_length, arguments.truncate or "drop")
    return ("preference", options, PAIR_COLUMNS) if arguments.preference else ("chat", options, COLUMNS)


def _embedding_options(arguments: argparse.Namespace) -> tuple[Kind, EmbeddingOptions, Collection[str]]:
    from moai_llm.data.embedding_records import COLUMNS, EmbeddingOptions

    for option, value in (("--learn", arguments.learn), ("--truncate", arguments.truncate)):
        if value is not None:
            raise MoaiError(f"{option} is for conversations: it does nothing with --embedding")
    score_max = 1.0 if arguments.score_max is None else arguments.score_max
    return "embedding", EmbeddingOptions(arguments.max_length, score_max, arguments.augment), COLUMNS


def configure(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the shape of each source, from its first thousand records, with two of its conversations."""
    from moai_llm.data.sft import COLUMNS, PAIR_COLUMNS
    from moai_llm.data.sft.detect import detect, first_records
    from moai_llm.data.sources import Skipped, read_records

    console = make_console()
    sources, reading = open_sources(arguments, console, tuple(dict.fromkeys((*COLUMNS, *PAIR_COLUMNS))))
    skipped, found = Skipped(reading.skip_bad), False
    named = [name for name in reading.mapping if name in COLUMNS]
    for source in sources:
        records = first_records(read_records([source], reading, skipped=skipped))
        if not records:
            continue
        found = True
        detected = detect(records, named)
        console.print(f"{source.name}: {_described(detected, records[0])}", markup=False, soft_wrap=True)
        unread = _unread(records, detected)
        if unread:
            console.print(f"not read: {', '.join(unread)}", markup=False, soft_wrap=True)
        _show_examples(console, records, detected, reading.mapping)
    show_skipped(console, skipped)
    if not found:
        raise MoaiError("the sources hold no records")


def _described(detected: Detected, first: Record) -> str:
    from moai_llm.data.sft.detect import convert

    of = f"{detected.fitting:,} of the {detected.rows:,} records looked at"
    if detected.kind == "preference":
        return f"preference pairs ({of}); prepare them with --preference"
    if detected.kind == "kto":
        return f"answers marked good or bad, KTO ({of}); they are not read as pairs, and as conversations only by --map"
    if detected.schema is None:
        try:
            convert(first, None)
        except MoaiError as error:
            return f"no conversations: {error}"
    assert detected.schema is not None
    return f"{detected.schema.name} ({' + '.join(detected.schema.required)}; {of}); prepare them with --chat"


def _unread(records: Sequence[Record], detected: Detected) -> list[str]:
    """The columns that the shape does not read."""
    from moai_llm.data.sft import PAIR_COLUMNS

    if detected.kind not in ("chat", "preference"):
        return []
    schema = detected.schema
    known = {name.lower() for name in ((*schema.required, *schema.optional) if schema else PAIR_COLUMNS)}
    there = dict.fromkeys(str(name) for record in records for name in record.columns)
    return [name for name in there if name.lower() not in known]


def _show_examples(console: Console, records: Sequence[Record], detected: Detected, named: Collection[str]) -> None:
    """The first conversations that can be read, and the first error."""
    from moai_llm.data.sft.detect import convert
    from moai_llm.data.sft.pairs import read_pair

    shown, complaint = 0, ""
    for record in records if detected.kind in ("chat", "preference") else []:
        try:
            if detected.kind == "preference":
                pair = read_pair(record.columns, named)
                parts = {"chosen": pair.chosen, "rejected": pair.rejected}
            else:
                parts = {"": convert(record, detected.schema)}
        except MoaiError as error:
            complaint = complaint or f"{record.place}: {error}"
            continue
        for name, messages in parts.items():
            console.rule(f"{record.place} {name}".strip(), align="left", style="dim")
            console.print(_as_text(messages), soft_wrap=True)
        shown += 1
        if shown == EXAMPLES:
            break
    if complaint:
        console.print(f"not readable: {complaint}", markup=False, soft_wrap=True)


def _as_text(messages: Sequence[dict[str, Any]]) -> Text:
    text = Text()
    for message in messages:
        role, lines = message["role"], message["content"].split("\n")
        more = f"\n... {len(lines) - LINES} more lines" if len(lines) > LINES else ""
        learned = "" if message.get("train", True) else " (not learned)"
        text.append(f"{role}{learned}: ", style=f"bold {COLORS[role]}")
        text.append("\n".join(lines[:LINES]) + more + "\n")
        for call in message.get("tool_calls", ()):
            text.append(f"  calls {call['name']}({call['arguments']})\n", style=COLORS[role])
    return text
