"""Extension by continued BPE: every old id keeps its meaning, and the new tokens only join what the old ones gave."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.extend import extend_tokenizer, old_ids
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT
from moai_llm.tokenizer.stages import Stage, load_stages, save_stages
from moai_llm.tokenizer.train import train_tokenizer
from tests.conftest import shared_data

GENERAL = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 6,
    "오늘은 날씨가 좋아요. 은행에서 예금을 했어요. 日本の首都は東京です。中国的首都是北京。 " * 6,
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n" * 4,
]
DOMAIN = [
    f"Depreciation and amortization of {i} million; deferred tax assets, net. 감가상각비와 이연법인세자산 {i}원. "
    "減価償却費は前年より増えた。 折旧费用增加了。 amortization_schedule = depreciate(asset)\n" for i in range(60)
]  # fmt: skip
UNSEEN = [
    "",
    "Net amortization rose; the lazy fox deferred depreciation.",
    "감가상각비가 늘었고 이연법인세자산은 줄었어요. 東京の減価償却費。北京的折旧费用。",
    "for asset in assets:\n\tdepreciate(asset)  # \x00\x07\x1b[0m\r\n",
    "👩‍👩‍👧‍👦🇰🇷 e\u0301 ᄀ\u1161각 ﷺ \ufeff <|im_start|>assistant<|endoftext|>",
]


def hf(split: str, *, normalizer: normalizers.Normalizer | None = None, ignore_merges: bool = False) -> Tokenizer:
    """A tokenizer in the style of Qwen or Llama 3, with control tokens behind its vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(GENERAL, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_end|>")])
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"})


BASES: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: train_tokenizer(GENERAL, 420),
    "gpt2": lambda: hf(GPT2_SPLIT),
    "qwen": lambda: hf(CL100K_SPLIT.replace("{1,3}", ""), normalizer=normalizers.NFC()),
    "llama3": lambda: hf(CL100K_SPLIT, ignore_merges=True),
}


@pytest.fixture(scope="module", params=BASES)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Tokenizer]:
    base = BASES[request.param]()
    return base, extend_tokenizer(base, DOMAIN, base.vocab_size + 80)


def expand(base: Tokenizer, extended: Tokenizer, ids: list[int]) -> list[int]:
    table = old_ids(base, extended)
    return [old for new in ids for old in table.get(new, (new,))]


def check(base: Tokenizer, extended: Tokenizer, text: str) -> None:
    ids = extended.encode(text)
    assert expand(base, extended, ids) == base.encode(text)
    assert extended.decode(ids) == base.decode(base.encode(text))


def test_old_ids_keep_their_meaning(pair: tuple[Tokenizer, Tokenizer]) -> None:
    base, extended = pair
    assert extended.vocab_size == base.vocab_size + 80 and extended.special_ids == base.special_ids
    for i in range(base.vocab_size):
        assert extended.token_bytes(i) == base.token_bytes(i)
        assert extended.backend.id_to_token(i) == base.backend.id_to_token(i)
    table = old_ids(base, extended)
    assert sorted(table) == list(range(base.vocab_size, extended.vocab_size))
    for new, old in table.items():
        assert extended.token_bytes(new) == b"".join(base.token_bytes(i) for i in old)


@pytest.mark.parametrize("text", [*UNSEEN, *DOMAIN[:3], *GENERAL], ids=lambda text: text[:12])
def test_a_coarsening(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    check(*pair, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from([*"abcdeimnoprt zé감가상각비減償却\n\t.,;0", "amort", "ization", " deferred", "<|endoftext|>"])
    )
)
def test_a_coarsening_on_any_text(pair: tuple[Tokenizer, Tokenizer], parts: list[str]) -> None:
    check(*pair, "".join(parts))


