"""Small tokenizers of other kinds, as the `tokenizers` library makes them: BERT's, Llama's, T5's, and older BPE."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["hello world, the bank pays interest on the deposit 3.14", "이자는 은행이 냅니다", "the cat sat on the mat"] * 9


def wordpiece() -> tokenizers.Tokenizer:
    """Lower-cases, drops accents and white space: what it reads it cannot give back."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2: characters and merges, and a byte where a character is unknown."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁h", "he", "▁he", "가"]
    made = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("▁", "h"), ("h", "e"), ("▁h", "e")], unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>"])
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<pad>", "<unk>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def word_ends() -> tokenizers.Tokenizer:
    """BPE whose tokens say where a word ends, as the first GPT had it."""
    words = {"<unk>": 0, "h": 1, "i": 2, "i</w>": 3, "hi</w>": 4}
    made = tokenizers.Tokenizer(
        models.BPE(words, [("h", "i</w>")], unk_token="<unk>", end_of_word_suffix="</w>")
    )  # fmt: skip
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    return made


def speechless() -> tokenizers.Tokenizer:
    """Knows one word, and raises at any other."""
    made = tokenizers.Tokenizer(models.WordLevel({"hello": 0}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def saved(made: tokenizers.Tokenizer, directory: Path) -> Path:
    """A directory with its tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return directory
