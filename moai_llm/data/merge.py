"""Stores as one, each with a share of the rows: a manifest that points at them. No token is copied."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moai_llm.data.manifest import sealed
from moai_llm.data.shards import Kind, Manifest, Part, Store, close_synced, refuse_existing
from moai_llm.runtime import MoaiError, did_you_mean

TEMPERATURE = 2.0
SMALLEST = 1e-12  # share of the rows


@dataclass(frozen=True)
class MergeSpec:
    """Which stores, and how their shares come about. A store that is merged itself comes with its parts, which divide
    its share as they did there.

    Args:
        strategy: a key of `STRATEGIES`.
        weights: of each store, for `weighted`.
        temperature: for `temperature`: 1 is proportional, and the larger it is, the more equal.
    """

    paths: tuple[str, ...]
    strategy: str = "equal"
    weights: tuple[float, ...] | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise MoaiError("no store to merge is named")
        if self.strategy not in STRATEGIES:
            raise MoaiError(f"there is no strategy {self.strategy!r}: choose {', '.join(STRATEGIES)}"
                            f"{did_you_mean(self.strategy, STRATEGIES)}")  # fmt: skip
        if (self.strategy == "weighted") != (self.weights is not None):
            raise MoaiError("the strategy weighted needs weights, one for each store" if self.weights is None else
                            f"weights are for the strategy weighted, not for {self.strategy}")  # fmt: skip
        if self.weights is not None:
            if len(self.weights) != len(self.paths):
                raise MoaiError(f"{len(self.weights)} weights for {len(self.paths)} stores: give one for each")
            for weight in self.weights:
                if not (math.isfinite(weight) and weight > 0):
                    raise MoaiError(f"a weight is a number above 0, not {weight:g}: leave out what is not to be read")
        if self.temperature is not None:
            if self.strategy != "temperature":
                raise MoaiError(f"a temperature is for the strategy temperature, not for {self.strategy}")
            if not (math.isfinite(self.temperature) and self.temperature > 0):
                raise MoaiError(f"the temperature is a number above 0, not {self.temperature:g}")


def _equal(tokens: Sequence[int], spec: MergeSpec) -> list[float]:
    return [1.0] * len(tokens)


def _proportional(tokens: Sequence[int], spec: MergeSpec) -> list[float]:
    return [float(count) for count in tokens]


def _temperature(tokens: Sequence[int], spec: MergeSpec) -> list[float]:
    """Powers of the sizes (arXiv 1907.05019), of ratios so that none of them is too small for a float."""
    largest = max(tokens)
    return [(count / largest) ** (1 / (spec.temperature or TEMPERATURE)) for count in tokens]


def _weighted(tokens: Sequence[int], spec: MergeSpec) -> list[float]:
    assert spec.weights is not None
    return list(spec.weights)


STRATEGIES: dict[str, Callable[[Sequence[int], MergeSpec], list[float]]] = {
    "weighted": _weighted,
    "equal": _equal,
    "proportional": _proportional,
    "temperature": _temperature,
}

KEYS = ("paths", "weights", "merge_strategy", "temperature")


def read_spec(file: str | Path) -> MergeSpec:
    """A merge from a JSON or YAML file: `paths`, `weights`, `merge_strategy`, `temperature`, below `datasets` or not.

    Raises:
        MoaiError: unreadable, unknown keys, values of the wrong type.
    """
    import yaml

    try:
        text = Path(file).read_text(encoding="utf-8")
        tree = json.loads(text) if Path(file).suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise MoaiError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise MoaiError(f"{file} is not readable: {error}") from None
    if isinstance(tree, Mapping) and "datasets" in tree:
        _refuse_unknown(tree, ("datasets",), str(file))
        tree = tree["datasets"]
    if not isinstance(tree, Mapping):
        raise MoaiError(f"{file} is not a mapping of options: write e.g. `paths: [work/wiki, work/news]`")
    _refuse_unknown(tree, KEYS, str(file))
    paths, weights, strategy, temperature = (tree.get(key) for key in KEYS)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise MoaiError(f"{file}: paths is a list of stores, not {paths!r}")
    if weights is not None and (not isinstance(weights, list) or not all(map(_is_number, weights))):
        raise MoaiError(f"{file}: weights is a list of numbers, not {weights!r}")
    if strategy is not None and not isinstance(strategy, str):
        raise MoaiError(f"{file}: merge_strategy is one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if temperature is not None and not _is_number(temperature):
        raise MoaiError(f"{file}: temperature is a number, not {temperature!r}")
    return make_spec(paths, strategy, weights, temperature)


def make_spec(
    paths: Sequence[str], strategy: str | None, weights: Sequence[float] | None, temperature: float | None
) -> MergeSpec:
    """Without a strategy it is the one that the weights or the temperature belong to, else `equal`."""
    if strategy is None:
        strategy = (
            "equal" if weights is None and temperature is None else "temperature" if weights is None else "weighted"
        )
    return MergeSpec(tuple(paths), strategy, None if weights is None else tuple(weights), temperature)


def _refuse_unknown(tree: Mapping[str, Any], known: Sequence[str], file: str) -> None:
    if unknown := [str(key) for key in tree if key not in known]:
        raise MoaiError(f"{file}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
                        f"it takes {', '.join(known)}")  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def merge(spec: MergeSpec, out: str | Path, *, overwrite: bool = False) -> Store:
    """Write a merged store.

    Text and conversations may be merged: the result is one of conversations, in which texts are learned whole.
    Preference pairs only with others, since a loss that compares answers has no use for anything else.

    Raises:
        MoaiError: stores of different tokenizers, kinds that do not go together, a store that is there twice, or a
            place where writing would replace what is not to be replaced.
    """
    out, stores = Path(out), [Store(path) for path in spec.paths]
    _refuse_different(stores)
    raw = STRATEGIES[spec.strategy]([store.manifest.tokens for store in stores], spec)
    parts = [Part(part.store, weight * part.weight / math.fsum(raw))
             for store, weight in zip(stores, raw) for part in store.parts()]  # fmt: skip
    _refuse_twice(parts)
    if unread := [part.store for part in parts if part.weight < SMALLEST]:
        raise MoaiError(f"{unread[0].path} would never be read, with a share below {SMALLEST:g}: leave it out")
    _refuse_place(out, [*stores, *(part.store for part in parts)], overwrite)
    first = stores[0].manifest
    manifest = Manifest(
        _kind(stores),
        first.tokenizer,
        first.vocab_size,
        first.dtype,
        tokens=sum(part.store.manifest.tokens for part in parts),
        documents=sum(len(part.store) for part in parts),
        text_bytes=sum(part.store.manifest.text_bytes for part in parts),
        parts=[_described(part, out) for part in parts],
        strategy=spec.strategy + (f" {spec.temperature or TEMPERATURE:g}" if spec.strategy == "temperature" else ""),
    )
    stores[0].tokenizer()  # refuses one that is damaged, before it is copied
    _write(manifest, stores[0].path / "tokenizer", out)
    return Store(out)


def _described(part: Part, out: Path) -> dict[str, Any]:
    manifest = part.store.manifest
    return {
        "path": path_from(out, part.store.path),
        "weight": part.weight,
        "manifest": part.store.fingerprint,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
    }


def path_from(merged: Path, part: Path) -> str:
    """How a merged store names a part: relative to itself, so that both can be moved together, where they have a
    folder in common besides the root; else absolute. Links are followed: `..` behind one leads elsewhere.
    """
    here, there = merged.resolve(), part.resolve()
    shared = [a for a, b in zip(here.parts, there.parts) if a == b]
    return Path(os.path.relpath(there, here)).as_posix() if len(shared) > 1 else there.as_posix()


def _refuse_different(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if store.manifest.tokenizer != first.manifest.tokenizer:
            raise MoaiError(
                f"{first.path} and {store.path} were made by different tokenizers, so their ids mean different text "
                f"({first.manifest.tokenizer[:12]} and {store.manifest.tokenizer[:12]}): prepare one of them again"
            )
        for kind, what in (("preference", "preference pairs"), ("embedding", "texts that belong together")):
            if (store.manifest.kind == kind) != (first.manifest.kind == kind):
                raise MoaiError(
                    f"{first.path} holds {_named(first)} and {store.path} {_named(store)}: {what} are trained on by a "
                    "loss of their own and can only be merged with each other"
                )


def _named(store: Store) -> str:
    names = {"chat": "conversations", "preference": "preference pairs", "embedding": "texts that belong together"}
    return names.get(store.manifest.kind, "text")


def _kind(stores: Sequence[Store]) -> Kind:
    kinds = {store.manifest.kind for store in stores}
    return kinds.pop() if len(kinds) == 1 else "chat"


def _refuse_twice(parts: Sequence[Part]) -> None:
    seen: dict[object, Store] = {}
    for store in (part.store for part in parts):
        for key in (store.path.resolve(), store.fingerprint):
            if key in seen and seen[key] is not store:
                also = "" if store.path == seen[key].path else f" ({store.path} is a copy of {seen[key].path})"
                raise MoaiError(f"{store.path} is there twice{also}: name it once, and give it a larger weight")
            seen[key] = store


def _refuse_place(out: Path, stores: Sequence[Store], overwrite: bool) -> None:
    refuse_existing(out, overwrite)
    if out.exists() and not (out / "manifest.json").is_file():
        raise MoaiError(f"{out} is not a store, so --overwrite does not replace it: choose another place")
    here = out.resolve()
    for store in stores:
        there = store.path.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise MoaiError(f"{out} and {store.path}, which is to be merged, lie in one another: choose another place")


def _write(manifest: Manifest, tokenizer: Path, out: Path) -> None:
    """Beside the final name, and renamed."""
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    replaced = temporary.with_name(temporary.name + "-old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shutil.copytree(tokenizer, temporary / "tokenizer")
        file = (temporary / "manifest.json").open("wb")
        file.write(sealed(asdict(manifest), temporary))
        close_synced(file)
        if out.exists():
            os.replace(out, replaced)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


class Share(NamedTuple):
    """How often a part is read."""

    whole: float  # epochs of it, while as many tokens are read as all parts have together
    first: float  # epochs of it, until the first part has been read once


def epochs(parts: Sequence[Part]) -> list[Share]:
    """How often each part is read, by its share of the rows and its size."""
    total = sum(part.store.manifest.tokens for part in parts)
    speed = [part.weight / part.store.manifest.tokens for part in parts]
    return [Share(total * each, each / max(speed)) for each in speed]
