"""Which shape the records of a source have, found by looking at the first thousand, and held to from then on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple

from moai_llm.data.sft.messages import Messages
from moai_llm.data.sft.schemas import SCHEMAS, Schema, is_kto, is_preference, spelt_as_here
from moai_llm.data.sources import Broken, Record, Skipped
from moai_llm.runtime import MoaiError

ROWS, CHARACTERS = 1000, 16 << 20  # looked at, whichever is reached first
EXAMPLE = "name the columns, as in --map question=ask --map answer=reply or --map messages=dialogue"


class Detected(NamedTuple):
    """What the records of one source are.

    Attributes:
        kind: conversations, pairs of a better and a worse answer, answers with a mark; None for none of these.
        schema: of conversations; None for the others.
        rows: looked at.
        fitting: of them, how many have the shape.
    """

    kind: Literal["chat", "preference", "kto"] | None
    schema: Schema | None
    rows: int
    fitting: int


def detect(records: Sequence[Record], named: Collection[str] = ()) -> Detected:
    """The shape that most of these records have: its columns are there, with values of the right type.

    A shape gives way to one that reads the same columns and more. Of shapes that fit equally many records, without
    doing so together, it is that of the first record.

    Args:
        named: our names of columns which the user has named with --map: only shapes that read all of them count.

    Raises:
        MoaiError: two shapes fit the same records by different columns, or no shape reads the columns of `named`.
    """
    shapes = _candidates(named)
    rows = [spelt_as_here(record.columns) for record in records]
    said = any(name in schema.required for name in named for schema in shapes)
    for kind, test in (("preference", is_preference), ("kto", is_kto)):
        marked = sum(map(test, rows))
        if not said and marked > len(rows) // 2:
            return Detected(kind, None, len(rows), marked)  # type: ignore[arg-type]
    for exact in (True, False):  # where no value has the right type, the columns alone tell what was meant
        counts, together = _count(shapes, rows, exact)
        if counts:
            best = max(counts, key=lambda name: counts[name])  # the first of equals
            _refuse_ambiguous(best, counts, together, records[0])
            return Detected("chat", SCHEMAS[best], len(rows), counts[best] if exact else 0)
    return Detected(None, None, len(rows), 0)


def _candidates(named: Collection[str]) -> list[Schema]:
    shapes = [s for s in SCHEMAS.values() if all(name in (*s.required, *s.optional) for name in named)]
    wanted = [name for name in named if any(name in schema.required for schema in shapes)]
    shapes = [schema for schema in shapes if not wanted or any(name in schema.required for name in wanted)]
    if not shapes:
        raise MoaiError(f"--map: no shape of conversations has {' and '.join(named)} together; there are {_shapes()}")
    return shapes


def _count(
    shapes: Sequence[Schema], rows: Sequence[Mapping[str, Any]], exact: bool
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """How many rows each shape fits, and each two of them together."""
    counts, together = Counter[str](), Counter[tuple[str, str]]()
    for row in rows:
        fitting = [s for s in shapes if s.has_keys(row) and (not exact or s.fits(row))]
        used = {s.name: s.used(row) for s in fitting}
        left = [s.name for s in fitting if not any(used[s.name] < other for other in used.values())]
        counts.update(left)
        together.update((a, b) for a in left for b in left if used[a] != used[b])
    return counts, together


def _refuse_ambiguous(best: str, counts: Counter[str], together: Counter[tuple[str, str]], first: Record) -> None:
    for other in counts:
        if 2 * together[best, other] > counts[best]:
            one, two = (" and ".join(map(repr, SCHEMAS[name].required)) for name in (best, other))
            example = " ".join(f"--map {key}={key}" for key in SCHEMAS[best].required)
            raise MoaiError(
                f"{first.place}: the conversations may lie in {one}, or in {two}. Say which: {example} for the first"
            )


def read_conversations(
    records: Iterable[Record],
    skipped: Skipped | None = None,
    named: Collection[str] = (),
    shapes: dict[str, Detected] | None = None,
) -> Iterator[tuple[Messages, str]]:
    """(messages, place) of every record; each source may have a shape of its own.

    Args:
        skipped: where to count records that are no conversations, if it allows them.
        named: like `detect`.
        shapes: by the name of a source: what is known already, and what is found out is added. For whoever reads a
            source in parts, of which not every one holds its first records.

    Raises:
        MoaiError: a record that is no conversation of its source's shape, a shape that is ambiguous, preference data.
    """
    skipped = Skipped() if skipped is None else skipped
    for detected, record in with_shape(records, named, {} if shapes is None else shapes):
        if detected.kind in ("preference", "kto"):
            raise MoaiError(f"{record.place}: {_not_chat(detected.kind)}")
        try:
            yield convert(record, detected.schema), record.place
        except MoaiError as error:
            skipped.add(record.source, broken(record, str(error)))


def with_shape(
    records: Iterable[Record], named: Collection[str], shapes: dict[str, Detected]
) -> Iterator[tuple[Detected, Record]]:
    """Every record with the shape of its source, whose first records are held back until it is known."""
    for source, of_source in groupby(records, key=lambda record: record.source):
        head = [] if source in shapes else first_records(of_source)
        detected = shapes[source] if source in shapes else detect(head, named)
        shapes[source] = detected
        yield from ((detected, record) for record in chain(head, of_source))


def first_records(records: Iterable[Record]) -> list[Record]:
    """As many as are looked at, in bounded memory."""
    head: list[Record] = []
    size = 0
    for record in records:
        head.append(record)
        size += _characters(record.columns)
        if len(head) == ROWS or size >= CHARACTERS:
            break
    return head


def convert(record: Record, schema: Schema | None) -> Messages:
    """A record to a conversation.

    Raises:
        MoaiError: without the place; it is no conversation of this shape; None is no shape at all.
    """
    columns = spelt_as_here(record.columns)
    if schema is None:
        raise MoaiError(f"it has {_list(record.columns)}. Known shapes: {_shapes()}. Or {EXAMPLE}{_nested(columns)}")
    if not schema.has_keys(columns):
        missing = " and ".join(repr(key) for key in schema.required if key not in columns)
        others = [s.name for s in SCHEMAS.values() if s.has_keys(columns)]
        looks = f", which looks like {others[0]}" if others else ""
        raise MoaiError(f"no column {missing}, which this source has ({schema.name}); it has {_list(columns)}{looks}")
    return schema.read(columns)


def broken(record: Record, message: str, what: str = "not a conversation") -> Broken:
    """The error of a record. Its reason, by which such errors are counted, is without what differs between records."""
    error = Broken(record.place, f"{what}: {message}")
    error.reason = re.sub(r"'[^']*'|\"[^\"]*\"|\d+|it has .*", "…", error.reason)[:120]
    return error


def _not_chat(kind: str) -> str:
    if kind == "preference":
        return (
            "preference data (chosen and rejected): prepare it with --preference instead of --chat, or learn the "
            "better answers alone by naming columns, as in --map question=prompt --map answer=chosen"
        )
    return (
        "answers marked good or bad (KTO): to learn them all would teach the bad ones. Keep the good ones, or name the "
        "columns to read them all the same, as in --map messages=messages"
    )


def _nested(columns: Mapping[str, Any]) -> str:
    """Advice where the conversations seem to lie one level deeper."""
    for name, value in columns.items():
        inner = value[0] if isinstance(value, list) and value else None
        if isinstance(inner, Mapping) and any(s.has_keys(spelt_as_here(inner)) for s in SCHEMAS.values()):
            return f". If the conversations lie within {name!r}, write each as a JSON line first"
    return ""


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, list(names)[:20])) or "nothing"


def _shapes() -> str:
    return "; ".join(dict.fromkeys("+".join(schema.required) for schema in SCHEMAS.values()))
