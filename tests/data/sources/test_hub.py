"""Data sets by name. The Hub is never asked: local folders of its layout, a stand-in, the real offline error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data.sources import Reading, Skipped, expand, read_records, read_texts
from moai_llm.data.sources.hub import parse_name
from moai_llm.runtime import MoaiError

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: ko
  data_files: ko/*
---
"""


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache" / "downloads"))
    module.disable_progress_bars()
    return module


@pytest.fixture
def layout(tmp_path: Path, datasets: Any) -> Path:
    """A folder as the Hub has it: two configurations, one of two splits."""
    root = tmp_path / "layout"
    for name, texts in (("data/train-0.jsonl", "ab"), ("data/test-0.jsonl", "c"), ("ko/all.jsonl", "d")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    (root / "README.md").write_text(CARD)
    return root


@pytest.fixture
def saved(tmp_path: Path, datasets: Any) -> Path:
    """What save_to_disk writes, of two splits."""
    splits = {
        name: datasets.Dataset.from_dict({"text": list(texts)}) for name, texts in (("train", "ab"), ("test", "c"))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("rest", "texts"),
    [
        ("", ["a", "b"]),
        (":default", ["a", "b"]),
        ("::test", ["c"]),
        (":default:test", ["c"]),
        (":ko", ["d"]),
        (":ko:train", ["d"]),
    ],
)
def test_a_folder_of_the_layout(layout: Path, streaming: bool, rest: str, texts: list[str]) -> None:
    found = list(read_texts([f"hf:{layout}{rest}"], reading=Reading(streaming=streaming)))
    assert [text for text, _ in found] == texts
    assert found[0][1].startswith(f"{layout}:") and found[0][1].endswith(": row 1")


def test_only_the_text_is_read(layout: Path) -> None:
    assert [record.columns for record in read_records([f"hf:{layout}:ko"])] == [{"id": 1, "text": "d"}]
    with pytest.raises(MoaiError, match="row 1: no column 'body'; it has id, text"):
        list(read_texts([f"hf:{layout}:ko"], "body"))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (":koo", r"BuilderConfig 'koo' not found. Available: \['default', 'ko'\] \(did you mean 'ko'\?\)"),
        ("::tset", r"Bad split: tset. Available splits: \['train', 'test'\]"),
        ("::train[:1]", "A slice of a split needs --no-streaming"),
    ],
)
def test_what_a_folder_does_not_have(layout: Path, rest: str, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        list(read_texts([f"hf:{layout}{rest}"]))


def test_a_slice(layout: Path) -> None:
    assert [t for t, _ in read_texts([f"hf:{layout}::train[:1]"], reading=Reading(streaming=False))] == ["a"]


def test_a_program_of_a_data_set_is_not_run(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        MoaiError, match="it would run a program of its own. The Hub may have it as Parquet files: .*@refs/"
    ):
        list(read_texts([f"hf:{folder}"]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "texts"),
    [("{}", "ab"), ("{}/test", "c"), ("hf:{}", "ab"), ("hf:{}::test", "c"), ("hf:{}/test", "c"), ("{}/..", "ab")],
)
def test_save_to_disk(saved: Path, source: str, texts: str) -> None:
    (found,) = expand([source.format(saved)])
    assert [text for text, _ in read_texts([found])] == list(texts)
    assert found.size == sum(path.stat().st_size for path in Path(found.name).glob("*.arrow"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:{}::tset", r"no split 'tset' \(did you mean 'test'\?\); it has test, train"),
        ("hf:{}:ko", "has no configurations; name a split as hf:.*::SPLIT"),
        ("hf:{}/test::train", "is one data set, without splits"),
    ],
)
def test_save_to_disk_without(saved: Path, source: str, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        expand([source.format(saved)])


def test_splits_without_train(tmp_path: Path, datasets: Any) -> None:
    made = {name: datasets.Dataset.from_dict({"text": ["a"]}) for name in ("en", "ko")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    with pytest.raises(MoaiError, match="no split 'train'; name one as NAME:CONFIG:SPLIT; it has en, ko"):
        expand([tmp_path / "saved"])


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("wikimedia/wikipedia:20231101.ko:train", ("wikimedia/wikipedia", "20231101.ko", "train", None)),
        ("allenai/c4:ko", ("allenai/c4", "ko", None, None)),
        ("org/name", ("org/name", None, None, None)),
        ("org/name::test", ("org/name", None, "test", None)),
        ("org/name@v1.0", ("org/name", None, None, "v1.0")),
        ("hf:wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", None, None)),
        ("hf:org/name:ko:train[:1%]@refs/convert/parquet", ("org/name", "ko", "train[:1%]", "refs/convert/parquet")),
        ("org/name:ko:train+test", ("org/name", "ko", "train+test", None)),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_what_the_library_is_asked(
    datasets: Any, monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[object, ...], streaming: bool
) -> None:
    calls: list[dict[str, object]] = []

    def load_dataset(path: str, **options: object) -> object:
        calls.append({"path": path, **options})
        rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
        rows = rows.to_iterable_dataset() if streaming else rows
        return rows if options["split"] else {"train": rows, "validation": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = expand([source])
    assert not calls and found.size is None
    texts = list(read_texts([found], reading=Reading(streaming=streaming)))
    names = ("path", "name", "split", "revision")
    assert calls == [dict(zip(names, asked)) | {"streaming": streaming}]  # and nothing that would let programs run
    name = str(parse_name(source)._replace(split=asked[2] or "train"))  # type: ignore[arg-type]
    assert texts == [("a", f"{name}: row 1"), ("b", f"{name}: row 2")]


def test_a_stream_is_read_as_it_comes(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows are taken than are asked for, and a network that fails is not skipped."""
    taken = [0]

    def rows() -> Any:
        for i in range(10**9):
            taken[0] += 1
            if i == 5:
                raise ConnectionError("the line is dead\nand more")
            yield {"text": str(i)}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    texts = read_texts(["org/name::train"], reading=Reading(skip_bad=True))
    assert next(texts) == ("0", "org/name::train: row 1") and taken[0] < 3
    with pytest.raises(MoaiError, match="org/name::train: row 6 cannot be read: the line is dead$"):
        list(texts)


def test_the_real_error_without_a_network(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("wikimedia/wikipedia:20231101.ko", "hf:wikitext"):
        with pytest.raises(
            MoaiError, match="there is no file or folder wiki.*, and the Hub cannot be reached: .*ffline"
        ):
            list(read_texts([source], skipped=Skipped(allow_bad=True)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("DatasetNotFoundError", "org/name: neither a file or folder here nor a data set on the Hub: it is not there"),
        ("GatedRepoError", "Accept its conditions on the Hub and log in with: hf auth login"),
        (
            "Config name is missing",
            r"name one of its configurations, as org/name:CONFIG: Config name is missing. Pick a, b",
        ),
    ],
)
def test_errors_of_the_hub(datasets: Any, monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        if " " in error:
            raise ValueError(f"{error}.\nPick a,\n b")
        raise type(error, (Exception,), {})("it is not there\nmore words")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MoaiError, match=message):
        list(read_texts(["org/name"]))


def test_what_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path is said to be one, where it can be known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "articles").mkdir()
    for source, message in (
        ("data/articls", r"data/articls: no such file or folder \(did you mean 'articles'\?\)"),
        ("else/a.jsonl", "else/a.jsonl: no such file or folder"),
        ("word", "word: no such file or folder"),
        ("hf:", "hf:: a data set is written hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
    ):
        with pytest.raises(MoaiError, match=message):
            expand([source])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MoaiError, match=r"needs the package 'datasets': pip install 'moai-llm\[data\]'"):
        list(read_texts(["org/name"]))
