"""Unigram tokenizers (Kudo 2018, arXiv:1804.10959), trained by sentencepiece from the same table of words.

Lossless where sentencepiece's defaults are not: no normalisation, spaces are ordinary characters, and a character
outside the vocabulary is spelled in bytes. Slower to train than BPE, and slower to encode: there is no tiktoken twin.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from moai_llm.runtime import MoaiError, require
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.split import O200K_SPLIT
from moai_llm.tokenizer.train import SPECIAL_TOKENS, check_vocab_size, with_special_tokens
from moai_llm.tokenizer.words import WordCounts

UNKNOWN = "<unk>"
META_SPACE = "\u2581"  # how sentencepiece writes a space


def train_unigram(
    words: WordCounts, vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS, seed: int = 0
) -> Tokenizer:
    """Learn a Unigram vocabulary. Ids: 256 bytes, `<unk>` (never emitted), pieces by score, special tokens.

    Raises:
        MoaiError: sentencepiece is missing, no text, or a vocabulary that does not fit the text.
    """
    sentencepiece = require("sentencepiece", "unigram")
    pieces = check_vocab_size(vocab_size, special_tokens) - 1
    if len(words) == 0:
        raise MoaiError("the tokenizer got no text: the sources are empty")
    if pieces < 1:
        raise MoaiError(f"vocab_size {vocab_size} leaves no room for pieces beside the bytes and special tokens")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "words.tsv")
        with table.open("w", encoding="utf-8", newline="") as out:
            for word, count in words.items():
                text = word.decode("utf-8", "replace")
                if not set("\t\r\n\0" + META_SPACE) & set(text):  # these would be read as something else
                    out.write(f"{text}\t{count}\n")
        sentencepiece.set_random_generator_seed(seed)
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(table), input_format="tsv", model_prefix=str(Path(folder, "unigram")), model_type="unigram",
                vocab_size=pieces + 257, byte_fallback=True, character_coverage=0.9999, hard_vocab_limit=True,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                split_by_unicode_script=False, split_by_number=False, split_by_whitespace=False, split_digits=False,
                max_sentencepiece_length=32, max_sentence_length=1 << 20, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0,
                num_threads=1, minloglevel=2,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            most = re.search(r"value <= (\d+)", str(error))
            what = f"{len(words):,} distinct words do not give {vocab_size} Unigram tokens"
            if most is None:
                raise MoaiError(f"{what}: sentencepiece says {error}") from None
            supported = vocab_size - (pieces + 257 - int(most[1]))
            raise MoaiError(f"{what}: use --vocab-size {supported} or less, or more text") from None
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "unigram.model")))
    scored = [(model.id_to_piece(i), model.get_score(i)) for i in range(257, model.vocab_size())]
    lowest = min((score for _, score in scored), default=0.0)
    # bytes and <unk> score below every piece, so they are taken only where no piece fits
    vocabulary = [(f"<0x{byte:02X}>", lowest - 10.0) for byte in range(256)] + [(UNKNOWN, lowest - 20.0)]
    vocabulary += [(piece.replace(META_SPACE, " "), score) for piece, score in scored]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=256, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(O200K_SPLIT), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return with_special_tokens(backend, special_tokens)
