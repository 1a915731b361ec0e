"""Which column of a record is what: found by its usual name, or named by the user."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moai_llm.data.sources.records import Reading, Record, Skipped
from moai_llm.data.sources.streams import too_long
from moai_llm.runtime import MoaiError, did_you_mean

TEXT_COLUMNS = ("text", "content", "document", "body", "본문", "내용")


def find_text_column(names: Sequence[str]) -> str | None:
    """The first of the usual names that is there, in capitals or not."""
    known = {str(name).lower(): name for name in reversed(names)}
    return next((known[usual] for usual in TEXT_COLUMNS if usual in known), None)


def text_columns(mapping: Mapping[str, str]) -> Callable[[Sequence[str]], Collection[str]]:
    """For `Reading.choose`: the columns that hold text, so that a table need not be read as a whole."""
    named = mapping.get("text")

    def choose(names: Sequence[str]) -> Collection[str]:
        whole = named if named in names else (named or "").split(".")[0]
        wanted = whole if named else find_text_column(names)
        return [wanted] if wanted and wanted in names else names  # all, for the message that none is the text

    return choose


def text_of(record: Record, reading: Reading, skipped: Skipped) -> str | None:
    """The text of a record, None where it has none, or too much of it, and that is counted."""
    columns, named = record.columns, reading.mapping.get("text")
    if named:
        found, text = lookup(columns, named)
    else:
        name = find_text_column(list(columns))
        found, text = name is not None, columns.get(name) if name is not None else None
    if not found:
        _missing(record, named, skipped)
    elif not isinstance(text, str):
        kind = "null" if text is None else f"{type(text).__name__}, not text"
        skipped.bad(
            record.source, record.place, f"the text is {kind}", "" if named else "; --map text=NAME names another"
        )
    elif len(text) > reading.max_record:  # a cell of a table
        skipped.bad(record.source, record.place, *too_long(reading.max_record, "a text"))
    else:
        return text
    return None


def _missing(record: Record, named: str | None, skipped: Skipped) -> None:
    have = ", ".join(map(str, list(record.columns)[:20])) or "nothing"
    if named:
        names = [str(name) for name in record.columns]
        skipped.bad(record.source, record.place, f"no column {named!r}", f"{did_you_mean(named, names)}; it has {have}")
        return
    nested = [str(name) for name, value in record.columns.items() if isinstance(value, list) and value]
    advice = "--map text=NAME names it"
    if len(nested) == 1 and isinstance(record.columns[nested[0]][0], dict):
        advice += f". If the documents lie within {nested[0]!r}, write them as JSON lines first"
    skipped.bad(
        record.source,
        record.place,
        f"no text column ({', '.join(TEXT_COLUMNS[:3])}, ...)",
        f"; it has {have}. {advice}",
    )


def lookup(columns: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """(is it there, value) of a column, or of `a.b`: the key b within the column a."""
    if name in columns:
        return True, columns[name]
    value: Any = columns
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def rename(record: Record, mapping: Mapping[str, str], skipped: Skipped) -> Record | None:
    """A record whose columns have our names; None where one is missing and that is counted."""
    renamed = {}
    for ours, theirs in mapping.items():
        found, renamed[ours] = lookup(record.columns, theirs)
        if not found:
            _missing(record, theirs, skipped)
            return None
    rest = {name: value for name, value in record.columns.items() if name not in mapping.values()}
    return record._replace(columns={**rest, **renamed})


def parse_mapping(given: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """["text=body"] -> {"text": "body"}.

    Raises:
        MoaiError: not of this form, an unknown name on the left, the same one twice.
    """
    mapping: dict[str, str] = {}
    for pair in given:
        ours, sign, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and sign and theirs):
            raise MoaiError(f"--map {pair}: write OURS=THEIRS, as in --map text=body")
        if ours not in known:
            raise MoaiError(
                f"--map {pair}: no column {ours!r} is known here{did_you_mean(ours, known)}; {_list(known)}"
            )
        if ours in mapping:
            raise MoaiError(f"--map names {ours!r} twice: {mapping[ours]} and {theirs}")
        mapping[ours] = theirs
    return mapping


def _list(known: Collection[str]) -> str:
    return "there are " + ", ".join(known) if len(known) > 1 else f"there is only {next(iter(known))}"


def reading_of_texts(reading: Reading, column: str | None) -> Reading:
    """The same reading, with the column of the text named, and of tables only that."""
    mapping = {**reading.mapping, "text": column} if column else dict(reading.mapping)
    return replace(reading, mapping=mapping, choose=text_columns(mapping))
