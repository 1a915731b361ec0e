"""The twin has the ids of the `tokenizers` library: for every style of byte-level BPE, for merges of any order, for
real text, noise and endless runs; and where it could not have them there is none.
"""

from __future__ import annotations

import itertools
import json
import pickle
import random
import time

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

import moai_llm.tokenizer.twin as twin_module
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import build_bpe, read_bpe, spell
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT
from moai_llm.tokenizer.twin import NO_TOKEN, make_twin

BYTES = {spell(bytes([i])): i for i in range(256)}
HARD = [
    "",
    " ",
    "  x",
    "it's IT'S we'LL they'vE 'ſ",
    "12345678 1 22 333 4444 ٣٤٥ ⅧⅨ",
    "\x00\x01\x1f\x7f\x85\u2028\u2029\ufeff",
    "각 \u1100\u1161\u11a8 é e\u0301 ﷺ Å \u212b \u1e9b\u0323",
    "👩‍👩‍👧‍👦🇰🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☝🏽",
    " \t\n \r\n\n  \u3000\u00a0 x \n",
    "def f(a):\n    return {'k': a ** 2}  # 주석\n\n\n",
    "ǅ ʰ ªº ½ ² a\u0903 \u0378 \ue000 \U0001f9ff \U000323af",
    "hello<|im_end|> <|endoftext|>",
    "tool <tool_call> x</tool_call>",
]


def rebuilt(tokenizer: Tokenizer, pattern: str) -> tokenizers.Tokenizer:
    """The merges of a tokenizer behind another split."""
    spec = json.loads(tokenizer.backend.to_str())["model"]
    return build_bpe(spec["vocab"], [tuple(pair) for pair in spec["merges"]], pattern)


