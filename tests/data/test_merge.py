"""Merged stores: shares by each strategy, the documents of the parts one after the other, nothing copied, and every
way in which a part may have changed is an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from moai_llm.data.loader import Loader
from moai_llm.data.manifest import sealed
from moai_llm.data.merge import MergeSpec, epochs, merge, path_from, read_spec
from moai_llm.data.preference import Pairs
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import train_tokenizer
from tests.data.stores import some_documents, write_store


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Stores `a` (8 documents), `b` (30), `chat` (5), `pairs` (6) and `more` (4)."""
    for seed, (name, count, kind) in enumerate(
        [
            ("a", 8, "text"),
            ("b", 30, "text"),
            ("chat", 5, "chat"),
            ("pairs", 6, "preference"),
            ("more", 4, "preference"),
        ]
    ):
        write_store(tmp_path / name, tokenizer, some_documents(tokenizer, count, seed), kind, shard_tokens=100)  # type: ignore[arg-type]
    return tmp_path


def spec(folder: Path, *names: str, **options: object) -> MergeSpec:
    return MergeSpec(tuple(str(folder / name) for name in names), **options)  # type: ignore[arg-type]


def same(merged: Store, parts: list[Store]) -> None:
    expected = [(part, i) for part in parts for i in range(len(part))]
    assert len(merged) == len(expected) == merged.manifest.documents
    assert np.array_equal(merged.lengths(), np.concatenate([part.lengths() for part in parts]))
    for i, (part, j) in enumerate(expected):
        assert np.array_equal(merged.document(i), part.document(j))
        assert np.array_equal(merged.document(i, 1, 2), part.document(j, 1, 2))
        learn, of_part = merged.learn(i), part.learn(j)
        if merged.manifest.kind == "text":
            assert learn is None
        else:
            assert learn is not None and np.array_equal(learn, np.ones(len(learn)) if of_part is None else of_part)


def test_it_reads_as_its_parts(folder: Path) -> None:
    merged = merge(spec(folder, "b", "a"), folder / "out")
    parts = [Store(folder / "b"), Store(folder / "a")]
    assert len(parts[0].manifest.shards) > len(parts[1].manifest.shards) > 0
    same(merged, parts)
    assert [part.store.path for part in merged.parts()] == [folder.resolve() / "b", folder.resolve() / "a"]
    assert merged.manifest.tokens == sum(part.manifest.tokens for part in parts)
    assert merged.tokenizer().fingerprint == merged.manifest.tokenizer and not list(merged.problems())
    files = sorted(path.name for path in (folder / "out").rglob("*") if path.is_file())
    assert files == ["chat_template.jinja", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".tmp")]
    (part,) = parts[0].parts()  # a plain store is its own part
    assert part.store is parts[0] and part.weight == 1 and not parts[0].merged


def test_training_draws_from_a_merged_store_by_its_shares(folder: Path) -> None:
    merged = merge(spec(folder, "a", "b", strategy="weighted", weights=(3, 1)), folder / "out")
    loader = Loader(merged, 32, seed=0)
    known = [{tuple(row) for row in Loader(part.store, 32, seed=None).rows(0, 10_000)["input_ids"].tolist()}
             for part in merged.parts()]  # fmt: skip
    assert not known[0] & known[1]
    of_first = [tuple(row) in known[0] for row in loader.rows(0, 200)["input_ids"].tolist()]
    for read in range(1, 201):
        assert abs(sum(of_first[:read]) - 0.75 * read) < 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strategy": "equal"}, lambda a, b: (0.5, 0.5)),
        ({"strategy": "proportional"}, lambda a, b: (a / (a + b), b / (a + b))),
        ({"strategy": "temperature"}, lambda a, b: (a**0.5 / (a**0.5 + b**0.5), b**0.5 / (a**0.5 + b**0.5))),
        ({"strategy": "temperature", "temperature": 1.0}, lambda a, b: (a / (a + b), b / (a + b))),
        ({"strategy": "temperature", "temperature": 1e9}, lambda a, b: (0.5, 0.5)),
        ({"strategy": "weighted", "weights": (3, 1)}, lambda a, b: (0.75, 0.25)),
        ({"strategy": "weighted", "weights": (0.7, 0.3)}, lambda a, b: (0.7, 0.3)),
    ],
)
def test_strategies(
    folder: Path, options: dict[str, object], expected: Callable[[int, int], tuple[float, ...]]
) -> None:
    merged = merge(spec(folder, "a", "b", **options), folder / "out")
    sizes = [Store(folder / name).manifest.tokens for name in "ab"]
    weights = [part.weight for part in merged.parts()]
    assert weights == pytest.approx(expected(*sizes)) and sum(weights) == pytest.approx(1)
    shares = epochs(merged.parts())
    assert [share.whole for share in shares] == pytest.approx([w * sum(sizes) / t for w, t in zip(weights, sizes)])
    assert max(share.first for share in shares) == pytest.approx(1)
    assert merged.manifest.strategy.split()[0] == options["strategy"]


