"""Expansions: what keeps its meaning is found whatever its id, everything else is spelled exactly."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import build_bpe, recover_merges, spell
from moai_llm.tokenizer.extend import extend_tokenizer, old_ids
from moai_llm.tokenizer.split import O200K_SPLIT
from moai_llm.tokenizer.train import SPECIAL_TOKENS, train_tokenizer, with_special_tokens
from moai_llm.tokenizer.transfer import Expansions, expansions, vocabulary_rows
from tests.conftest import shared_data
from tests.tokenizer.test_extend import BASES
from tests.tokenizer.test_extend import DOMAIN as EXTENSION

DOMAIN = [
    "The balance sheet shows deposits of 1,250 and interest income of 348.5; net revenue rose 12% year over year. " * 4,
    "재무상태표의 예금과 이자수익은 전년 대비 증가했습니다. 순이익률은 12%입니다. 🏦🏦\n\n" * 4,
    "貸借対照表の預金利息は前年より増加しました。 资产负债表中的存款利息增加了。" * 4,
]
TEXTS = [*DOMAIN, "The quick brown fox's  deposits\r\n\tdef f(x): return x  # 이자 1234567 café ﬁ \u0301e", "🏦" * 5]


def remade(tokenizer: Tokenizer, change: Any) -> Tokenizer:
    """A tokenizer whose JSON was changed."""
    spec = json.loads(tokenizer.backend.to_str())
    change(spec)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), tokenizer.roles, tokenizer.chat_template)


def permuted(tokenizer: Tokenizer, seed: int = 0) -> tuple[Tokenizer, list[int]]:
    """The same tokens under shuffled ids, special ones too; order[new id] = old id."""
    order = list(range(tokenizer.vocab_size))
    random.Random(seed).shuffle(order)
    new_id = {old: new for new, old in enumerate(order)}

    def change(spec: dict[str, Any]) -> None:
        vocab = tokenizer.backend.get_vocab(with_added_tokens=True)  # special tokens go there too, to hold their ids
        spec["model"]["vocab"] = {name: new_id[i] for name, i in vocab.items()}
        for token in spec["added_tokens"]:
            token["id"] = new_id[token["id"]]

    return remade(tokenizer, change), order


def spelled(found: Expansions, ids: list[int]) -> list[int]:
    return [old for i in ids for old in found[i]]


@pytest.mark.parametrize("moved", [False, True])
def test_continued_merges_are_spelled_as_the_old_tokenizer_cuts_them(tokenizer: Tokenizer, moved: bool) -> None:
    """The law of an extension, whatever its ids: the expansion of the new encoding is the old encoding."""
    new, order = extend_tokenizer(tokenizer, DOMAIN, 612), list(range(612))
    if moved:
        new, order = permuted(new)
    found = expansions(tokenizer, new)
    assert len(found) == new.vocab_size == 612
    shorter = 0
    for text in TEXTS:
        ids, old = new.encode(text), tokenizer.encode(text)
        assert spelled(found, ids) == old and new.decode(ids) == text
        shorter += len(old) - len(ids)
    assert shorter > 50
    assert all((found[i] == (old,)) == (old < 512) for i, old in enumerate(order))


@pytest.mark.parametrize("base", BASES)
def test_as_the_merges_say(base: str) -> None:
    """What is cut here from the bytes is what the merges of the extension join, for other families as well."""
    old = BASES[base]()
    new = extend_tokenizer(old, EXTENSION, old.vocab_size + 80)
    assert expansions(old, new) == {i: (i,) for i in range(old.vocab_size)} | old_ids(old, new)


def test_control_another_tokenizer_does_not_keep_the_old_cuts(tokenizer: Tokenizer) -> None:
    new = train_tokenizer(DOMAIN, 420, fewer=True)
    found = expansions(tokenizer, new)
    assert any(spelled(found, new.encode(text)) != tokenizer.encode(text) for text in TEXTS)


def split_like_gpt2(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def put_a_space_in_front(spec: dict[str, Any]) -> None:
    split_like_gpt2(spec)
    spec["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [lambda spec: None, split_like_gpt2, put_a_space_in_front])
@pytest.mark.parametrize("swapped", [False, True])
def test_every_expansion_spells_its_token(tokenizer: Tokenizer, change: Any, swapped: bool) -> None:
    """Between any two byte-level tokenizers: parts of characters, line ends, digits, whatever the splits."""
    one, other = remade(tokenizer, change), train_tokenizer([*DOMAIN, "€‰ \n\n\t 0123456789" * 9], 500, fewer=True)
    old, new = (other, one) if swapped else (one, other)
    found = expansions(old, new)
    parts_of_characters = 0
    for i in range(new.vocab_size):
        if i not in new.special_ids.values():
            assert b"".join(old.token_bytes(part) for part in found[i]) == new.token_bytes(i)
            try:
                new.token_bytes(i).decode()
            except UnicodeDecodeError:
                parts_of_characters += len(found[i]) > 1
    assert parts_of_characters > 0


def test_another_split_cuts_before_the_merges() -> None:
    old = train_tokenizer(["1234 " * 50, "12 34 " * 50], 300, fewer=True)  # three digits at most
    new = remade(train_tokenizer(["1" * 40 + " 123412341234 "] * 9, 300, fewer=True), split_like_gpt2)
    spec = json.loads(new.backend.to_str())
    names = {"1234": 400, "12341": 401}
    spec["model"]["vocab"].update(names)
    new = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), new.roles)
    found = expansions(old, new)
    for name, i in names.items():
        assert list(found[i]) == old.encode(name)


def test_a_permutation_is_found(tokenizer: Tokenizer) -> None:
    new, order = permuted(tokenizer)
    assert new.encode("interest 이자") != tokenizer.encode("interest 이자")
    assert expansions(tokenizer, new) == {i: (old,) for i, old in enumerate(order)}


def with_special(tokenizer: Tokenizer, names: dict[str, str], roles: dict[str, str]) -> Tokenizer:
    """Special tokens renamed."""
    text = tokenizer.backend.to_str()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    return Tokenizer(tokenizers.Tokenizer.from_str(text), roles)


def test_special_tokens_by_name_then_by_role(tokenizer: Tokenizer) -> None:
    llama = {"<|endoftext|>": "<|end_of_text|>", "<|pad|>": "<|reserved_0|>", "<|im_start|>": "<|start_header_id|>",
             "<|im_end|>": "<|eot_id|>"}  # fmt: skip
    ids = tokenizer.special_ids
    other = with_special(tokenizer, llama, {"eos_token": "<|end_of_text|>"})
    found = expansions(other, tokenizer)
    assert [found.get(i) for i in ids.values()] == [(ids["<|endoftext|>"],), None, (ids["<|im_start|>"],),
                                                    (ids["<|im_end|>"],)]  # fmt: skip
    named = with_special(tokenizer, llama, {"eos_token": "<|end_of_text|>", "pad_token": "<|reserved_0|>"})
    assert expansions(named, tokenizer)[ids["<|pad|>"]] == (ids["<|pad|>"],)


def test_two_ends_of_text_find_two(tokenizer: Tokenizer) -> None:
    """Llama's chat models end a text in two ways, and so do Qwen's: neither takes the other's padding."""
    llama = {"<|endoftext|>": "<|end_of_text|>", "<|pad|>": "<|finetune_right_pad_id|>", "<|im_start|>": "<|a|>",
             "<|im_end|>": "<|eot_id|>"}  # fmt: skip
    ids = tokenizer.special_ids
    old = with_special(tokenizer, llama, {"eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"})
    new = with_special(tokenizer, {"<|pad|>": "<|b|>"}, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    found = expansions(old, new)
    for name in ("<|endoftext|>", "<|im_end|>"):
        assert found[ids[name]] == (ids[name],)
    assert ids["<|pad|>"] not in found and ids["<|im_start|>"] not in found


def test_an_old_special_token_stands_for_one_new_token_only(tokenizer: Tokenizer) -> None:
    """Qwen's chat models: the end of a turn is the end of text, and the end of text pads."""
    ids = tokenizer.special_ids
    theirs = with_special(
        tokenizer, {"<|pad|>": "<|other|>"}, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    found = expansions(theirs, tokenizer)
    assert found[ids["<|endoftext|>"]] == (ids["<|endoftext|>"],) and found[ids["<|im_end|>"]] == (ids["<|im_end|>"],)
    assert ids["<|pad|>"] not in found
    two = with_special(tokenizer, {"<|im_start|>": "<s>"}, {"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    assert ids["<|im_start|>"] not in expansions(tokenizer, two)  # bos: its only old counterpart is the end of text


def test_added_words(tokenizer: Tokenizer) -> None:
    """An added token that is not special stands for its text, also where that looks like the byte alphabet."""
    new = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()), tokenizer.roles)
    new.backend.add_tokens([AddedToken("café é", normalized=False), AddedToken("<think>", normalized=False)])
    new = Tokenizer(new.backend, tokenizer.roles)
    found = expansions(tokenizer, new)
    for name in ("café é", "<think>"):
        parts = found[new.backend.token_to_id(name)]
        assert len(parts) > 1 and tokenizer.decode(parts) == name
    back = expansions(new, tokenizer)
    assert all(back[i] == (i,) for i in range(tokenizer.vocab_size))
    special = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()), tokenizer.roles)
    special.backend.add_special_tokens([AddedToken("<think>", normalized=False)])
    found = expansions(new, Tokenizer(special.backend, tokenizer.roles))
    assert found[special.backend.token_to_id("<think>")] == (new.backend.token_to_id("<think>"),)


