"""Records of texts that belong together, in whatever columns they come: an anchor, right answers, wrong ones, a grade.

The table of columns is the only place that knows those of other people. With --map the user names them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from moai_llm.data.sft.detect import broken
from moai_llm.data.sft.messages import from_json, kind_of
from moai_llm.data.sources import Record, Skipped
from moai_llm.data.sources.columns import TEXT_COLUMNS
from moai_llm.runtime import MoaiError

RIGHT = ("positive", "positives", "pos")
WRONG = ("negative", "negatives", "neg")
SCORES = ("score", "similarity_score", "similarity", "relatedness_score")
# an anchor's column -> the columns that a right answer may stand in; the first anchor with one of them is taken
PAIRED: dict[str, tuple[str, ...]] = {
    "anchor": RIGHT,
    "query": (*RIGHT, "document", "passage", "answer", "response"),
    "sentence1": ("sentence2",),
    "text1": ("text2",),
    "premise": ("hypothesis",),
    "question": (*RIGHT, "answer", "answers", "context", "response"),
    "q": ("a",),
    "질문": ("답변", "답"),
    "instruction": ("output",),
    "title": ("body", "abstract", "text"),
}
GRADED = ("sentence1", "text1")  # whose `label` is a grade
COLUMNS = ("anchor", "positive", "negative", "score", "text")  # what --map can name
ENTAILMENT = (0, "0", "entailment")


@dataclass(frozen=True)
class EmbeddingOptions:
    """What to do with records of texts.

    Args:
        max_length: tokens of a text; what is longer loses its end.
        score_max: what grades are divided by, so that they lie from 0 to 1.
        augment: "module:function" of yours, from a list of texts to a list of as many, for texts that stand alone: what
            it makes of a text is its right answer. Back-translation is such a function.
    """

    max_length: int | None = None
    score_max: float = 1.0
    augment: str | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise MoaiError(f"a text needs two tokens at least, and the longest may have {self.max_length}")
        if not self.score_max > 0:
            raise MoaiError(f"grades are divided by the largest, which must be above 0, got {self.score_max}")
        if self.augment is not None:
            load_function(self.augment)


class Related(NamedTuple):
    """An anchor, what belongs to it, what does not, and how much the right answers do, if somebody graded it."""

    anchor: str
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    score: float | None = None


class NotRelated(MoaiError):
    """A record that is left out on purpose, and counted by this reason."""


def read_related(
    records: Iterable[Record], skipped: Skipped | None = None, named: Collection[str] = (),
    options: EmbeddingOptions | None = None,
) -> Iterator[tuple[Related, str]]:  # fmt: skip
    """(texts, place) of every record.

    Args:
        skipped: where to count records that are none, if it allows them.
        named: our names of columns which the user has named with --map.

    Raises:
        MoaiError: a record without texts in columns that are known.
    """
    skipped = Skipped() if skipped is None else skipped
    options = options or EmbeddingOptions()
    for record in records:
        try:
            yield read_one(record.columns, named, options), record.place
        except NotRelated as reason:
            skipped.leave_out(record.source, str(reason))
        except MoaiError as error:
            skipped.add(record.source, broken(record, str(error), "no texts that belong together"))


def read_one(
    columns: Mapping[str, Any], named: Collection[str] = (), options: EmbeddingOptions = EmbeddingOptions()
) -> Related:  # fmt: skip
    """A record's texts.

    Raises:
        MoaiError: without the place; it has none, or its grade is out of range.
        NotRelated: a pair of sentences of which one does not follow from the other.
    """
    there: dict[str, Any] = {}
    for name, value in columns.items():
        if value is not None and value != "":
            there.setdefault(str(name).lower(), value)
    if any(name in named for name in ("anchor", "positive", "negative")):
        anchor, right = "anchor", [name for name in RIGHT if name in there]
        if "anchor" not in there:
            raise MoaiError("no anchor; name it, as in --map anchor=question")
    else:
        anchor, right = _pair(there)
    if isinstance(there.get("set"), list) and not right:
        texts = _texts(there["set"], "set")
        return Related(texts[0], texts[1:])
    wrong = [name for name in there if name in WRONG or re.fullmatch(r"negative_\d+", name)]
    answers = tuple(text for name in right for text in _texts(there[name], name))
    if anchor == "premise" and there.get("label", 0) not in ENTAILMENT:
        raise NotRelated("premises from which the hypothesis does not follow")
    return Related(
        _text(there[anchor], anchor), answers, tuple(text for name in wrong for text in _texts(there[name], name)),
        _score(there, anchor, options.score_max) if answers else None,
    )  # fmt: skip


def _pair(there: Mapping[str, Any]) -> tuple[str, list[str]]:
    for anchor, others in PAIRED.items():
        if anchor in there and (right := next((name for name in others if name in there), None)):
            return anchor, [right]
    alone = next((name for name in ("anchor", *TEXT_COLUMNS) if name in there), None)
    if alone or isinstance(there.get("set"), list):
        return alone or "set", []
    have = ", ".join(list(there)[:20]) or "nothing"
    raise MoaiError(f"it has {have}. Name the columns, as in --map anchor=question --map positive=answer")


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise MoaiError(f"{column!r} is {kind_of(value)}, not a text")
    return value


def _texts(value: Any, column: str) -> tuple[str, ...]:
    """One text, a list of them, or such a list as JSON."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = from_json(value, repr(column))
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values and column == "set":
        raise MoaiError("'set' is empty")
    return tuple(_text(one, column) for one in values)


def _score(there: Mapping[str, Any], anchor: str, largest: float) -> float | None:
    names = (*SCORES, *(("label",) if anchor in GRADED else ()))
    name = next((name for name in names if name in there), None)
    if name is None:
        return None
    try:
        score = float(there[name]) / largest
    except (TypeError, ValueError):
        raise MoaiError(f"{name!r} is {kind_of(there[name])}, not a number") from None
    if not 0 <= score <= 1:
        raise MoaiError(f"{name!r} is {there[name]}, and grades lie from 0 to {largest:g}: say the largest with "
                        "--score-max 5")  # fmt: skip
    return score


# ---------------------------------------------------------------- a function of the user's


@dataclass
class Augmenter:
    """Right answers for texts that stand alone, by a function of the user's."""

    name: str
    _function: Callable[[list[str]], Sequence[str]] | None = field(default=None, repr=False)

    def __call__(self, records: Sequence[Related]) -> list[Related]:
        """The records; those without a right answer get one.

        Raises:
            MoaiError: the function does not give a text for each.
        """
        self._function = self._function or load_function(self.name)
        alone = [record.anchor for record in records if not record.right]
        made = list(self._function(alone)) if alone else []
        if len(made) != len(alone) or not all(isinstance(text, str) for text in made):
            raise MoaiError(f"--augment {self.name}: of {len(alone)} texts it made {len(made)}, which must be as many "
                            "texts")  # fmt: skip
        texts = iter(made)
        return [record if record.right else record._replace(right=(next(texts),)) for record in records]


def load_function(name: str) -> Callable[[list[str]], Sequence[str]]:
    """A function by "module:function"; a module may lie in the current folder.

    Raises:
        MoaiError: there is none.
    """
    module, separator, function = name.partition(":")
    if not separator:
        raise MoaiError(f"--augment {name}: write module:function, e.g. mine:back_translate")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), function, None)
    except ImportError as error:
        raise MoaiError(f"--augment {name}: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise MoaiError(f"--augment {name}: {module} has no function {function!r}")
    return found