def test_merged_stores_come_with_their_parts(folder: Path) -> None:
    inner = merge(spec(folder, "a", "b", strategy="weighted", weights=(1, 3)), folder / "inner")
    outer = merge(spec(folder, "inner", "chat"), folder / "outer")
    assert [part.weight for part in outer.parts()] == pytest.approx([0.125, 0.375, 0.5])
    assert not any(part.store.merged for part in outer.parts())
    same(outer, [part.store for part in outer.parts()])
    shutil.rmtree(inner.path)  # it is not read any more
    assert len(Store(folder / "outer")) == 43
    with pytest.raises(MoaiError, match="a is there twice"):
        merge(spec(folder, "outer", "a"), folder / "out")


def test_text_and_conversations(folder: Path) -> None:
    merged = merge(spec(folder, "a", "chat"), folder / "out")
    assert merged.manifest.kind == "chat"
    same(merged, [Store(folder / "a"), Store(folder / "chat")])


def test_pairs(folder: Path) -> None:
    pairs = Pairs(merge(spec(folder, "pairs", "more"), folder / "out"))
    alone = Pairs(folder / "more")
    assert len(pairs) == 5 and np.array_equal(pairs[3].chosen, alone[0].chosen)
    for names in (("pairs", "a"), ("chat", "pairs")):
        with pytest.raises(MoaiError, match=f"{names[0]} holds .* and .*{names[1]} .*preference pairs are trained on"):
            merge(spec(folder, *names), folder / "other")


def test_other_tokenizers_are_refused(folder: Path) -> None:
    other = train_tokenizer(["entirely different words here " * 9], 270)
    write_store(folder / "other", other, [[5, other.eos_id]])
    with pytest.raises(MoaiError, match=r"/a and .*/other were made by different tokenizers, so their ids mean"):
        merge(spec(folder, "a", "other"), folder / "out")
    assert not (folder / "out").exists()


def test_the_same_store_twice(folder: Path) -> None:
    with pytest.raises(MoaiError, match="a is there twice"):
        merge(spec(folder, "a", "b", "b/../a"), folder / "out")
    shutil.copytree(folder / "a", folder / "copy")
    with pytest.raises(MoaiError, match=r"copy is there twice \(.*copy is a copy of .*a\): name it once"):
        merge(spec(folder, "a", "copy"), folder / "out")
    (folder / "link").symlink_to(folder / "a")
    with pytest.raises(MoaiError, match="link is there twice"):
        merge(spec(folder, "a", "link"), folder / "out")


