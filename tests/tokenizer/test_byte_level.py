"""Reading a byte-level BPE file: bytes, merges, the pattern; and the words for what is another kind."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import (
    BYTE_OF,
    apply_merges,
    build_bpe,
    parse_bpe,
    read_bpe,
    recover_merges,
    spell,
    unspell,
)
from moai_llm.tokenizer.split import GPT2_SPLIT, O200K_SPLIT


def test_the_alphabet_is_that_of_the_tokenizers_library() -> None:
    assert sorted(BYTE_OF) == sorted(pre_tokenizers.ByteLevel.alphabet())
    every = bytes(range(256))
    assert unspell(spell(every)) == every and unspell("x y") is None
    text = "é 이\n"
    (piece, _), *rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert not rest and piece == spell(text.encode())


def test_our_own(tokenizer: Tokenizer) -> None:
    bpe = read_bpe(tokenizer.backend)
    learned = tokenizer.vocab_size - 4
    assert bpe.pattern == O200K_SPLIT and bpe.normalizer is None and not bpe.ignore_merges
    assert len(bpe.tokens) == learned and bpe.tokens[:256] == [bytes([i]) for i in range(256)]
    assert len(bpe.merges) == learned - 256
    assert [bpe.tokens[a] + bpe.tokens[b] for a, b in bpe.merges] == bpe.tokens[256:]
    assert bpe.ids == bpe.ranks == {token: i for i, token in enumerate(bpe.tokens)}
    assert recover_merges(bpe.ranks) == [(bpe.tokens[a], bpe.tokens[b]) for a, b in bpe.merges]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="the int이자가 利", min_size=1, max_size=30))
def test_applying_merges_is_what_the_library_does(tokenizer: Tokenizer, text: str) -> None:
    bpe = read_bpe(tokenizer.backend)
    data = text.encode()
    theirs = [token.id for token in tokenizer.backend.model.tokenize(spell(data))]
    assert [bpe.ids[part] for part in apply_merges(data, bpe.ranks, 1 << 30)] == theirs


def test_a_bound_leaves_later_merges_out(tokenizer: Tokenizer) -> None:
    bpe = read_bpe(tokenizer.backend)
    assert apply_merges(b"interest", bpe.ranks, 256) == [bytes([byte]) for byte in b"interest"]
    assert len(apply_merges(b"interest", bpe.ranks, 1 << 30)) < len(b"interest")


def test_ranks_that_are_no_byte_pair_encoding() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    with pytest.raises(MoaiError, match=r"token 256, b'abc', is not one merge of earlier tokens"):
        recover_merges(ranks)


def test_other_orders_and_added_tokens() -> None:
    """Ids that are not ranks, a control token and an added token inside the vocabulary, merges written as strings."""
    vocab = {spell(bytes([i])): 400 - i for i in range(256)}
    vocab |= {"<|end|>": 0, "ab": 7, "abc": 3, "hello": 9}
    backend = build_bpe(vocab, [("a", "b"), ("ab", "c")], GPT2_SPLIT)
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["hello", "new"])
    bpe = read_bpe(backend)
    assert bpe.tokens[7] == b"ab" and bpe.tokens[3] == b"abc" and bpe.tokens[400] == b"\0"
    assert bpe.tokens[0] == bpe.tokens[9] == bpe.tokens[5] == b"" and len(bpe.tokens) == 401
    assert bpe.merges == [(400 - 97, 400 - 98), (7, 400 - 99)]
    assert bpe.ranks[b"ab"] == 256 and bpe.ranks[b"abc"] == 257 and b"hello" not in bpe.ranks
    spec = json.loads(backend.to_str())
    spec["model"]["merges"] = ["a b", "ab c"]
    assert parse_bpe(spec) == bpe


def test_an_added_token_that_merging_makes_keeps_its_bytes() -> None:
    vocab = {spell(bytes([i])): i for i in range(256)} | {"ab": 256, "abc": 257}
    backend = build_bpe(vocab, [("a", "b"), ("ab", "c")], GPT2_SPLIT)
    backend.add_tokens(["ab"])
    assert read_bpe(backend).tokens[256] == b"ab"


def test_gpt2_style_and_normalisers(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.NFC()
    bpe = read_bpe(backend)
    assert bpe.pattern == GPT2_SPLIT and bpe.normalizer == {"type": "NFC"}


def other_kinds() -> dict[str, tokenizers.Tokenizer]:
    letters = {"a": 0, "b": 1, "[UNK]": 2}
    metaspace = tokenizers.Tokenizer(models.BPE({**letters, "<0x00>": 3}, [], byte_fallback=True, unk_token="[UNK]"))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    every = {spell(bytes([i])): i for i in range(256)}
    clip = tokenizers.Tokenizer(models.BPE(every, [], end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.ByteLevel()
    chain = build_bpe(every, [], O200K_SPLIT)
    chain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    prefix = build_bpe(every, [], O200K_SPLIT)
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    removed = build_bpe(every, [], O200K_SPLIT)
    removed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    dropout = tokenizers.Tokenizer(models.BPE(every, [], dropout=0.1))
    dropout.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "a WordPiece tokenizer": tokenizers.Tokenizer(models.WordPiece(letters, unk_token="[UNK]")),
        "a WordLevel tokenizer": tokenizers.Tokenizer(models.WordLevel(letters, unk_token="[UNK]")),
        "a Unigram tokenizer": tokenizers.Tokenizer(models.Unigram([("a", -1.0)], unk_id=0)),
        "over characters, not bytes \\(SentencePiece with byte fallback\\)": metaspace,
        "marks at the borders of words": clip,
        "not one pattern \\(Digits, ByteLevel\\)": chain,
        "not one pattern \\(ByteLevel\\)": prefix,
        "not one pattern \\(Split, ByteLevel\\)": removed,
        "with dropout, which encodes a text differently each time": dropout,
        "without 255 of the 256 bytes": small,
    }


@pytest.mark.parametrize("words", other_kinds())
def test_other_kinds_are_named(words: str) -> None:
    with pytest.raises(MoaiError, match=f"needs a byte-level BPE tokenizer, and this one is .*{words}: take one"):
        read_bpe(other_kinds()[words])
