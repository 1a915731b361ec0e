"""Data sets by name, as the Hub of Hugging Face has them, or in a local folder of the same layout.

`org/name`, `org/name:config`, `org/name:config:split`, each with `@revision`; `hf:` in front says that it is one where
that is not plain: `hf:squad`, `hf:./folder::test`. Data sets that need a program of their own to load are refused by
the library (datasets 4 and later), so nothing that is downloaded is ever run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moai_llm.data.sources.records import Reading, Record, Skipped, Source
from moai_llm.data.sources.tables import is_saved, read_saved, saved_files
from moai_llm.runtime import MoaiError, did_you_mean, require

NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:@/]*(:[^@/]+)?)?(@[^@]+)?")


class DatasetName(NamedTuple):
    name: str
    config: str | None
    split: str | None
    revision: str | None

    def __str__(self) -> str:
        config = f":{self.config or ''}" if self.config or self.split else ""
        split = f":{self.split}" if self.split else ""
        return self.name + config + split + (f"@{self.revision}" if self.revision else "")


def parse_name(given: str) -> DatasetName:
    """`name:config:split@revision`; a split may be a slice (`train[:1%]`, not streaming) or a sum (`train+test`)."""
    rest, _, revision = given.removeprefix("hf:").partition("@")
    name, _, rest = rest.partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise MoaiError(f"{given}: a data set is written hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return DatasetName(name, config or None, split or None, revision or None)


def hub_source(given: str) -> Source:
    """A data set; nothing is asked of the Hub before it is read.

    Raises:
        MoaiError: a local folder that does not have the split.
    """
    dataset = parse_name(given)
    folder = Path(dataset.name).expanduser()
    if folder.is_dir() and (is_saved(folder) or (folder / "dataset_dict.json").is_file()):
        if dataset.config:
            raise MoaiError(
                f"{given}: a folder of save_to_disk has no configurations; name a split as hf:{folder}::SPLIT"
            )
        return saved_source(folder, dataset.split)
    return Source(str(dataset), None, partial(_read, dataset))


def saved_source(folder: Path, split: str | None = None) -> Source:
    """What `save_to_disk` wrote: a data set, or one of the splits in a folder of them.

    Raises:
        MoaiError: no such split.
    """
    if not is_saved(folder):
        splits = sorted(path.name for path in folder.iterdir() if is_saved(path))
        folder = folder / _choose(str(folder), split, splits)
    elif split:
        raise MoaiError(f"{folder} is one data set, without splits")
    states = [path.stat() for path in saved_files(folder)]
    version = "-".join(str(state.st_mtime_ns) for state in states)
    return Source(str(folder), sum(s.st_size for s in states), partial(read_saved, folder), version=version)


def _choose(name: str, split: str | None, splits: list[str]) -> str:
    """The split asked for, else the only one, else `train`."""
    if split in splits:
        return str(split)
    if split is None and (len(splits) == 1 or "train" in splits):
        return splits[0] if len(splits) == 1 else "train"
    have = ", ".join(splits) or "none"
    what = (
        f"no split {split!r}{did_you_mean(split, splits)}"
        if split
        else "no split 'train'; name one as NAME:CONFIG:SPLIT"
    )
    raise MoaiError(f"{name}: {what}; it has {have}")


def _read(dataset: DatasetName, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    rows, split = _load(dataset, reading)
    if reading.choose is not None and rows.column_names:
        rows = rows.select_columns(reading.select(rows.column_names))
    name, number = str(dataset._replace(split=split)), 0
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the network, a broken file, a column that cannot be decoded
            raise MoaiError(f"{name}: row {number + 1} cannot be read: {_first_line(error)}") from error
        if row is None:
            return
        number += 1
        yield Record(dict(row), f"{name}: row {number}", name)


def _load(dataset: DatasetName, reading: Reading) -> tuple[Any, str]:
    """(rows, name of the split)."""
    datasets = require("datasets", "data")
    logging.getLogger("datasets").setLevel(logging.ERROR)  # what it warns of comes again as an error, or is no matter
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself that it tries again
    try:
        loaded = datasets.load_dataset(
            dataset.name,
            name=dataset.config,
            split=dataset.split,
            revision=dataset.revision,
            streaming=reading.streaming,
        )
    except Exception as error:
        raise MoaiError(f"{dataset}: {_explain(error, dataset, reading)}") from error
    if dataset.split:
        return loaded, dataset.split
    split = _choose(str(dataset), None, list(loaded))
    return loaded[split], split


def _explain(error: Exception, dataset: DatasetName, reading: Reading) -> str:
    words, kinds = _first_line(error), {kind.__name__ for kind in type(error).__mro__}
    if "ConnectionError" in kinds or "OfflineMode" in words:
        there = "" if Path(dataset.name).exists() else f"there is no file or folder {dataset.name}, and "
        return f"{there}the Hub cannot be reached: {words}"
    if "GatedRepoError" in kinds or "gated" in words:
        return f"{words}. Accept its conditions on the Hub and log in with: hf auth login"
    if "DatasetNotFoundError" in kinds:
        return f"neither a file or folder here nor a data set on the Hub: {words}"
    if "scripts are no longer supported" in words:
        branch = f"{dataset.name}@refs/convert/parquet"
        return f"{words}: it would run a program of its own. The Hub may have it as Parquet files: {branch}"
    if dataset.config and f"{dataset.config!r} not found" in words:
        known = re.findall(r"'([^']*)'", words)
        return words + did_you_mean(dataset.config, known[1:])
    if reading.streaming and dataset.split and "[" in dataset.split:
        return f"{words}. A slice of a split needs --no-streaming"
    if "Config name is missing" in words:
        return f"name one of its configurations, as {dataset.name}:CONFIG: {' '.join(str(error).split())}"
    return words


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
