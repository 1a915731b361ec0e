"""What is learned of a conversation, what is left of a long one, and that both survive packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moai_llm.data.loader import Batch, Loader
from moai_llm.data.prepare import prepare_chats
from moai_llm.data.sft import ChatOptions, Dropped, Encoded, Messages, encode_conversation
from moai_llm.data.shards import Store
from moai_llm.data.writer import StoreWriter
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render, set_template
from tests.tokenizer.conftest import tokenizer_for

SYSTEM = {"role": "system", "content": "Be brief."}


def talk(turns: int, words: int = 3, system: bool = False) -> Messages:
    made = Messages([SYSTEM] if system else [])
    for i in range(turns):
        made.append({"role": "user", "content": f"question {i} " * words})
        made.append({"role": "assistant", "content": f"answer {i} " * words})
    return made


def learned(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The stretches that are learned, as text; control tokens too."""
    mask = np.asarray(encoded.learn, dtype=np.int8)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in edges]


def texts(messages: list[dict[str, Any]], *, end: str) -> list[str]:
    return [m["content"] + end for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    ("name", "end", "strip"), [("chatml", "<|im_end|>", 0), ("llama3", "<|eot_id|>", 1), ("gemma", "<end_of_turn>", 1)]
)
def test_answers_with_their_end_are_learned(name: str, end: str, strip: bool) -> None:
    tokenizer, messages = tokenizer_for(name), talk(3)
    expected = texts([{**m, "content": m["content"].strip() if strip else m["content"]} for m in messages], end=end)
    encoded = encode_conversation(tokenizer, messages)
    assert encoded[:2] == tuple(render(tokenizer, messages)) and not encoded.cut
    assert encoded.text_bytes == sum(len(m["content"]) for m in messages)
    assert learned(tokenizer, encoded) == expected
    last = encode_conversation(tokenizer, messages, ChatOptions(learn="last"))
    assert last.ids == encoded.ids and learned(tokenizer, last) == expected[-1:]
    messages[3]["train"] = False
    weighted = encode_conversation(tokenizer, messages)
    assert weighted.ids == encoded.ids and learned(tokenizer, weighted) == [expected[0], expected[2]]
    messages[5]["train"] = False
    with pytest.raises(Dropped, match=r"no answer to be learned \(weight 0\)"):
        encode_conversation(tokenizer, messages, ChatOptions(learn="last"))


def test_single_answers_by_a_template_of_ones_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_for("chatml").backend, tokenizer_for("chatml").roles)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}")
    set_template(tokenizer, tmp_path / "t.jinja")
    encoded = encode_conversation(tokenizer, talk(3), ChatOptions(learn="last"))
    assert len(learned(tokenizer, encoded)) == 1 and "answer 2" in learned(tokenizer, encoded)[0]
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    set_template(tokenizer, tmp_path / "t.jinja")  # users are marked too: which stretch is which answer?
    with pytest.raises(MoaiError, match="marks 1 stretches for 3 answers, so that one answer cannot be chosen"):
        encode_conversation(tokenizer, talk(3), ChatOptions(learn="last"))
    assert any(encode_conversation(tokenizer, talk(3)).learn)


def length(tokenizer: Tokenizer, messages: Messages) -> int:
    return len(encode_conversation(tokenizer, messages).ids)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