def test_where_it_is_written(folder: Path) -> None:
    both = spec(folder, "a", "b")
    merge(both, folder / "out")
    with pytest.raises(MoaiError, match="exists already"):
        merge(both, folder / "out")
    assert merge(spec(folder, "b", "a"), folder / "out", overwrite=True).parts()[0].store.path.name == "b"
    for out in (folder / "a", folder / "a" / "inside", folder):
        with pytest.raises(MoaiError, match="lie in one another|is not a store"):
            merge(both, out, overwrite=True)
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(MoaiError, match="mine is not a store, so --overwrite does not replace it"):
        merge(both, folder / "mine", overwrite=True)
    assert (folder / "mine" / "thesis.txt").exists() and len(Store(folder / "a")) == 8


def test_parts_move_together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    merge(spec(folder, "a", "b"), folder / "deep" / "out")
    assert [part["path"] for part in Store(folder / "deep" / "out").manifest.parts] == ["../../a", "../../b"]
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    os.rename(folder, elsewhere)
    try:
        assert len(Store(elsewhere / "deep" / "out")) == 38
        (elsewhere / "link").symlink_to(elsewhere / "deep" / "out")  # `..` is meant of the folder, not of the link
        assert len(Store(elsewhere / "link")) == 38
    finally:
        os.rename(elsewhere, folder)
    assert path_from(Path("/x/out"), Path("/y/a")) == "/y/a"
    assert path_from(Path("/x/out"), Path("/x/a")) == "../a"


def test_a_part_that_is_gone_or_another(folder: Path, tokenizer: Tokenizer) -> None:
    merge(spec(folder, "a", "b"), folder / "out")
    os.rename(folder / "a", folder / "kept")
    with pytest.raises(MoaiError, match=r"out is merged of .*/a, and there is no store: put it back, or merge again"):
        Store(folder / "out")
    write_store(folder / "a", tokenizer, some_documents(tokenizer, 8, 99))
    with pytest.raises(MoaiError, match=r"/a is not the store that .*/out was merged of: merge again"):
        Store(folder / "out")
    shutil.rmtree(folder / "a")
    os.rename(folder / "kept", folder / "a")
    assert len(Store(folder / "out")) == 38
    next((folder / "a" / "shards").iterdir()).unlink()
    with pytest.raises(MoaiError, match=r"/a/shards/.* is missing: the store is damaged"):
        Store(folder / "out")


def change(out: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads((out / "manifest.json").read_text())
    edit(content)
    (out / "manifest.json").write_bytes(sealed(content, out))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["parts"][0].update(path="/etc"), "is merged of /etc, and there is no store"),
        (lambda m: m["parts"][0].update(path="../../../../../etc"), "and there is no store"),
        (lambda m: m["parts"][0].update(path=""), "part 0: path is ''"),
        (lambda m: m["parts"][0].update(path="a\0b"), "part 0: path is"),
        (lambda m: m["parts"][0].update(path="."), "is not the store that"),
        (lambda m: m["parts"][0].update(path="../b"), "is not the store that|there twice"),
        (lambda m: m["parts"][0].update(manifest=m["parts"][1]["manifest"]), "is there twice"),
        (lambda m: m["parts"][0].update(weight=0), "weight is 0, not a share of the rows"),
        (lambda m: m["parts"][0].update(weight=float("nan")), "weight is nan"),
        (lambda m: m["parts"][0].update(weight=0.9), "the weights sum to 1.4, not to 1"),
        (lambda m: m["parts"][0].update(tokens=1), "in its parts"),
        (lambda m: m.update(vocab_size=500), "of another kind or tokenizer: merge again"),
        (lambda m: m.update(tokenizer="0" * 64), "of another kind or tokenizer: merge again"),
        (lambda m: m.update(kind="preference"), "of another kind or tokenizer: merge again"),
        (lambda m: m.update(parts=[]), "a store has either shards or parts"),
        (lambda m: m.update(parts=[7]), "part 0: is no object"),
    ],
)
def test_manifests_that_lie(folder: Path, edit: Callable[[dict], object], message: str) -> None:  # type: ignore[type-arg]
    merge(spec(folder, "a", "b"), folder / "out")
    change(folder / "out", edit)
    with pytest.raises(MoaiError, match=message):
        Store(folder / "out")


