"""Stores, weights and stages as a recipe writes them: `data.train` and `data.stages`. Nothing here opens a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt

from moai_llm.runtime import MoaiError

Positive = Annotated[float, Gt(0)]


@dataclass(kw_only=True)
class SourceConfig:
    #: a prepared store
    store: str
    #: its share of the rows, in relation to the other weights; None for all sources: as many rows as each holds
    weight: Positive | None = None


@dataclass(kw_only=True)
class StageConfig:
    #: a prepared store, or several with weights
    train: str | list[SourceConfig]
    #: it ends when the run has read so many tokens
    until: Positive | None = None
    #: or after so many passes over its stores
    epochs: Positive | None = None

    def sources(self) -> list[SourceConfig]:
        return [SourceConfig(store=self.train)] if isinstance(self.train, str) else self.train


def check_stages(stages: Sequence[StageConfig], name: str) -> None:
    """What a type cannot say.

    Raises:
        MoaiError: no store, weights for some of the stores only, a stage with two ends, or without one before the last.
    """
    for i, stage in enumerate(stages):
        where = f"{name}.{i}" if name.endswith(".stages") else name
        weights = [source.weight for source in stage.sources()]
        if not weights:
            raise MoaiError(f"{where}.train is an empty list: name a store")
        if None in weights and any(weights):
            raise MoaiError(f"{where}.train gives a weight to some of its stores: give one to all or to none")
        if stage.until is not None and stage.epochs is not None:
            raise MoaiError(f"{where} ends by `until` or by `epochs`: leave one of them out")
        if stage.until is None and stage.epochs is None and i < len(stages) - 1:
            raise MoaiError(f"{where} has no end, so the next stage never comes: set its `until` or `epochs`")


def with_sources(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree, where a store in a list may be written as its path alone."""

    def spelled(section: Any) -> Any:
        if not isinstance(section, dict) or not isinstance(section.get("train"), list):
            return section
        return {**section, "train": [{"store": x} if isinstance(x, str) else x for x in section["train"]]}

    data = spelled(tree.get("data", {}))
    if isinstance(data, dict) and isinstance(data.get("stages"), list):
        data = {**data, "stages": [spelled(stage) for stage in data["stages"]]}
    return {**tree, "data": data}


def of_the_meant_type(problems: Sequence[Any]) -> list[Any]:
    """pydantic's complaints, without those about the type of a union that was not meant: of a list that it is no text,
    where something in the list is wrong; of a number that it is not the word that may stand there instead.
    """
    words = {tuple(p["loc"][:-1]): str(p["loc"][-1])[8:-1] for p in problems if _is_word(p["loc"][-1])}
    problems = [
        {**p, "msg": f"{p['msg']}, or {words[p['loc'][:-1]]}"} if p["loc"][:-1] in words else p
        for p in problems
        if not _is_word(p["loc"][-1])
    ]
    inside = {tuple(problem["loc"][:-1]) for problem in problems if _is_list(problem["loc"][-1])}
    return [
        {**problem, "msg": "input should be a store, or a list of {store, weight}"}
        if problem["loc"][-1] == "str" and problem["loc"][:-1] in inside
        else problem
        for problem in problems
        if not _is_list(problem["loc"][-1]) and not (problem["loc"][-1] == "str" and isinstance(problem["input"], list))
    ]


def place_of(problem: Mapping[str, Any]) -> list[str]:
    """The keys that lead to a problem, without the names of the types that were tried."""
    types = ("str", "constrained-int")
    return [str(part) for part in problem["loc"] if part not in types and not _is_list(part) and not _is_word(part)]


def _is_word(part: object) -> bool:
    return str(part).startswith("literal[")


def _is_list(part: object) -> bool:
    return str(part).startswith("list[")
