"""Perplexity over many documents: by file, by language and in all, each with what chance may make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import PurePath

import numpy as np

from moai_llm.data.language import UNKNOWN, identify
from moai_llm.evaluation.compare import interval
from moai_llm.evaluation.perplexity import NOTHING, Document, Perplexity
from moai_llm.evaluation.results import Item, Results, Score, facts_of, identity
from moai_llm.inference import TextModel
from moai_llm.runtime import MoaiError

ALL, LANGUAGE = "all", "language "  # names of groups beside those of files


def language_of(how: str) -> Callable[[str, str], str]:
    """A function from (text, name of its source) to a language.

    Args:
        how: auto: by script and, where py3langid is installed, by it; folder: the name of the folder a file lies in;
            anything else is the language of every text.
    """
    if how == "folder":
        return lambda text, source: PurePath(source).parent.name or UNKNOWN
    if how != "auto":
        return lambda text, source: how
    asks = True

    def look(text: str, source: str) -> str:
        nonlocal asks
        try:
            return identify(text, model=asks).code
        except MoaiError:  # not installed: the script alone tells Korean, Japanese and Chinese
            asks = False
            return identify(text, model=False).code

    return look


class Corpus:
    """Documents of several files and languages."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def add(self, document: Document, source: str, language: str) -> None:
        found = document.found
        values = {"nats": found.nats, "bytes": float(found.bytes), "tokens": float(found.targets)}
        self.items.append(Item(identity(document.text), source, values, {"language": language}))

    def groups(self) -> dict[str, list[Item]]:
        """By file, by language where there are several, and all where there are several files."""
        groups: dict[str, list[Item]] = {}
        for item in self.items:
            groups.setdefault(item.task, []).append(item)
        files = len(groups)
        languages = sorted({item.labels["language"] for item in self.items})
        if len(languages) > 1:
            for language in languages:
                groups[f"{LANGUAGE}{language}"] = [i for i in self.items if i.labels["language"] == language]
        if files > 1:
            groups[ALL] = self.items
        return groups

    def results(self, text_model: TextModel, settings: dict[str, object]) -> Results:
        scores = [score for name, items in self.groups().items() for score in scores_of(name, items)]
        return Results("perplexity", [facts_of(text_model)], dict(settings), scores, self.items)


def total(items: Iterable[Item]) -> Perplexity:
    found = NOTHING
    for item in items:
        found += Perplexity(item.values["nats"], int(item.values["tokens"]), int(item.values["bytes"]))
    return found


def scores_of(name: str, items: list[Item]) -> list[Score]:
    """Loss, perplexity and bits per byte of some documents; the interval is over documents."""
    found = total(items)
    nats, tokens, size = (np.array([item.values[key] for item in items]) for key in ("nats", "tokens", "bytes"))
    loss = interval(nats, tokens)
    bits = interval(nats / math.log(2), size)
    rows = (
        ("loss", found.loss, loss),
        ("perplexity", found.perplexity, (_exp(loss[0]), _exp(loss[1]))),
        ("bits_per_byte", found.bits_per_byte, bits),
    )
    return [
        Score(name, metric, value, len(items), None, _known(low), _known(high), higher_is_better=False)
        for metric, value, (low, high) in rows
    ]


def _exp(value: float) -> float:
    return math.exp(min(value, 700)) if value == value else value


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