def test_bytes_the_old_tokenizer_cannot_write(tokenizer: Tokenizer) -> None:
    def without_z(spec: dict[str, Any]) -> None:
        gone = next(name for name, i in spec["model"]["vocab"].items() if name == "z")
        spec["model"]["vocab"] = {name: i for name, i in spec["model"]["vocab"].items() if gone not in name}
        spec["model"]["merges"] = [m for m in spec["model"]["merges"] if gone not in "".join(m)]

    found = expansions(remade(tokenizer, without_z), tokenizer)
    lost = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in found]
    assert b"z" in lost and all(b"z" in token for token in lost)


def test_padding_rows_take_over_padding_rows(tokenizer: Tokenizer) -> None:
    new, order = permuted(tokenizer)
    size = tokenizer.vocab_size
    assert size % 128 == 0 and len(vocabulary_rows(tokenizer, new, size)) == size
    new = extend_tokenizer(tokenizer, DOMAIN, 562)
    padded = vocabulary_rows(tokenizer, new, size + 3)[new.vocab_size :]
    assert len(padded) == 78 and padded == [(size + i % 3,) for i in range(78)]
    assert set(vocabulary_rows(tokenizer, new, size)[new.vocab_size :]) == {()}

    def with_a_gap(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"].update({**tokenizer.special_ids, "ĠzzĠ": 600})

    gap = remade(tokenizer, with_a_gap)
    rows = vocabulary_rows(tokenizer, gap, size + 1)
    assert len(rows) == 640 and len(rows[600]) > 1 and set(rows[512:600] + rows[601:]) == {(size,)}


def test_mistakes(tokenizer: Tokenizer) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"hello": 0, "wörld": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = remade(tokenizer, lambda spec: spec["model"]["vocab"].update({"▁the": 900}))
    for bad in (Tokenizer(words, {}), pieces):
        with pytest.raises(MoaiError, match="the new tokenizer is not byte-level"):
            expansions(tokenizer, bad)
        with pytest.raises(MoaiError, match="the old tokenizer is not byte-level"):
            expansions(bad, tokenizer)
    with pytest.raises(MoaiError, match="has 500 rows in its embedding and its tokenizer ids up to 511"):
        vocabulary_rows(tokenizer, tokenizer, 500)


@pytest.mark.slow
@pytest.mark.parametrize("there_and_back", [False, True])
def test_o200k_and_a_korean_tokenizer(there_and_back: bool) -> None:
    """200,000 tokens to 8,192 and the other way."""
    lines = shared_data("tokenizers/o200k_base.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    backend = build_bpe({spell(token): rank for token, rank in ranks.items()}, merges, O200K_SPLIT)
    texts = [json.loads(line)["text"] for line in shared_data("ko/rust_book.jsonl").read_text("utf-8").splitlines()]
    old, new = with_special_tokens(backend, SPECIAL_TOKENS), train_tokenizer(texts, 8192)
    if there_and_back:
        old, new = new, old
    found = expansions(old, new)
    assert len(found) == new.vocab_size
    for i in set(range(new.vocab_size)) - set(new.special_ids.values()):
        assert b"".join(old.token_bytes(part) for part in found[i]) == new.token_bytes(i)
    assert 5000 < sum(len(parts) == 1 for parts in found.values()) < 8192
