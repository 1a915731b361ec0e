"""Conversations on the command line: options of `moai data prepare`, `moai data schema`, a pair as it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data.preference import Pairs
from moai_llm.data.shards import Store
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render

Moai = Callable[..., str]


def flat(output: str) -> str:
    return " ".join(output.split())


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Tokenizer) -> tuple[object, ...]:
    saved = tokenizer.save(tmp_path / "tok")
    return ("data", "prepare", "--tokenizer", saved, "--out", tmp_path / "out", "--overwrite")


def talk(turns: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": f"{role} {i}"} for i in range(turns) for role in ("user", "assistant")
        ]
    }  # fmt: skip


def test_what_is_learned_and_what_is_left(moai: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", talk(1), talk(3))
    moai(*prepare, file, "--chat")
    store = Store(tmp_path / "out")
    tokenizer = store.tokenizer()
    everything = store.learn(1).sum()  # type: ignore[union-attr]
    moai(*prepare, file, "--chat", "--learn", "last")
    last = Store(tmp_path / "out")
    assert 2 * last.learn(1).sum() < everything and last.document(1).tolist() == store.document(1).tolist()  # type: ignore[union-attr]
    one = len(render(tokenizer, talk(1)["messages"]).ids)
    output = flat(moai(*prepare, file, "--chat", "--max-length", one))
    assert f"2 1 1 longer than {one} tokens 0" in output
    output = flat(moai(*prepare, file, "--chat", "--max-length", one, "--truncate", "turns"))
    assert "2 2 0 0" in output and "1 of those kept were longer than --max-length and lost a part" in output
    assert tokenizer.decode(Store(tmp_path / "out").document(1).tolist()).count("user 2") == 1
    moai(*prepare, file, "--chat", "--max-length", one, "--truncate", "end")
    assert Store(tmp_path / "out").lengths().tolist() == [one, one]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learn", "last"), "--learn is for conversations: it does nothing without --chat or --preference"),
        (("--max-length", "9"), "--max-length is for conversations"),
        (("--chat", "--truncate", "end"), "--truncate does nothing without --max-length"),
        (("--chat", "--max-length", "1"), "a conversation needs two tokens at least"),
        (("--chat", "--fim", "0.5"), "not for conversations"),
        (("--preference", "--code-chunk", "9"), "not for conversations"),
        (("--preference",), "no column 'chosen' and 'rejected'; it has messages. Name them, as in --map chosen=better"),
        (("--preference", "--map", "question=x"), "a.jsonl:1: no column 'x'"),
        (("--preference", "--map", "answer=x"), "no column 'answer' is known here"),
        (("--chat", "--max-length", "2"), "none of the 2 conversations is left: 2 longer than 2 tokens"),
    ],
)
def test_options_that_make_no_sense(
    fails: Moai, prepare: tuple[object, ...], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    file = write(tmp_path / "a.jsonl", talk(1), talk(3))
    assert message in flat(fails(*prepare, file, *options))
    assert not (tmp_path / "out").exists()


def test_only_one_kind(fails: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    assert "not allowed with argument" in fails(*prepare, tmp_path, "--chat", "--preference", code=2)


def test_map_names_the_columns_of_conversations(
    moai: Moai, fails: Moai, prepare: tuple[object, ...], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", {"ask": "q", "reply": "a", "prompt": "p", "completion": "c"})
    named = ("--map", "question=ask", "--map", "answer=reply")
    moai(*prepare, file, "--chat", *named)
    store = Store(tmp_path / "out")
    assert "q" in store.tokenizer().decode(store.document(0).tolist())
    both = write(tmp_path / "b.jsonl", {"question": "q", "answer": "a", "prompt": "p", "completion": "c"})
    message = flat(fails(*prepare, both, "--chat", "--skip-bad"))
    assert "Say which: --map question=question --map answer=answer for the first" in message
    moai(*prepare, both, "--chat", "--map", "prompt=prompt", "--map", "completion=completion")
    store = Store(tmp_path / "out")
    learned = store.document(0)[store.learn(0).astype(bool)].tolist()  # type: ignore[union-attr]
    assert store.tokenizer().decode(learned).startswith("c")


def test_preference_pairs(moai: Moai, fails: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    file = write(tmp_path / "a.jsonl", *rows, {**rows[0], "rejected": rows[0]["chosen"]})
    output = flat(moai(*prepare, file, "--preference", "--valid", tmp_path / "valid", "--valid-share", 0.2))
    assert "3 2 1 chosen and rejected are the same 0" in output and "8 8 0 0" in output
    assert f"moai train RECIPE data.train={tmp_path / 'out'}" in output and "loss.type=dpo" in output
    assert len(Pairs(tmp_path / "out")) + len(Pairs(tmp_path / "valid")) == 10
    info = flat(moai("data", "info", tmp_path / "out"))
    assert "kind preference" in info and "pairs cut 0" in info and "damage none" in info
    shown = moai("data", "show", tmp_path / "out", 0)
    assert shown.index("question 1") < shown.index("chosen") < shown.index("good 1") < shown.index("bad 1")
    assert shown.count("question 1") == 1  # the prompt is shown once
    assert "there are" in fails("data", "show", tmp_path / "out", 99)
    message = fails("train", "moai-3b-tiny", f"data.train={tmp_path / 'out'}", f"train.out={tmp_path / 'run'}")
    assert "holds preference pairs: to train on both answers" in flat(message)
    assert "--preference instead of --chat" in flat(fails(*prepare, file, "--chat"))


def test_schema(moai: Moai, fails: Moai, tmp_path: Path) -> None:
    rows = [{"질문": f"q{i}", "답변": f"a{i}"} for i in (2, 3)]
    write(tmp_path / "a.jsonl", {"질문": "복리가 뭐예요?", "답변": "이자의 이자예요.", "출처": "x"}, *rows)
    output = flat(moai("data", "schema", tmp_path / "a.jsonl"))
    assert "질문-답변 (질문 + 답변; 3 of the 3 records looked at); prepare them with --chat" in output
    assert "user: 복리가 뭐예요? assistant: 이자의 이자예요." in output and "not read: 출처" in output
    assert "a2" in output and "a3" not in output
    calls = {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "[red]r"}, {"from": "gpt", "value": "a\n" * 30, "weight": 0},
    ]}  # fmt: skip
    output = flat(moai("data", "schema", write(tmp_path / "b.jsonl", calls)))
    assert "sharegpt (conversations; 1 of the 1" in output and "calls f({'x': 1})" in output
    assert "tool: [red]r" in output and "assistant (not learned): a" in output and "... 19 more lines" in output
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    output = flat(moai("data", "schema", write(tmp_path / "c.jsonl", pair)))
    assert "preference pairs (1 of the 1 records looked at); prepare them with --preference" in output
    assert output.index("good") < output.index("bad")
    output = flat(moai("data", "schema", write(tmp_path / "d.jsonl", {**talk(1), "kto_tag": True})))
    assert "KTO (1 of the 1 records" in output and "assistant 0" not in output
    output = flat(moai("data", "schema", write(tmp_path / "e.jsonl", {"text": "t"}, {"text": "t"})))
    assert "no conversations: it has text. Known shapes" in output
    output = flat(moai("data", "schema", write(tmp_path / "f.jsonl", {"messages": []}, talk(1))))
    assert "messages (messages; 1 of the 2" in output and "f.jsonl:1: 'messages' is empty" in output
    both = write(tmp_path / "g.jsonl", {"question": "q", "answer": "a", "prompt": "p", "completion": "c"})
    assert "--map question=question --map answer=answer" in flat(fails("data", "schema", both))
    assert "question-answer" in moai("data", "schema", both, "--map", "question=question")
    assert "hold no records" in fails("data", "schema", write(tmp_path / "h.jsonl"))
