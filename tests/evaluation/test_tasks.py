"""Tasks from local files, and runs of them that go on where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moai_llm.evaluation import run_tasks as of_runs
from moai_llm.evaluation.results import read_results
from moai_llm.evaluation.run_tasks import TaskOptions, run_tasks
from moai_llm.evaluation.task_files import (
    BUILT_IN,
    built_in,
    load_tasks,
    read_blocks,
    read_truthfulqa,
    share_of_right_answers,
)
from moai_llm.inference import TextModel
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

QUIZ = """
task: quiz
file: quiz.jsonl
by: subject
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    documents = [
        {"subject": "sums" if i % 2 else "interest", "question": f"What is {i} and 1?", "choices": [str(i + 1), "이자"],
         "answer": i % 2}
        for i in range(8)
    ]  # fmt: skip
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    (tmp_path / "quiz.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "quiz.yaml").write_text(QUIZ, encoding="utf-8")
    return tmp_path / "quiz.yaml"


def test_a_task_for_each_value_of_a_column(quiz: Path, loaded: TextModel) -> None:
    tasks = list(load_tasks([str(quiz)]))
    assert [(task.name, task.group, len(task.task.eval_docs)) for task in tasks] == [
        ("quiz_interest", "quiz", 4), ("quiz_sums", "quiz", 4)
    ]  # fmt: skip
    results = run_tasks(loaded, tasks)
    by_name = {score.task: score for score in results.scores}
    assert list(by_name) == ["quiz_interest", "quiz_sums", "quiz"]
    whole = by_name["quiz"]
    parts = [by_name["quiz_interest"], by_name["quiz_sums"]]
    assert whole.documents == 8 and whole.value == pytest.approx(sum(p.value or 0 for p in parts) / 2)
    assert whole.num_fewshot == 1 and whole.higher_is_better and all(part.group == "quiz" for part in parts)
    assert len(results.items) == 8 and {item.labels["group"] for item in results.items} == {"quiz"}


def test_a_run_goes_on_where_it_was(
    quiz: Path, loaded: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "out.json", dict[str, bool]()

    def run(**options: Any) -> Any:
        told.clear()
        return run_tasks(loaded, load_tasks([str(quiz)]), TaskOptions(**options), out=out, finished=told.__setitem__)

    real, calls = of_runs._run, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments[1].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(of_runs, "_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert [score.task for score in read_results(out).scores] == ["quiz_interest", "quiz"]
    whole = run()
    assert told == {"quiz_interest": True, "quiz_sums": False}
    again = run()
    assert told == {"quiz_interest": True, "quiz_sums": True} and again.scores == whole.scores
    assert again.items == whole.items == read_results(out).items
    with pytest.raises(MoaiError, match="holds results of other options: give another file, or --fresh"):
        run(num_fewshot=2)
    assert read_results(out) == again
    loaded.model.double()
    with pytest.raises(MoaiError, match="holds results of another model"):
        run()
    loaded.model.float()
    lines = (quiz.parent / "quiz.jsonl").read_text(encoding="utf-8")
    (quiz.parent / "quiz.jsonl").write_text(lines.replace("What is", "How much is"), encoding="utf-8")
    changed = run()
    assert not any(told.values()) and len(changed.scores) == 3 and len(changed.items) == 8  # control: other documents
    (other := quiz.with_name("other.yaml")).write_text(QUIZ.replace("task: quiz", "task: other"), encoding="utf-8")
    both = run_tasks(loaded, load_tasks([str(other)]), TaskOptions(), out=out)
    assert [score.task for score in both.scores if score.group is None] == ["quiz", "other"]  # nothing is lost


def test_examples_differ_by_seed_and_never_hold_the_question(quiz: Path, loaded: TextModel) -> None:
    prompts = {}
    for seed in (1, 1, 2):
        (task, _) = load_tasks([str(quiz)])
        task.task.set_config("num_fewshot", 2)
        task.task.set_fewshot_seed(seed)
        made = [task.task.fewshot_context(document, 2) for document in task.task.eval_docs]
        for document, prompt in zip(task.task.eval_docs, made):
            assert prompt.count(document["question"]) == 1
        assert prompts.setdefault(seed, made) == made
    assert prompts[1] != prompts[2]


def test_a_chat_model_is_asked_in_its_form(quiz: Path, loaded: TextModel) -> None:
    plain, chat = (
        run_tasks(loaded, load_tasks([str(quiz)]), TaskOptions(apply_chat_template=chat)) for chat in (False, True)
    )
    assert [item.id for item in plain.items] == [item.id for item in chat.items]
    assert chat.settings["apply_chat_template"] and plain.settings != chat.settings


def test_what_comes_with_the_package() -> None:
    """Every task loads from the real files, with the number of examples that the older documents name."""
    folder = shared_data("eval/mmlu.jsonl").parent
    names = ["mmlu_anatomy", *(name for name in built_in() if name not in ("mmlu", "truthfulqa"))]
    tasks = {task.name: task.task for task in load_tasks(names, folder)}
    shots = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    assert shots == {
        "mmlu_anatomy": 5, "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0, "gsm8k": 8,
        "lambada": 0,
    }  # fmt: skip
    assert len(tasks["mmlu_anatomy"].eval_docs) == 135 and len(tasks["gsm8k"].eval_docs) == 1319
    first = tasks["gsm8k"].fewshot_context(tasks["gsm8k"].eval_docs[0], 8)
    assert first.count("The answer is") == 8 and first.endswith("A:")
    prompt = tasks["mmlu_anatomy"].fewshot_context(tasks["mmlu_anatomy"].eval_docs[0], 5)
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert prompt.count("Answer:") == 6
    answers = tasks["truthfulqa_mc1"].doc_to_choice(tasks["truthfulqa_mc1"].eval_docs[0])
    assert answers[0].startswith("Veins appear blue because blue light") and len(answers) == 5
    assert {path.stem for path in BUILT_IN.glob("*.yaml")} | {"truthfulqa"} == set(built_in())


def test_readers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A man\n1\nw\nx\u2028y \nz\nv\n", encoding="utf-8")
    assert list(read_blocks(tmp_path / "a.txt")) == [
        {"query": "A man", "gold": 1, "choices": ["w", "x\u2028y", "z", "v"]}
    ]
    head = "Question,Best Answer,Correct Answers,Incorrect Answers\n"
    (tmp_path / "t.csv").write_text(f'\ufeff{head}Why?,"a, b","c; a, b; c",d; ;e\n', encoding="utf-8")
    (document,) = read_truthfulqa(tmp_path / "t.csv")
    assert (
        document["mc1"] == ["a, b", "d", "e"] and document["mc2"] == ["a, b", "c", "d", "e"] and document["right"] == 2
    )
    shares = share_of_right_answers(document, [(-1.0, False), (-2.0, False), (-1.0, False), (-1000.0, False)])
    assert shares["acc"] == pytest.approx((1 + 2.718281828**-1) / (2 + 2.718281828**-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file: quiz.jsonl": "file: other.jsonl"}, "no other.jsonl in"),
        ({"by: subject": "by: subjct"}, "no column 'subjct', which quiz.yaml names .did you mean 'subject'"),
        ({"test_split: test": "test_split: tst"}, "no documents of the part 'tst'; the data has test"),
        ({"file: quiz.jsonl": "file: quiz.jsonl\nreader: linse"}, "did you mean 'lines'"),
        ({"output_type: multiple_choice": "output_type: choices"}, "Invalid output_type"),
        ({"num_fewshot: 1": "num_fewshots: 1"}, "num_fewshots"),
        ({"doc_to_target: answer": "process_results: magic\ndoc_to_target: answer"}, "not 'magic'"),
        ({"task: quiz": "- quiz"}, "is not YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_a_yaml_file(quiz: Path, change: dict[str, str], message: str) -> None:
    text = quiz.read_text(encoding="utf-8")
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    quiz.write_text(text, encoding="utf-8")
    with pytest.raises(MoaiError, match=f"(?i){message}"):
        list(load_tasks([str(quiz)]))


def test_mistakes(quiz: Path, tmp_path: Path, loaded: TextModel) -> None:
    with pytest.raises(MoaiError, match="no task 'hellaswga' .did you mean 'hellaswag'"):
        list(load_tasks(["hellaswga"]))
    with pytest.raises(MoaiError, match="give the folder it lies in with --data, or --hub"):
        list(load_tasks(["gsm8k"]))
    (quiz.parent / "quiz.jsonl").write_text('{"question": "a"}\n{broken\n', encoding="utf-8")
    with pytest.raises(MoaiError, match="is not what the reader 'lines' reads: JSONDecodeError"):
        list(load_tasks([str(quiz)]))
    (tmp_path / "old.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MoaiError, match="holds no results of `moai eval`"):
        run_tasks(loaded, [], out=tmp_path / "old.json")


def test_a_file_in_lm_evals_words_alone(tmp_path: Path, loaded: TextModel) -> None:
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "Interest is paid."}\n{"text": "이자가 붙어요."}\n', encoding="utf-8"
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'texts.jsonl'}\n  cache_dir: {tmp_path / 'cache'}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n    aggregation: bits_per_byte\n    higher_is_better: false\n",
        encoding="utf-8",
    )
    results = run_tasks(loaded, load_tasks([str(tmp_path / "mine.yaml")]))
    (score,) = results.scores
    assert (score.task, score.metric, score.documents, score.stderr) == ("mine", "bits_per_byte", 2, None)
    assert score.value is not None and 0 < score.value < 20 and score.higher_is_better is False
