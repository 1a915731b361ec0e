"""Preference pairs of every shape, and how they lie in a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data.loader import Loader
from moai_llm.data.preference import Pairs
from moai_llm.data.prepare import prepare, prepare_chats
from moai_llm.data.sft import ChatOptions, Pair, read_pairs
from moai_llm.data.sft.pairs import read_pair
from moai_llm.data.shards import Store
from moai_llm.data.sources import Record, read_records
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.chat import render
from tests.conftest import shared_data
from tests.tokenizer.conftest import tokenizer_for

USER, GOOD, BAD = ({"role": role, "content": c} for role, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HUMAN, BETTER, WORSE = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}
SHAPES: dict[str, dict[str, Any]] = {
    "prompt and answers": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "question and answers": {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
    "instruction and answers": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "Korean": {"질문": "q", "chosen": "a", "rejected": "b"},
    "capitals": {"Prompt": "q", "Chosen": "a", "Rejected": "b"},
    "messages and answers": {"messages": [USER], "chosen": "a", "rejected": "b"},
    "messages and messages": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "prompt of messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt and tails": {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole, and the rest besides": {"prompt": "q", "messages": [USER, GOOD], "chosen": [USER, GOOD],
                                    "rejected": [USER, BAD], "score_chosen": 8.5},
    "ShareGPT": {"conversations": [HUMAN], "chosen": BETTER, "rejected": WORSE},
    "ShareGPT as text": {"conversations": json.dumps([HUMAN]), "chosen": "a", "rejected": "b"},
    "transcripts": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    assert list(read_pairs([Record(SHAPES[name], "here")])) == [(Pair([USER, GOOD], [USER, BAD]), "here")]  # type: ignore[arg-type]


def test_what_is_shared_is_not_learned() -> None:
    row = {"system": "s", "conversations": [HUMAN, BETTER, HUMAN], "chosen": BETTER, "rejected": WORSE, "tools": "[]"}
    pair = read_pair(row)
    shared = [{"role": "system", "content": "s"}, USER, {**GOOD, "train": False}, USER]
    assert pair == ([*shared, GOOD], [*shared, BAD]) and pair.chosen.tools is None
    assert (
        read_pair({"question": "q", "prompt": "other", "chosen": "a", "rejected": "b"}, ("question",)).chosen[0] == USER
    )
    pair = read_pair({"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"})
    assert pair.chosen[0]["content"] == "q\nmore"


def test_an_answer_that_only_goes_on_longer(tmp_path: Path) -> None:
    """One conversation is the beginning of the other: both are learned whole, and can be cut."""
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "again"}]
    pair, tokenizer = read_pair({"chosen": [USER, GOOD, *more], "rejected": [USER, GOOD]}), tokenizer_for("chatml")
    assert not any("train" in message for side in pair for message in side)
    limit = len(render(tokenizer, pair.chosen).ids) - 1
    for truncate, kept in (("turns", 0), ("drop", 0), ("end", 1)):
        options = ChatOptions("all", limit, truncate)  # type: ignore[arg-type]
        chats = iter([(read_pair(SHAPES["Korean"]), "0"), (pair, "1")])
        prepare_chats(chats, tokenizer, tmp_path / "s", [], kind="preference", options=options, overwrite=True)
        assert len(Pairs(tmp_path / "s")) == 1 + kept


def pairs_file(file: Path, count: int) -> Path:
    lines = [
        {"prompt": f"질문 {i}", "chosen": f"good {i} " * (1 + i % 3), "rejected": f"bad {i}"} for i in range(count)
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma"])
def test_the_store(tmp_path: Path, template: str) -> None:
    tokenizer, file = tokenizer_for(template), pairs_file(tmp_path / "a.jsonl", 12)
    report = prepare([file], tokenizer, tmp_path / "store", kind="preference")
    pairs = Pairs(tmp_path / "store")
    assert report.read == len(pairs) == 12 and report.manifest.documents == 24
    for i, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        row, pair = json.loads(line), pairs[i]
        for ids, learn, text in (
            (pair.chosen, pair.chosen_learn, row["chosen"]), (pair.rejected, pair.rejected_learn, row["rejected"])
        ):  # fmt: skip
            rendered = render(
                tokenizer, [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            )
            assert ids.tolist() == rendered.ids and learn.tolist() == rendered.learn
            assert not learn[: pair.prompt].any() and tokenizer.decode(ids[pair.prompt :].tolist()).startswith(text[:4])
        assert (pair.chosen[: pair.prompt] == pair.rejected[: pair.prompt]).all() and pair.prompt > 5
    with pytest.raises(IndexError):
        pairs[12]


def test_nothing_else_trains_on_it(tmp_path: Path) -> None:
    tokenizer, file = tokenizer_for("chatml"), pairs_file(tmp_path / "a.jsonl", 3)
    prepare([file], tokenizer, tmp_path / "pairs", kind="preference")
    with pytest.raises(MoaiError, match="holds preference pairs: to train on both answers as if they were text"):
        Loader(Store(tmp_path / "pairs"), 64)
    chats = [([USER, GOOD], "here")]
    prepare_chats(iter(chats), tokenizer, tmp_path / "chats", [])
    with pytest.raises(MoaiError, match="holds chat, not preference pairs"):
        Pairs(tmp_path / "chats")


def test_a_held_out_pair_stays_together(tmp_path: Path) -> None:
    tokenizer, file = tokenizer_for("chatml"), pairs_file(tmp_path / "a.jsonl", 25)
    for part in ("train", "valid"):
        prepare([file], tokenizer, tmp_path / part, kind="preference", part=part, valid_share=0.2)
    train, valid = Pairs(tmp_path / "train"), Pairs(tmp_path / "valid")
    assert (len(train), len(valid)) == (20, 5)
    numbers = []
    for pairs in (train, valid):
        for i in range(len(pairs)):
            good, bad = (
                tokenizer.decode(ids[pairs[i].prompt :].tolist()) for ids in (pairs[i].chosen, pairs[i].rejected)
            )
            assert (
                good.split()[0] == "good"
                and bad.split()[0] == "bad"
                and good.split()[1] == bad.split("<")[0].split()[1]
            )
            numbers.append(int(good.split()[1]))
    assert sorted(numbers) == list(range(25))


def test_long_pairs_are_cut_alike(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    prompt = [HUMAN, {"from": "gpt", "value": "first answer"}] * 3 + [{"from": "human", "value": "last"}]
    row = {"system": "s", "conversations": prompt, "chosen": BETTER, "rejected": {"from": "gpt", "value": "bad " * 9}}
    pair = read_pair(row)
    short = read_pair({**row, "conversations": prompt[-1:]})
    limit = len(render(tokenizer, short.rejected).ids)

    def made(truncate: str, limit: int) -> Any:
        options = ChatOptions("all", limit, truncate)  # type: ignore[arg-type]
        report = prepare_chats(
            iter([(pair, "1"), (short, "2")]), tokenizer, tmp_path / "store", [], kind="preference", options=options,
            overwrite=True,
        )  # fmt: skip
        return Pairs(tmp_path / "store"), report

    pairs, report = made("turns", limit)
    assert report.cut == 1 and not report.dropped
    for i in (0, 1):  # the longer answer says how many turns go, from both
        assert pairs[i].chosen.tolist() == render(tokenizer, short.chosen).ids
        assert pairs[i].rejected.tolist() == render(tokenizer, short.rejected).ids
    pairs, report = made("drop", limit)
    assert dict(report.dropped) == {f"longer than {limit} tokens": 1} and len(pairs) == 1
    pairs, report = made("end", limit - 3)
    assert dict(report.dropped) == {f"nothing to learn within {limit - 3} tokens": 1} and report.cut == 1
    assert len(pairs[0].rejected) == limit - 3 and pairs[0].rejected_learn.any()


def test_a_real_set(tmp_path: Path) -> None:
    file = shared_data("sft/dpo_en_demo.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    tokenizer = tokenizer_for("chatml")
    report = prepare([file], tokenizer, tmp_path / "store", kind="preference")
    pairs = Pairs(tmp_path / "store")
    assert report.read == len(pairs) == len(rows) == 300 and not report.dropped
    for i in range(0, 300, 7):
        pair = pairs[i]
        said = [
            tokenizer.decode(ids[learn].tolist())
            for ids, learn in ((pair.chosen, pair.chosen_learn), (pair.rejected, pair.rejected_learn))
        ]
        assert said == [rows[i][side]["value"] + "<|im_end|>" for side in ("chosen", "rejected")]
    assert len(list(read_pairs(read_records([file])))) == 300
