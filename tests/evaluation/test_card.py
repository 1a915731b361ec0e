"""Model cards: what is in them is in the files, and the Hub's own reader reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moai_llm.evaluation.card import About, card, check, read_facts, require_of
from moai_llm.evaluation.corpus import Corpus
from moai_llm.evaluation.perplexity import measure
from moai_llm.evaluation.results import Results, Score, facts_of, json_schema, read_results
from moai_llm.inference import TextModel
from moai_llm.runtime import MoaiError

RECIPE = """
description: A model of interest
data: {train: /somewhere/store, mixture: [], seq_len: 64}
optim: {name: adamw, lr: 0.003}
train: {init_from: null, steps: 6, batch_tokens: 256, seed: 0}
"""


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run of which two checkpoints' worth of numbers are there, and the first checkpoint."""
    place = tmp_path / "interest" / "checkpoints" / "step-00000003"
    shutil.copytree(folder, place)
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [{"step": 3, "tokens": 768, "loss": 5.5}, {"step": 3, "eval_loss": 5.25, "bits_per_byte": 3.5},
            {"step": 6, "tokens": 1536, "loss": 4.5}]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "interest" / "metrics.jsonl").write_text(text, encoding="utf-8")
    return place


def perplexity(text_model: TextModel) -> Results:
    corpus = Corpus()
    for document in measure(text_model, [("Interest is paid.", "a"), ("이자가 붙어요. 이자가 붙어요.", "b")]):
        corpus.add(document, f"/home/me/{document.given}.txt", "ko" if document.given == "b" else "en")
    return corpus.results(text_model, {"window": 64})


def test_what_is_in_it(run: Path, loaded: TextModel) -> None:
    found = perplexity(loaded)
    tasks = Results("tasks", [facts_of(loaded)], {"limit": 4}, [
        Score("mmlu_anatomy", "acc", 0.25, 4, 0.1, num_fewshot=5, group="mmlu"),
        Score("mmlu", "acc", 0.25, 4, 0.1, num_fewshot=5, higher_is_better=True),
        Score("lambada", "perplexity", None, 4),
    ], versions={"lm_eval": "0.4.13"})  # fmt: skip
    about = About(license="mit", languages=["ko", "en"], tags=["finance"], base_model="org/base", datasets=["org/text"])
    facts = read_facts(run)
    require_of(facts, [("a", found), ("b", tasks)])
    text = card(facts, about, [found, tasks])
    check(text)
    again = ModelCard(text)
    data = again.data.to_dict()
    assert data["license"] == "mit" and data["language"] == ["ko", "en"] and data["tags"] == ["moai", "finance"]
    assert data["base_model"] == "org/base" and data["datasets"] == ["org/text"]
    bits = {score.task: score.value for score in found.scores if score.metric == "bits_per_byte"}
    read = {(one.dataset_type, one.metric_type): one for one in again.data.eval_results}
    assert set(read) == {("a.txt", "bits_per_byte"), ("b.txt", "bits_per_byte"), ("mmlu", "acc")}
    assert read["a.txt", "bits_per_byte"].metric_value == bits["/home/me/a.txt"]
    assert read["mmlu", "acc"].dataset_args == {"num_few_shot": 5}
    for line in (
        f"| parameters | {sum(p.numel() for p in loaded.model.parameters()):,} |", "| token mixers | 2 attention |",
        "| steps | 3 |", "| tokens seen | 768 |", "| last loss in training | 5.5000 |",
        "| bits per byte there | 3.5000 |",
        "| data | `store` |", "| learning rate | 0.003 |", "A model of interest", "# interest",
        "| mmlu, 5 examples | acc | 0.2500 | 0.1000 | 4 |", "lm-eval 0.4.13 (limit 4)",
    ):  # fmt: skip
        assert line in text, line
    assert "/home/me" not in text and "/somewhere" not in text and str(run) not in text
    assert "4.5000" not in text  # of a later step than this checkpoint


def test_what_no_file_says_is_not_in_it(folder: Path) -> None:
    facts = read_facts(folder)
    text = card(facts, About())
    check(text)
    data = ModelCard(text).data.to_dict()
    assert not {"license", "language", "base_model", "datasets", "model-index"} & set(data)
    assert "Training" not in text and "Evaluation" not in text and "| steps" not in text


def test_results_of_other_weights_are_refused(folder: Path, loaded: TextModel) -> None:
    found = perplexity(loaded)
    require_of(read_facts(folder), [("a.json", found)])
    found.models[0].weights = "0" * 64
    with pytest.raises(MoaiError, match="a.json was measured on other weights"):
        require_of(read_facts(folder), [("a.json", found)])


def test_control_a_card_that_the_hub_does_not_read() -> None:
    with pytest.raises(MoaiError, match="not what the Hub reads"):
        check("---\nlicense: [\n---\n")
    result = "  - task: {type: t}\n    metrics:\n    - {type: acc, value: 1}\n"
    with pytest.raises(MoaiError, match="the Hub reads"):
        check(f"---\nmodel-index:\n- name: m\n  results:\n{result}---\n")


def test_results_are_read_as_they_were_written(loaded: TextModel, tmp_path: Path) -> None:
    found = perplexity(loaded)
    found.scores[0].value = None
    found.save(tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == found
    schema = json_schema()
    held = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert set(held) <= set(schema["properties"]) and set(schema["required"]) <= set(held)
    assert found.models[0].tokenizer == loaded.tokenizer.fingerprint and len(found.models[0].weights) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "guess"}, "kind"), ({"extra": 1}, "extra"), ({"scores": [{"task": "t"}]}, "scores.0.metric")],
)
def test_what_is_no_result_is_refused(
    change: dict[str, object], message: str, loaded: TextModel, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    perplexity(loaded).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(MoaiError, match=f"holds no results of `moai eval`: {message}"):
        read_results(file)
    with pytest.raises(MoaiError, match="No such file"):
        read_results(tmp_path / "nowhere.json")
