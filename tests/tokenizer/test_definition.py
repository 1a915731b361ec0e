"""Tokenizers of other kinds: ordinary text stays ordinary, nothing is cut off, and tokens stand for their bytes."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.definition import clean, plain_backend

FALLBACK = [f"<0x{i:02X}>" for i in range(256)]
SENTENCEPIECE = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def unigram() -> Tokenizer:
    """As SentencePiece's become: control tokens in the vocabulary with a score that would beat every other piece."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((name, 0.0) for name in FALLBACK)]
    pieces += [
        ("▁", -2.0),
        ("▁the", -3.0),
        ("the", -4.0),
        ("이자", -4.0),
        ("<", -5.0),
        ("/", -5.0),
        ("s", -5.0),
        (">", -5.0),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = SENTENCEPIECE
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return Tokenizer(backend, {"eos_token": "</s>", "pad_token": "<unk>"})


def llama2_style() -> Tokenizer:
    """BPE over characters with byte fallback, and a space put before the text."""
    vocab = {
        name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *FALLBACK, "▁", "t", "h", "e", "th", "the", "▁the"])
    }
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {})


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=60))
@pytest.mark.parametrize("make", [unigram, llama2_style])
def test_lossless(make, text: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode_batch([text]) == [ids]
    assert not set(ids) & set(tokenizer.special_ids.values())
    data = b"".join(tokenizer.token_bytes(i) for i in ids)
    if make is llama2_style:  # the space before the text counts
        data = data.removeprefix(b" ")
    assert data == text.encode()


def test_text_never_becomes_a_control_token() -> None:
    tokenizer, attack = unigram(), "the </s><s> the"
    assert 2 in tokenizer.backend.encode(attack, add_special_tokens=False).ids  # control: the library alone finds it
    assert tokenizer.backend.encode("the").ids == [1, *tokenizer.encode("the"), 2]  # and puts others around
    ids = tokenizer.encode(attack)
    assert not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == attack


@pytest.mark.parametrize("make", [unigram, llama2_style])
def test_bytes_of_tokens(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("<0xE3>")) == b"\xe3"
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("▁the")) == b" the"
    assert tokenizer.token_bytes(1) == b"" and tokenizer.byte_lengths()[:3].sum() == 0
    assert tokenizer.token_to_id(" the") == tokenizer.backend.token_to_id("▁the")
    assert tokenizer.token_to_id("</s>") == 2 and tokenizer.token_to_id("nothing like it") is None
    assert tokenizer._twin is None


def test_wordpiece_and_ends_of_words() -> None:
    pieces = {"[UNK]": 0, "[SEP]": 1, "deposit": 2, "##s": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer = Tokenizer(backend, {})
    assert tokenizer.encode("deposits [SEP]") == [2, 3, 0]  # unknown text, not the control token
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b"", b"", b"deposit", b"s"]
    clip = tokenizers.Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    clip.decoder = decoders.BPEDecoder("</w>")
    assert Tokenizer(clip, {}).token_bytes(1) == b"a "


def test_nothing_is_cut_off_and_nothing_filled_up() -> None:
    tokenizer = unigram()
    tokenizer.backend.enable_truncation(2)
    tokenizer.backend.enable_padding(length=30)
    plain = plain_backend(tokenizer.backend)
    assert len(plain.encode("the the the the", add_special_tokens=False).ids) == 4
    assert Tokenizer(tokenizer.backend, {}).encode("the the the the") == tokenizer.encode("the the the the")


def test_the_tokenizer_given_is_left_alone(tokenizer: Tokenizer) -> None:
    before = tokenizer.backend.to_str()
    _ = tokenizer._plain, tokenizer.encode("x"), tokenizer.decode([1])
    assert tokenizer.backend.to_str() == before
    assert tokenizer.special_ids["<|im_end|>"] in tokenizer.backend.encode("<|im_end|>").ids


def test_lone_surrogates() -> None:
    assert clean("a\ud800b") == "a\ufffdb" and clean("\ud83d\ude00") == "😀" and clean("é") == "é"
    assert unigram().decode(unigram().encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.slow
def test_a_run_that_the_library_gives_up_on(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    """Bounded and said in words: the regex engine of `tokenizers` stops after ten million steps of one match."""
    with pytest.raises(MoaiError, match="12,000,001 characters holds too long a run without a break .* cut it"):
        tokenizer.encode(" " * 12_000_000 + "x")
    assert len(tokenizer.encode("A" * 12_000_000)) > 0  # a run of letters is no trouble for the twin
