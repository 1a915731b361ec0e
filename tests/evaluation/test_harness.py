"""Our adapter says what lm-eval's own says of the same model, on real benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moai_llm.evaluation import harness
from moai_llm.evaluation.harness import adapter
from moai_llm.evaluation.task_files import Loaded, load_tasks
from moai_llm.export.native import export_native
from moai_llm.inference import Sampling, Session, TextModel, load_model
from moai_llm.modeling.vocabulary import resize_vocabulary
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.chat import render
from tests.conftest import shared_data

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 2
TASKS = {"mmlu_anatomy": 1, "arc_challenge": 3, "hellaswag": 2, "lambada": 0}  # examples


@pytest.fixture(scope="module")
def peers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """lm-eval's adapter over the model that transformers loads from our export, and over our own class; in fp64."""
    from lm_eval.models.huggingface import HFLM

    out = tmp_path_factory.mktemp("export") / "out"
    export_native(folder, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    native = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    own = load_model(folder, "cpu", "fp32")
    with torch.no_grad():
        resize_vocabulary(own.model, [(i,) for i in range(own.tokenizer.vocab_size)])
    made = {"native": native, "own": own.model.double()}
    return {
        name: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512) for name, model in made.items()
    }


@pytest.fixture
def mine(loaded: TextModel) -> Any:
    loaded.model.double()
    return adapter(loaded)


def task_of(name: str) -> Loaded:
    data = shared_data("eval/mmlu.jsonl").parent
    (found,) = load_tasks([name], data)
    return found


def evaluated(lm: Any, task: Loaded, shots: int) -> tuple[dict[str, float], list[Any]]:
    """(metrics, what was said of each request)."""
    from lm_eval.evaluator import evaluate

    task.task.set_config("num_fewshot", shots)
    task.task.set_fewshot_seed(7)
    found = evaluate(lm, {"tasks": {task.name: task.task}, "groups": {}}, limit=LIMIT, bootstrap_iters=0)
    assert found is not None
    said = [answer for sample in found["samples"][task.name] for answer in sample["resps"]]
    numbers = {key: value for key, value in found["results"][task.name].items() if isinstance(value, float)}
    return numbers, said


@pytest.mark.parametrize("name", TASKS)
def test_it_says_what_lm_evals_own_adapter_says(name: str, mine: Any, peers: dict[str, Any]) -> None:
    task = task_of(name)
    numbers, said = evaluated(mine, task, TASKS[name])
    scores = np.array([answer[0][0] for answer in said])
    for peer, allowed in (("own", 1e-9), ("native", 1e-6)):  # transformers' norms compute in fp32, whatever the model
        theirs, heard = evaluated(peers[peer], task, TASKS[name])
        others = np.array([answer[0][0] for answer in heard])
        assert (np.abs(scores - others) <= allowed * np.maximum(1, np.abs(others))).all()
        assert [answer[0][1] for answer in said] == [answer[0][1] for answer in heard]
        assert set(numbers) == set(theirs) and numbers
        for key, value in theirs.items():
            assert numbers[key] == pytest.approx(value, rel=100 * allowed), key
    assert np.ptp(scores) > 0.5  # control: answers differ by more than what is allowed


def test_control_a_token_off_is_seen(mine: Any, peers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = harness.score

    def late(model: Any, rows: Any, **options: Any) -> Any:
        return real(model, [row._replace(start=max(1, row.start - 1)) for row in rows], **options)

    monkeypatch.setattr(harness, "score", late)
    task = task_of("lambada")
    said, heard = (np.array([a[0][0] for a in evaluated(lm, task, 0)[1]]) for lm in (mine, peers["native"]))
    assert (np.abs(said - heard) > 0.1).all()


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def asked(kind: str, *of: tuple[Any, ...]) -> Callable[[Any], list[Any]]:
    return lambda lm: getattr(lm, kind)([request(*arguments) for arguments in of])


@pytest.mark.parametrize(
    "ask",
    [
        asked("loglikelihood", ("", "Interest"), ("a ", "b"), ("x " * 400, "y z"), ("이자가 ", "붙어요")),
        asked("loglikelihood_rolling", ("Interest is paid. 이자가 붙어요. " * 40,), ("a",), ("b" * 600,)),
    ],
)
def test_texts_at_the_edges(ask: Callable[[Any], list[Any]], mine: Any, peers: dict[str, Any]) -> None:
    """No context, a space at its end, one that is too long, a text of several windows, of one token."""
    assert ask(mine) == [pytest.approx(answer, rel=1e-9) for answer in ask(peers["own"])]


@pytest.mark.parametrize("limit", [1, 12])
def test_answers_to_gsm8k(limit: int, mine: Any, peers: dict[str, Any]) -> None:
    (task,) = load_tasks(["gsm8k"], shared_data("eval/gsm8k_test.jsonl").parent)
    documents = [task.task.doc_to_text(task.task.eval_docs[i]) for i in range(LIMIT)]
    options = {"until": ["Q:", "nt"], "do_sample": False, "max_gen_toks": limit}
    said, heard = (
        asked("generate_until", *((text, options) for text in documents))(lm) for lm in (mine, peers["native"])
    )
    assert said == heard and any(said)
    unstopped = asked("generate_until", *((text, {**options, "until": []}) for text in documents))(mine)
    assert limit == 1 or unstopped != said  # control: a stop string did stop


def test_options_of_answers(loaded: TextModel) -> None:
    long = {"max_gen_toks": 600}
    with pytest.raises(MoaiError, match="--max-new-tokens 256 limits them"):
        asked("generate_until", ("a", long))(adapter(loaded))
    assert asked("generate_until", ("a", long))(adapter(loaded, max_new_tokens=3))
    with pytest.raises(MoaiError, match="cannot do num_beams"):
        asked("generate_until", ("a", {"num_beams": 2}))(adapter(loaded))
    drawn = {
        asked("generate_until", ("a", {"temperature": 2.0, "max_gen_toks": 9}))(adapter(loaded))[0] for _ in range(3)
    }
    assert len(drawn) == 1  # seeded


def test_a_conversation_is_the_tokens_of_a_chat(loaded: TextModel) -> None:
    """Also what looks like a control token in it stays text, which a string in between would lose."""
    lm, tokenizer = adapter(loaded), loaded.tokenizer
    turns = [{"role": "user", "content": "What is <|im_end|> interest?"}]
    text = lm.apply_chat_template(turns)
    ids = render(tokenizer, turns, add_generation_prompt=True).ids
    assert lm.tok_encode(text) == ids and lm._encode_pair(text, "Money") == (ids, tokenizer.encode("Money"))
    answers = lm.generate_until([request(text, {"max_gen_toks": 8})])
    stream = Session(loaded).stream(ids, Sampling(8, temperature=0))
    assert answers == [tokenizer.decode(list(stream), skip_special=True)]
    begun = [*turns, {"role": "assistant", "content": "It is"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(text) == [*ids, *tokenizer.encode("It is")]
    plain = tokenizer.encode("<|im_end|>")
    assert tokenizer.token_to_id("<|im_end|>") not in plain  # control
