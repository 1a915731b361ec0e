"""Published encodings by name or file: tiktoken's ids, control tokens behind the last id, clear words where the file is
missing or damaged.
"""

from __future__ import annotations

import base64
import hashlib
import random
import shutil
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from moai_llm import get_config
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.byte_level import unspell
from moai_llm.tokenizer.chat import can_chat, render
from moai_llm.tokenizer.names import ENCODINGS, convert, read_ranks
from moai_llm.tokenizer.split import CL100K_SPLIT
from tests.conftest import shared_data
from tests.tokenizer.test_twin import HARD

TEXT = "Interest 이자 利子 利息 it's 12345  \n\n\tdef f():  'ſ <|im_end|><|endoftext|> 👩‍👩‍👧‍👦"


def key(name: str) -> str:
    """What a file is called in tiktoken's cache."""
    return hashlib.sha1(ENCODINGS[name].url.encode()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of tiktoken, and no network."""
    import tiktoken.load

    def offline(url: str) -> bytes:
        raise ConnectionError(f"no route to {url}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return tmp_path


def test_o200k_ids(o200k: Tokenizer) -> None:
    assert o200k.special_ids == {
        "<|endoftext|>": 199999,
        "<|endofprompt|>": 200018,
        "<|pad|>": 200019,
        "<|im_start|>": 200020,
        "<|im_end|>": 200021,
    }
    assert len(o200k) == o200k.vocab_size == 200022
    assert o200k.padded_vocab_size == 200064 == get_config("blues-01").vocab_size
    assert o200k.eos_id == 199999 and o200k.pad_id == 200019 and o200k.stop_ids == [199999, 200021]
    assert can_chat(o200k) and render(o200k, [{"role": "user", "content": "hi"}]).ids[0] == 200020
    holes = [199998, *range(200000, 200018), *range(200022, 200064)]
    assert o200k.decode([*holes, *o200k.encode("a")]) == "a" and not o200k.byte_lengths()[holes].any()
    assert o200k.decode([199999, 200021]) == "<|endoftext|><|im_end|>"
    assert o200k.decode([199999, 200021], skip_special=True) == ""


def test_o200k_is_tiktokens_o200k(o200k: Tokenizer, cache: Path, real_documents: list[str]) -> None:
    shutil.copy(shared_data("tokenizers/o200k_base.tiktoken"), cache / key("o200k_base"))
    theirs = tiktoken.get_encoding("o200k_base")
    generator = random.Random(1)
    noise = [generator.randbytes(generator.randrange(1, 80)).decode("utf-8", "replace") for _ in range(10_000)]
    for text in [*HARD, TEXT, *noise, *real_documents]:
        ids = o200k.encode(text)
        assert ids == theirs.encode_ordinary(text), text
        assert o200k.decode(ids) == text


def test_o200k_on_disk(o200k: Tokenizer, tmp_path: Path, real_documents: list[str]) -> None:
    """transformers reads what we write, with the same ids."""
    theirs = AutoTokenizer.from_pretrained(o200k.save(tmp_path))
    plain = [text for text in real_documents if "<|" not in text]  # transformers reads names of control tokens as such
    texts = [*HARD[:-2], *random.Random(0).sample(plain, 2000)]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == o200k.encode_batch(texts)
    assert theirs.pad_token_id == o200k.pad_id and theirs.eos_token_id == o200k.eos_id
    talk = [{"role": "user", "content": "이자?"}, {"role": "assistant", "content": "돈"}]
    assert theirs.apply_chat_template(talk, return_dict=True)["input_ids"] == render(o200k, talk).ids


def test_gpt2_is_r50k(cache: Path, real_documents: list[str]) -> None:
    """GPT-2's merges file holds the same as r50k_base.tiktoken, to the byte."""
    lines = shared_data("tokenizers/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [bytes([i]) for i in [*printable, *(i for i in range(256) if i not in printable)]]
    tokens += [unspell(line.replace(" ", "")) or b"" for line in lines]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    assert hashlib.sha256(content).hexdigest() == ENCODINGS["r50k_base"].sha256
    (cache / key("gpt2")).write_bytes(content)
    ours, theirs = load_tokenizer("gpt2"), tiktoken.get_encoding("r50k_base")
    assert load_tokenizer("r50k_base").fingerprint == ours.fingerprint
    assert ours.eos_id == 50256 and ours.pad_id == 50257 and ours.padded_vocab_size == 50304
    assert ours._twin is not None
    for text in [*HARD, TEXT, *real_documents[::5]]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert [ours.encode(text) for text in HARD] == [ours._plain.encode(text).ids for text in HARD]


def test_a_small_encoding_with_holes() -> None:
    """As cl100k_base has them, whose file is not here."""
    ranks = {bytes([(i + 33) % 256]): i for i in range(256)} | {b"ab": 256, b"  ": 257, b"abab": 258}
    special = {"<|endofprompt|>": 300, "<|endoftext|>": 260}
    loaded = Tokenizer(convert(ranks, CL100K_SPLIT, special), {})
    theirs = tiktoken.Encoding("x", pat_str=CL100K_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    assert loaded.special_tokens == ["<|endoftext|>", "<|endofprompt|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert list(loaded.special_ids.values()) == [260, 300, 301, 302, 303] and len(loaded) == 304
    for text in HARD:
        assert loaded.encode(text) == theirs.encode_ordinary(text) == loaded._plain.encode(text).ids
    assert loaded.decode([259, 256, 299]) == "ab"


def test_tiktokens_own_pattern_of_cl100k_splits_alike() -> None:
    """Ours is the published form; tiktoken's is rewritten for speed in a way only its engine reads so."""
    from tiktoken_ext import openai_public

    source = Path(openai_public.__file__).read_text(encoding="utf-8")
    pattern = source.split('"name": "cl100k_base"')[1].split('r"""')[1].split('"""')[0]
    ranks = {bytes([i]): i for i in range(256)} | {b"  ": 256, b"    ": 257, b"\n\n": 258, b" \n": 259, b"12": 260}
    a, b = (
        tiktoken.Encoding("x", pat_str=p, mergeable_ranks=ranks, special_tokens={}) for p in (pattern, CL100K_SPLIT)
    )
    for text in [*HARD, TEXT, "1234 12  \n\n  \n x    "]:
        assert a.encode_ordinary(text) == b.encode_ordinary(text)


def test_offline(cache: Path) -> None:
    with pytest.raises(MoaiError, match=r"cl100k_base is not on this machine .*PATH/cl100k_base.tiktoken") as error:
        load_tokenizer("cl100k_base")
    assert "TIKTOKEN_CACHE_DIR" in str(error.value) and key("cl100k_base") in str(error.value)
    (cache / key("cl100k_base")).write_bytes(b"cut short")
    with pytest.raises(MoaiError, match="could not be fetched"):
        load_tokenizer("cl100k_base")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match="cannot be read: No such file"):
        load_tokenizer(tmp_path / "o200k_base.tiktoken")
    (tmp_path / "o200k_base.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(MoaiError, match=r"not the published o200k_base \(its sha256 is .* damaged or cut short"):
        load_tokenizer(tmp_path / "o200k_base.tiktoken")
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(
        MoaiError, match=r"known here \(cl100k_base.tiktoken, o200k_base.tiktoken, r50k_base.tiktoken\)"
    ):
        load_tokenizer(str(tmp_path / "qwen.tiktoken"))
    assert read_ranks(b"IQ== 0\nIg== 1\n") == {b"!": 0, b'"': 1}


def test_a_folder_of_that_name_comes_first(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.save("o200k_base")
    assert load_tokenizer("o200k_base").fingerprint == tokenizer.fingerprint


def test_a_name_that_is_nearly_known() -> None:
    with pytest.raises(MoaiError, match=r"o200k-base: no tokenizer.json there \(did you mean 'o200k_base'\?\)"):
        load_tokenizer("o200k-base")