def gpt2_style(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    backend = rebuilt(tokenizer, GPT2_SPLIT)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def qwen_style(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Single digits, NFC, added tokens that are no control tokens."""
    backend = rebuilt(tokenizer, CL100K_SPLIT.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    return backend


def lowercase_style(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    backend = rebuilt(tokenizer, O200K_SPLIT)
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()])
    return backend


def llama3_style(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Every split of a token into two tokens is a listed merge, and a piece that is a token is taken whole; with tokens
    that no merge reaches.
    """
    bpe = read_bpe(tokenizer.backend)
    ids = {**bpe.ids, b" unreachable": len(bpe.ids), " 닿지".encode(): len(bpe.ids) + 1}
    merges = []
    for token, rank in ids.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        merges += [(rank, ids[a], ids[b], a, b) for a, b in splits if ids[a] < rank and ids[b] < rank]
    names = {spell(token): i for token, i in ids.items()}
    backend = build_bpe(names, [], CL100K_SPLIT)
    backend.model = models.BPE(names, [(spell(a), spell(b)) for *_, a, b in sorted(merges)], ignore_merges=True)
    return backend


def shuffled_ids(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Ids in an order that has nothing to do with that of the merges."""
    spec = json.loads(tokenizer.backend.to_str())["model"]
    names = sorted(spec["vocab"])
    random.Random(0).shuffle(names)
    vocab = {name: 3 * i for i, name in enumerate(names)}
    return build_bpe(vocab, [tuple(pair) for pair in spec["merges"]], O200K_SPLIT)


def extended(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Merges learned later, with ids behind the control tokens."""
    spec = json.loads(tokenizer.backend.to_str())
    model, last = spec["model"], tokenizer.vocab_size - 1
    for pair in (("the", "Ġ"), ("i", "n"), ("e", "s"), ("t", "he")):
        if "".join(pair) not in model["vocab"] and set(pair) <= model["vocab"].keys():
            last += 1
            model["vocab"]["".join(pair)] = last
            model["merges"].append(list(pair))
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


STYLES = {
    style.__name__: style for style in (gpt2_style, qwen_style, lowercase_style, llama3_style, shuffled_ids, extended)
}


@pytest.fixture(scope="module", params=["ours", *STYLES])
def styled(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "ours" else Tokenizer(STYLES[request.param](tokenizer), {})


def assert_equal(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The twin's ids are those of the library; every text is one the twin takes, but for those with an added token."""
    theirs = tokenizer._plain.encode_batch(texts, add_special_tokens=False)
    for text, their in zip(texts, theirs):
        ours = tokenizer._twin.encode(text)
        assert ours == their.ids or (ours is None and "tool_call>" in text), text


def test_hard_texts(styled: Tokenizer) -> None:
    assert_equal(styled, HARD)
    assert [styled.encode(text) for text in HARD] == styled.encode_batch(HARD)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.text(alphabet="theTHE's 1\n\t.각이利\u0301ſ", max_size=60)))
def test_any_text(styled: Tokenizer, text: str) -> None:
    assert_equal(styled, [text])


@pytest.mark.parametrize("style", ["gpt2_style", "qwen_style", "llama3_style", "extended"])
def test_where_ids_are_in_merge_order_no_table_is_needed(tokenizer: Tokenizer, style: str) -> None:
    twin = make_twin(STYLES[style](tokenizer))
    assert twin is not None and twin._ids is None


def test_noise(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    texts = [generator.randbytes(generator.randrange(1, 80)).decode("utf-8", "replace") for _ in range(10_000)]
    assert_equal(tokenizer, texts)


def test_real_text(tokenizer: Tokenizer, real_documents: list[str]) -> None:
    assert_equal(tokenizer, real_documents)


# ------------------------------------------------------------------------------------- merges of any order


def small_bpe(choices: list[int], ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A BPE over three letters whose merges are chosen one by one from all pairs of tokens there are: with several
    pairs for one token, tokens that nothing reaches and merges that never apply.
    """
    tokens, merges = ["a", "b", "c"], []
    for choice in choices:
        left, right = tokens[choice % len(tokens)], tokens[choice // len(tokens) % len(tokens)]
        if (left, right) not in merges and len(left + right) < 12:
            merges.append((left, right))
            if left + right not in tokens:
                tokens.append(left + right)
    vocab = BYTES | {token: 256 + i for i, token in enumerate(tokens) if len(token) > 1}
    backend = build_bpe(vocab, [], r"\S+|\s+")
    backend.model = models.BPE(vocab, merges, ignore_merges=ignore_merges)
    return backend


WORDS = ["".join(letters) for letters in itertools.product("abc", repeat=5)] + [
    "abcab" * 9,
    "aabacabba" * 13,
    "a" * 130,
]


@settings(max_examples=300, deadline=None)
@given(choices=st.lists(st.integers(0, 10**6), max_size=25), ignore_merges=st.booleans())
def test_merges_in_any_order(choices: list[int], ignore_merges: bool) -> None:
    backend = small_bpe(choices, ignore_merges)
    twin = make_twin(backend)
    if twin is not None:
        words = [*WORDS, *(name for name in backend.get_vocab() if set(name) <= set("abc"))]
        assert [twin.encode(word) for word in words] == [backend.encode(word).ids for word in words]


def test_control_a_naive_twin_is_wrong() -> None:
    """`abc` is listed as `ab` and `c`, but `b` and `c` join first: nothing reaches it, and tiktoken would."""
    vocab = BYTES | {"bc": 256, "ab": 257, "abc": 258}
    backend = build_bpe(vocab, [("b", "c"), ("a", "b"), ("ab", "c")], r"\S+|\s+")
    naive = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=read_bpe(backend).ids, special_tokens={})
    right = backend.encode("abcabc").ids
    assert naive.encode_ordinary("abcabc") != right
    twin = make_twin(backend)
    assert twin is not None and twin.encode("abcabc") == right


def test_no_twin_where_a_token_is_only_a_whole_piece() -> None:
    vocab = BYTES | {"ab": 256}
    backend = build_bpe(vocab, [], r"\S+|\s+")
    backend.model = models.BPE(vocab, [], ignore_merges=True)
    assert backend.encode("ab").ids == [256] and backend.encode("abc").ids == [97, 98, 99]
    assert make_twin(backend) is None
    loaded = Tokenizer(backend, {})
    assert loaded.encode("ab") == [256] and loaded.encode("abc") == [97, 98, 99]


def test_no_twin_where_pairs_of_a_token_are_apart() -> None:
    vocab = BYTES | {"ab": 256, "bb": 257, "abb": 258, "aa": 259}
    backend = build_bpe(vocab, [("a", "b"), ("b", "b"), ("ab", "b"), ("a", "a"), ("a", "bb")], r"\S+|\s+")
    assert make_twin(backend) is None


# ------------------------------------------------------------------------------------- texts that go around the twin


def test_added_tokens_go_to_the_library(tokenizer: Tokenizer) -> None:
    loaded = Tokenizer(qwen_style(tokenizer), {})
    text = "a<tool_call>b"
    ids = loaded.encode(text)
    assert loaded._twin is not None and loaded._twin.encode(text) is None
    assert loaded.backend.token_to_id("<tool_call>") in ids and loaded.decode(ids) == text
    assert loaded.token_to_id("<tool_call>") in ids


def test_an_added_token_that_normalising_brings_out(tokenizer: Tokenizer) -> None:
    backend = rebuilt(tokenizer, O200K_SPLIT)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([tokenizers.AddedToken("caf\u00e9", normalized=True)])
    loaded = Tokenizer(backend, {})
    for text in ("caf\u00e9 x", "cafe\u0301 x", "cafe x"):
        assert loaded.encode(text) == loaded._plain.encode(text).ids
    assert loaded.encode("cafe\u0301") == [loaded.token_to_id("caf\u00e9")]


def test_too_many_added_tokens(tokenizer: Tokenizer) -> None:
    backend = rebuilt(tokenizer, O200K_SPLIT)
    backend.add_tokens([f"<{i}>" for i in range(twin_module.MANY_ADDED + 1)])
    assert make_twin(backend) is None


def test_characters_of_a_newer_unicode(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin_module, "strangers", lambda: frozenset("é"))
    twin = make_twin(tokenizer.backend)
    assert twin is not None and twin.encode("caf\u00e9") is None and twin.encode("cafe") == tokenizer.encode("cafe")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {"dropout": 0.5}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"pattern": r"\p{N}{1,3}+|\P{N}+"},
        {"pattern": r"\p{L}+"},
    ],
)
def test_no_twin_of_other_kinds(tokenizer: Tokenizer, change: dict) -> None:
    spec = json.loads(tokenizer.backend.to_str())
    spec["model"].update(change.pop("model", {}))
    if "pattern" in change:
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = change.pop("pattern")
    backend = tokenizers.Tokenizer.from_str(json.dumps({**spec, **change}))
    assert make_twin(backend) is None


# ------------------------------------------------------------------------------------- endless runs

MILLION = 1_000_000


def endless(n: int) -> dict[str, str]:
    """Texts of about n bytes that a split finds no end in."""
    return {
        "no space": "interest이자" * (n // 14),
        "one letter": "a" * n,
        "one capital": "A" * n,
        "one syllable": "가" * (n // 3),
        "marks": "\u0301" * (n // 2),
        "digits": "1" * n,
        "signs": "-" * n,
        "signs and line ends": "-" * (n // 2) + "\n" * (n // 2),
        "emoji": "👩‍" * (n // 7),
        "spaces": " " * n + "x",
        "spaces at the end": "x" + " " * n,
        "tabs": "\t" * n + "x",
        "wide spaces": "\u3000" * (n // 3) + "x",
        "line ends": "\n" * n,
        "spaces and line ends": " \n" * (n // 2) + "x",
        "short runs": (" " * 500 + "x") * (n // 500),
    }


def assert_endless(tokenizer: Tokenizer, text: str, seconds: float) -> None:
    tokenizer.encode("x")
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < seconds
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer._plain.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", endless(0))
def test_endless_runs(tokenizer: Tokenizer, name: str) -> None:
    assert_endless(tokenizer, endless(30_000)[name], seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", endless(0))
@pytest.mark.parametrize("style", ["ours", "gpt2_style", "llama3_style", "o200k"])
def test_a_megabyte_without_end(tokenizer: Tokenizer, o200k: Tokenizer, style: str, name: str) -> None:
    """In time that grows with the length (a second or less; quadratic would be hours), with the ids of the
    definition.
    """
    if style in STYLES:
        tokenizer = Tokenizer(STYLES[style](tokenizer), {})
    assert_endless(o200k if style == "o200k" else tokenizer, endless(MILLION)[name], seconds=20)


def test_spaces_around_the_limit_of_the_twin(tokenizer: Tokenizer) -> None:
    """Up to nearly twice `SPACES` the twin takes them all; from there on it takes none."""
    assert tokenizer._twin is not None
    for count, taken in ((twin_module.SPACES - 1, True), (2 * twin_module.SPACES - 1, False)):
        for text in (" " * count + "x", "x" + "\u3000" * count, "a b" * 7 + "\t" * count + "\n"):
            assert (tokenizer._twin.encode(text) is not None) == taken
            assert_endless(tokenizer, text, seconds=5)
    longest = (
        "x" + " " * (2 * twin_module.SPACES - 2)
    ) * 2  # never a whole block of spaces from where one is looked for
    assert_endless(tokenizer, longest, seconds=5)


def test_every_space_of_the_engines_is_one_to_python() -> None:
    spaces = tiktoken.Encoding(
        "x", pat_str=r"\s", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    found = spaces.decode(spaces.encode_ordinary(every))
    assert len(found) == 25 and found.isspace()


@pytest.mark.parametrize("pickled", [False, True])
def test_arrays_and_copies_for_other_processes(pickled: bool, tokenizer: Tokenizer) -> None:
    """The same ids as arrays, and of a copy that has no backend until something asks for it."""
    copy = pickle.loads(pickle.dumps(tokenizer)) if pickled else tokenizer
    texts = ["", "이자는 interest", f"{NO_TOKEN} é{NO_TOKEN}é", "lone \ud800 surrogate", "<|endoftext|>", "<<<<" * 9]
    expected = [tokenizer.encode(text) for text in texts]
    assert [copy.encode_array(text).tolist() for text in texts] == expected
    assert [ids.tolist() for ids in copy.encode_arrays(texts * 9000, threads=2)][-len(texts) :] == expected
    assert ("backend" in vars(copy)) == (not pickled) and copy.eos_id == tokenizer.eos_id
    spaces = " " * 250_000  # for `tokenizers` alone
    assert copy.encode_array(spaces).tolist() == tokenizer.encode(spaces) and "backend" in vars(copy)
    assert copy.fingerprint == tokenizer.fingerprint


def test_arrays_without_a_twin(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenizer.encode("이자 interest")
    other = Tokenizer(tokenizer.backend, tokenizer.roles)
    monkeypatch.setitem(vars(other), "_twin", None)
    assert [ids.tolist() for ids in other.encode_arrays(["이자 interest"])] == [expected]
    assert other.encode_array("이자 interest").dtype == np.uint32