def test_a_merged_store_is_no_part(folder: Path) -> None:
    inner = merge(spec(folder, "a", "b"), folder / "inner")
    outer = merge(spec(folder, "a", "chat"), folder / "outer")
    manifest = {"path": "../inner", "manifest": inner.fingerprint, "tokens": inner.manifest.tokens, "documents": 38}
    change(outer.path, lambda m: m.update(parts=[{**manifest, "weight": 1.0}], tokens=manifest["tokens"], documents=38))
    with pytest.raises(MoaiError, match="inner is not the store that"):
        Store(folder / "outer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "eqal"}, r"there is no strategy 'eqal': .*did you mean 'equal'"),
        ({"strategy": "weighted"}, "weighted needs weights, one for each store"),
        ({"strategy": "equal", "weights": (1, 2)}, "weights are for the strategy weighted, not for equal"),
        ({"strategy": "weighted", "weights": (1,)}, "1 weights for 2 stores"),
        ({"strategy": "weighted", "weights": (1, 0)}, "a weight is a number above 0, not 0"),
        ({"strategy": "weighted", "weights": (1, -2)}, "not -2"),
        ({"strategy": "weighted", "weights": (1, float("nan"))}, "not nan"),
        ({"strategy": "weighted", "weights": (1, float("inf"))}, "not inf"),
        ({"strategy": "weighted", "weights": (1, 1e-14)}, "/b would never be read, with a share below 1e-12"),
        ({"strategy": "equal", "temperature": 2}, "a temperature is for the strategy temperature, not for equal"),
        ({"strategy": "temperature", "temperature": 0}, "the temperature is a number above 0, not 0"),
    ],
)
def test_mistakes(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        merge(spec(folder, "a", "b", **options), folder / "out")


DOCUMENTED = {"datasets": {"paths": ["x", "y"], "weights": [0.7, 0.3], "merge_strategy": "weighted"}}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (DOCUMENTED, MergeSpec(("x", "y"), "weighted", (0.7, 0.3))),
        (DOCUMENTED["datasets"], MergeSpec(("x", "y"), "weighted", (0.7, 0.3))),
        ({"paths": ["x", "y"], "weights": [7, 3]}, MergeSpec(("x", "y"), "weighted", (7, 3))),
        ({"paths": ["x"]}, MergeSpec(("x",), "equal")),
        ({"paths": ["x"], "temperature": 5}, MergeSpec(("x",), "temperature", None, 5)),
        ({"paths": ["x"], "merge_strategy": "proportional"}, MergeSpec(("x",), "proportional")),
    ],
)
def test_files(tmp_path: Path, tree: object, expected: MergeSpec) -> None:
    (tmp_path / "merge.json").write_text(json.dumps(tree))
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(tree))
    assert read_spec(tmp_path / "merge.json") == read_spec(tmp_path / "merge.yaml") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{datasets: {paths: [x]}, weights: [1]}", r"unknown key 'weights'.*it takes datasets"),
        ("{paths: [x], weight: [1]}", r"unknown key 'weight' \(did you mean 'weights'\?\)"),
        ("{paths: x}", "paths is a list of stores, not 'x'"),
        ("{}", "paths is a list of stores, not None"),
        ("{paths: []}", "no store to merge is named"),
        ("{paths: [x], weights: [yes]}", "weights is a list of numbers"),
        ("{paths: [x], merge_strategy: 3}", "merge_strategy is one of"),
        ("{paths: [x], merge_strategy: fair}", "there is no strategy 'fair'"),
        ("{paths: [x], temperature: warm}", "temperature is a number, not 'warm'"),
        ("[x]", "is not a mapping of options"),
        ("{", "is not readable"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(MoaiError, match=message):
        read_spec(tmp_path / "merge.yaml")
    with pytest.raises(MoaiError, match="No such file"):
        read_spec(tmp_path / "nowhere.json")
