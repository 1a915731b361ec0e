"""`moai eval` and `moai card` from the command line: what is printed, what is written, what each mistake gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.config import MoaiConfig
from moai_llm.evaluation.results import read_results
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.tokenizer import Tokenizer
from tests.commands.conftest import Moai
from tests.conftest import tiny_config
from tests.export.conftest import random_model


def save(tokenizer: Tokenizer, place: Path, mlp: str = "dense", seed: int = 0) -> Path:
    fields = {**tiny_config(mlp=mlp).to_dict(), "vocab_size": tokenizer.padded_vocab_size}
    model: MoaiForCausalLM = random_model(MoaiConfig(**fields), seed)
    model.save_pretrained(place)
    tokenizer.save(place)
    return place


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    save(tokenizer, place / "a")
    save(tokenizer, place / "b", seed=1)
    save(tokenizer, place / "moe", "sparse")
    return place


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """A file of each of two languages, in folders of their names."""
    found = []
    for language, sentence in (
        ("ko", "이자는 {}번 붙어요. 예금과 적금."),
        ("en", "Interest is paid {} times. The lazy dog."),
    ):
        file = tmp_path / language / "text.jsonl"
        file.parent.mkdir()
        lines = [json.dumps({"text": sentence.format(i) * (1 + i % 3)}, ensure_ascii=False) for i in range(6)]
        file.write_text("\n".join(lines), encoding="utf-8")
        found.append(file)
    return found


def test_from_perplexity_to_a_card(moai: Moai, fails: Moai, models: Path, texts: list[Path], tmp_path: Path) -> None:
    out = {name: tmp_path / f"{name}.json" for name in "ab"}
    for name, file in out.items():
        shown = moai(
            "eval", "perplexity", models / name, *texts, "--language", "folder", "--stride", 64, "--json", file
        )
        rows = [line.split()[0] for line in shown.splitlines()]
        assert rows[1:6] == [str(texts[0]), str(texts[1]), "language", "language", "all"]
    found = read_results(out["a"])
    assert len(found.items) == 12 and {item.labels["language"] for item in found.items} == {"ko", "en"}
    shown = moai("eval", "compare", out["a"], out["b"], "--resamples", 500, "--json", tmp_path / "c.json")
    assert "bits_per_byte" in shown and "language ko" in shown and "fewer than 20 documents" in shown
    again = moai("eval", "compare", models / "a", models / "b", *texts, "--stride", 64, "--resamples", 500)
    row = next(line for line in shown.splitlines() if line.startswith("all"))
    assert row.split() in [line.split() for line in again.splitlines()]
    compared = read_results(tmp_path / "c.json")
    assert compared.kind == "compare" and len(compared.models) == 2
    card = ("card", models / "a", "--results", out["a"], "--license", "mit", "--languages", "ko,en")
    assert "license: mit" in moai(*card, "--out", "-") and not (models / "a" / "README.md").exists()
    readme = tmp_path / "README.md"
    assert f"written to {readme}" in moai(*card, "--out", readme)
    assert "is there already: --overwrite replaces it" in fails(*card, "--out", readme)
    assert "was measured on other weights" in fails("card", models / "b", "--results", out["a"], "--out", "-")
    assert "compares two models" in fails("card", models / "a", "--results", tmp_path / "c.json", "--out", "-")


def test_experts_and_long(moai: Moai, fails: Moai, models: Path, texts: list[Path], tmp_path: Path) -> None:
    page, file = tmp_path / "experts.html", tmp_path / "experts.json"
    shown = moai("eval", "experts", models / "moe", *texts, "--html", page, "--json", file)
    assert "12 documents" in shown and "what an expert tells of the token class" in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert read_results(file).details["experts"] == 4
    assert "no mixture of experts" in fails("eval", "experts", models / "a", *texts)
    file = tmp_path / "long.json"
    shown = moai("eval", "long", models / "a", *texts, "--context", 200, "--rope", "yarn", "--lengths", "90,200",
                 "--trials", 1, "--depths", "0,1", "--languages", "en", "--rows", 1, "--buckets", 4, "--json", file,
                 "--html", tmp_path / "long.html")  # fmt: skip
    assert "en, 200 tokens" in shown and "made of documents one after the other" in shown
    found = read_results(file)
    assert len(found.details["by_position"]) == 4 and found.settings["rope"] == "yarn"
    assert "is more than the context, 128: --context 300" in fails("eval", "long", models / "a", "--lengths", 300)
    assert "each from 0, the beginning, to 1" in fails("eval", "long", models / "a", "--depths", "2")
    short = (
        "eval",
        "long",
        models / "a",
        texts[1],
        "--context",
        4096,
        "--lengths",
        90,
        "--trials",
        1,
        "--languages",
        "en",
    )
    assert "fewer than 4,096 tokens" in fails(*short)


@pytest.mark.filterwarnings("ignore")
def test_tasks(moai: Moai, fails: Moai, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    passages = [{"context": f"The dog is paid {i} times the", "continuation": "interest"} for i in range(4)]
    text = "".join(json.dumps(passage) + "\n" for passage in passages)
    (tmp_path / "lambada_mine.jsonl").write_text(text, encoding="utf-8")
    file = tmp_path / "r.json"
    command = ("eval", "tasks", models / "a", "--tasks", "lambada", "--data", tmp_path, "--limit", 3, "--json", file)
    shown = moai(*command)
    assert [line.split()[:3] for line in shown.splitlines()[1:3]] == [
        ["lambada", "0", "perplexity"],
        ["lambada", "0", "acc"],
    ]
    assert "kept from" not in shown and "1 of 1 tasks" in moai(*command)
    found = read_results(file)
    assert found.versions["lm_eval"] and found.settings["limit"] == 3 and len(found.items) == 3
    assert "no hellaswag*.txt in" in fails("eval", "tasks", models / "a", "--tasks", "hellaswag", "--data", tmp_path)
    assert "no such folder" in fails("eval", "tasks", models / "a", "--tasks", "lambada", "--data", tmp_path / "x")
    assert "--limit 0 is too small" in fails(*command, "--limit", 0)


def test_the_schema(moai: Moai) -> None:
    assert json.loads(moai("eval", "schema"))["$id"] == "moai-eval/1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "compare", "a.json", "b"], "two JSON files, or two models"),
        (["eval", "compare", "a.json", "b.json", "text.txt"], "need no sources"),
        (["eval", "compare", "a", "b"], "give the sources to compare a and b on"),
        (["eval", "compare", "a.json", "b.json"], "a.json: No such file"),
        (["eval", "compare", "a.json", "b.json", "--resamples", "9"], "fewer than 100"),
        (["eval", "tasks", "nowhere", "--tasks", "hellaswga"], "did you mean 'hellaswag'"),
        (["card", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_mistakes(fails: Moai, arguments: list[str], message: str) -> None:
    if "tasks" in arguments:
        pytest.importorskip("lm_eval")
    assert message in fails(*arguments)