def test_domain_text_gets_shorter_and_no_text_longer(pair: tuple[Tokenizer, Tokenizer]) -> None:
    base, extended = pair
    for text in [*UNSEEN, *DOMAIN, *GENERAL]:
        assert len(extended.encode(text)) <= len(base.encode(text))
    assert len(extended.encode(DOMAIN[0])) < 0.6 * len(base.encode(DOMAIN[0]))


def test_added_tokens_break_both_laws() -> None:
    """The control: whole words as added tokens cut other words in two, and make general text longer."""
    base = BASES["ours"]()
    backend = tokenizers.Tokenizer.from_str(base.backend.to_str())
    backend.add_tokens(["he", "og"])
    text, ids = "The fox and the dog.", backend.encode("The fox and the dog.").ids
    parts = [base.encode(backend.id_to_token(i)) if i >= base.vocab_size else [i] for i in ids]
    assert sum(parts, []) != base.encode(text) and len(ids) > len(base.encode(text))


def test_saved_and_loaded(pair: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base, extended = pair
    loaded = load_tokenizer(extended.save(tmp_path / "t"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded.special_ids == base.special_ids
    for text in UNSEEN[:4] + DOMAIN[:2]:
        assert loaded.encode(text) == extended.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == extended.encode(text)


def test_staged(tmp_path: Path) -> None:
    """Growing twice keeps the laws of both steps."""
    base = BASES["ours"]()
    first = extend_tokenizer(base, DOMAIN[:30], base.vocab_size + 30)
    second = extend_tokenizer(
        first, ["새로운 영역의 글은 새로운 낱말을 줘요. new words of a new domain. " * 3] * 9, base.vocab_size + 60
    )
    for text in UNSEEN + DOMAIN[:3]:
        check(first, second, text)
        check(base, first, text)
    stages = [Stage("train", 0, 420, 420, base.fingerprint), Stage("extend", 420, 30, 450, second.fingerprint)]
    save_stages(tmp_path, stages)
    assert load_stages(tmp_path, second) == stages
    assert load_stages(tmp_path, first) == []  # not the tokenizer the file tells of
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(MoaiError, match="delete it to go on"):
        load_stages(tmp_path, first)


def test_real_domain_text() -> None:
    import csv

    reports = json.loads(shared_data("finance/tatqa_dev.json").read_text(encoding="utf-8"))
    finance = ["\n".join(p["text"] for p in report["paragraphs"]) for report in reports]
    with shared_data("ko/ChatbotData.csv").open(encoding="utf-8") as file:
        chats = [" ".join(row[:2]) for row in csv.reader(file)]
    base = train_tokenizer(GENERAL, 420)
    extended = extend_tokenizer(base, [*finance[::2], *chats[:6000]], 1500)
    rng = random.Random(0)
    for text in [*rng.sample(finance[1::2], 40), *rng.sample(chats[6000:], 200), *UNSEEN]:
        check(base, extended, text)


@pytest.mark.slow
def test_o200k_base(o200k: Tokenizer) -> None:
    """200,000 merges recovered from ranks, a hole in the ids, control tokens at their places."""
    extended = extend_tokenizer(o200k, DOMAIN, o200k.vocab_size + 30)
    assert extended.special_ids == o200k.special_ids and extended._twin is not None
    for text in [*UNSEEN, *DOMAIN[:3], *GENERAL]:
        check(o200k, extended, text)
    assert len(extended.encode(DOMAIN[0])) < len(o200k.encode(DOMAIN[0]))


def word_piece() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (DOMAIN, 420, "has 420 tokens already: .*must be larger, got 420"),
        ([], 500, "got no text"),
        (["one two"], 5000, r"supports only \d+: use --vocab-size \d+ or more text"),
    ],
)
def test_bad_requests(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        extend_tokenizer(train_tokenizer(GENERAL, 420), texts, size)


def test_a_base_that_is_not_byte_level_bpe() -> None:
    with pytest.raises(MoaiError, match="byte-level BPE tokenizer, and this one is a WordPiece tokenizer"):
        extend_tokenizer(Tokenizer(word_piece(), {}), DOMAIN, 500)