@pytest.mark.parametrize("system", [False, True])
def test_the_oldest_turns_go_first_and_the_system_message_stays(name: str, system: bool) -> None:
    tokenizer, whole = tokenizer_for(name), talk(4, system=system)
    head = len(whole) - 8
    for kept in (1, 2, 3, 4):
        rest = Messages([*whole[:head], *whole[len(whole) - 2 * kept :]])
        exact = length(tokenizer, rest)
        for limit in (exact, exact + 1):  # one more token is not enough for one more turn
            encoded = encode_conversation(tokenizer, whole, ChatOptions("all", limit, "turns"))
            assert encoded[:3] == encode_conversation(tokenizer, rest)[:3] and encoded.cut == (kept < 4)
    with pytest.raises(Dropped, match=f"the last turn alone is longer than {length(tokenizer, rest) // 9} tokens"):
        encode_conversation(tokenizer, whole, ChatOptions("all", length(tokenizer, rest) // 9, "turns"))


def test_a_turn_is_a_question_with_all_that_answers_it() -> None:
    tokenizer = tokenizer_for("chatml")
    call = {"name": "f", "arguments": {"x": 1}}
    called = [
        {"role": "user", "content": "look"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found"}, {"role": "assistant", "content": "there"},
    ]  # fmt: skip
    whole, tail = Messages([*talk(1), *called]), Messages(called)
    whole.tools = tail.tools = [{"type": "function", "function": {"name": "f"}}]
    encoded = encode_conversation(tokenizer, whole, ChatOptions("all", length(tokenizer, tail), "turns"))
    assert encoded[:2] == encode_conversation(tokenizer, tail)[:2]
    with pytest.raises(Dropped, match="the last turn alone"):  # the tools count, and a call is not torn from its answer
        encode_conversation(tokenizer, whole, ChatOptions("all", length(tokenizer, tail) - 1, "turns"))
    # what nobody answers is no turn to keep: an answer is
    asked = Messages([*talk(2), {"role": "user", "content": "unanswered " * 9}])
    both = Messages(asked[2:])
    encoded = encode_conversation(tokenizer, asked, ChatOptions("all", length(tokenizer, both), "turns"))
    assert encoded.ids == encode_conversation(tokenizer, both).ids


def test_the_end_is_cut_and_zero_targets_are_dropped() -> None:
    tokenizer, whole = tokenizer_for("chatml"), talk(2)
    full = encode_conversation(tokenizer, whole)
    first, size = full.learn.index(True), len(full.ids)
    for limit in range(2, size + 2):
        options = ChatOptions("all", limit, "end")
        if limit <= first:  # not one token of an answer is left
            with pytest.raises(Dropped, match=f"nothing to learn within {limit} tokens"):
                encode_conversation(tokenizer, whole, options)
        else:
            encoded = encode_conversation(tokenizer, whole, options)
            assert encoded[:2] == (full.ids[:limit], full.learn[:limit]) and encoded.cut == (limit < size)
        if limit < size:
            with pytest.raises(Dropped, match=f"longer than {limit} tokens"):
                encode_conversation(tokenizer, whole, ChatOptions("all", limit))
    assert encode_conversation(tokenizer, whole, ChatOptions("all", size)) == full


def test_what_was_cut_and_dropped_is_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    chats = [(talk(n, words), f"a:{n}") for n, words in ((1, 3), (3, 3), (1, 50), (2, 3))]
    limit = length(tokenizer, talk(1))
    for truncate, dropped, cut in (
        ("drop", {f"longer than {limit} tokens": 3}, 0),
        ("turns", {f"the last turn alone is longer than {limit} tokens": 1}, 2),
        ("end", {f"nothing to learn within {limit} tokens": 1}, 2),
    ):
        options = ChatOptions("all", limit, truncate)  # type: ignore[arg-type]
        report = prepare_chats(iter(chats), tokenizer, tmp_path / truncate, [], options=options)
        assert (dict(report.dropped), report.cut) == (dropped, cut) and report.read == 4
        assert report.manifest.documents == 4 - report.dropped.total()
        assert Store(tmp_path / truncate).lengths().max() <= limit
    with pytest.raises(MoaiError, match="none of the 4 conversations is left: 4 longer than 2 tokens"):
        prepare_chats(iter(chats), tokenizer, tmp_path / "none", [], options=ChatOptions("all", 2))
    with pytest.raises(MoaiError, match="needs two tokens at least"):
        ChatOptions(max_length=1)


def targets(row: Batch) -> list[tuple[int, int]]:
    """(document in the row, token) of everything that is learned."""
    there = row["labels"] != -100
    return list(zip(row["seq_idx"][there].tolist(), row["labels"][there].tolist()))


def crossings(row: Batch) -> int:
    """Targets that would be predicted from another document's token, and targets that are not the token there."""
    there = torch.nonzero(row["labels"] != -100).flatten()
    before = (there - 1).clamp(min=0)
    crossed = (there == 0) | (row["seq_idx"][there] != row["seq_idx"][before]) | (row["position_ids"][there] == 0)
    return int((crossed | (row["labels"][there] != row["input_ids"][there])).sum())


def test_masks_survive_packing_and_no_target_crosses_a_border(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    chats = [(talk(1 + n % 3, 1 + n % 5), str(n)) for n in range(60)]
    prepare_chats(iter(chats), tokenizer, tmp_path / "store", [], options=ChatOptions(learn="last"))
    store = Store(tmp_path / "store")
    loader = Loader(store, 1024, seed=None)
    assert len(loader) < 60 / 3  # several in a row
    expected = sorted(
        [i for i, wanted in zip(store.document(d).tolist(), store.learn(d).tolist()) if wanted]  # type: ignore[union-attr]
        for d in range(60)
    )
    found = []
    for i in range(len(loader)):
        row = loader.row(i)
        assert crossings(row) == 0
        by_document: dict[int, list[int]] = {}
        for document, token in targets(row):
            by_document.setdefault(document, []).append(token)
        found += by_document.values()
    assert sorted(found) == expected  # each answer whole, and nothing else
    row["labels"] = row["input_ids"]  # the control: without the mask and the borders
    assert crossings(row) >= len(set(row["seq_idx"].tolist()))


def test_not_even_where_a_document_begins_with_what_is_learned(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    with StoreWriter(tmp_path / "store", tokenizer, "chat") as writer:
        for i in range(20):
            writer.add([5 + i] * 10, 10, [True] * 10)
        writer.close()
    row = Loader(Store(tmp_path / "store"), 64, seed=None).row(0)
    assert crossings(row) == 0 and len(targets(row)) == 6 * 9
