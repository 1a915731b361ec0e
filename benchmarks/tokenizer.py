"""Tokenizers: training, encoding, memory and extension, beside the libraries people use.

On the shared ko/en/ja/zh text. Times are CPU-seconds of one process, all its threads together. A training candidate
counts only if its vocabulary is what it says; encodings count only if the ids are right.
"""

from __future__ import annotations

import csv
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.harness import Disagreement, Table, interleave, peak_memory
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.extend import extend_tokenizer
from moai_llm.tokenizer.sample import Sample, sample_texts
from moai_llm.tokenizer.split import O200K_SPLIT
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.tokenizer.words import WordCounts, count_words

DATA = Path(__file__).parents[2] / "shared" / "data"
LETTERS = "abcdefghijklmnopqrstuvwxyz가나다라마바사かきくけこ漢字"
LANGUAGES = ("ko", "en", "ja", "zh")
Text = dict[str, list[str]]


def run(quick: bool = False) -> list[Table]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = {language: general(language, quick) for language in LANGUAGES}
    size = 4000 if quick else 32000
    train_tokenizer(["warm the compiled code up"] * 3, 270, fewer=True)
    whole = sample_texts(texts, 10**9)
    tokenizer = train_tokenizer(whole, size)
    tables = [training(texts, whole, size, 1 if quick else 3), encoding(tokenizer, whole, 2 if quick else 5)]
    tables.append(memory(texts, size, (2, 4) if quick else (50, 500)))
    # half the size: half a megabyte of reports has not enough pairs for 19% of the whole
    return [*tables, *extension(texts, size // 2)]


def general(language: str, quick: bool) -> list[str]:
    """Documentation, books, encyclopedias and reviews of a language; the chats are kept for the extension."""
    found: list[str] = []
    for file in sorted((DATA / language).iterdir()):
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found += [row.get("text") or row.get("content") or row.get("instruction") or "" for row in rows]
        elif file.suffix == ".txt":
            found.append(file.read_text(encoding="utf-8"))
        elif file.suffix == ".json":
            found += strings(json.loads(file.read_text(encoding="utf-8")))
    return found[: 40 if quick else None]


def strings(value: Any) -> list[str]:
    """The longer strings anywhere in a JSON value, in order."""
    if isinstance(value, str):
        return [value] if len(value) > 40 else []
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in strings(child)]


def training(texts: Text, whole: Sample, size: int, rounds: int) -> Table:
    pieces = list(whole)
    fifth, fiftieth = (list(sample_texts(texts, 10**9, share=share)) for share in (0.2, 0.02))
    made: dict[str, Any] = {}

    def keep(name: str, train: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            made[name] = train()

        return call

    candidates = {
        "default: tokenizers": keep("default", lambda: train_tokenizer(pieces, size, engine="tokenizers")),
        "--fast: words, merges": keep("fast", lambda: train_tokenizer(pieces, size)),
        "--turbo: 20% of the text": keep("turbo", lambda: train_tokenizer(fifth, size, fewer=True)),
        "--ultrafast: 2% of the text": keep("ultrafast", lambda: train_tokenizer(fiftieth, size, fewer=True)),
        "--fast from saved words": keep("counts", lambda: train_tokenizer(words, size)),
        "rustbpe": keep("rustbpe", lambda: rustbpe_tokens(pieces, size)),
        "bpeasy": keep("bpeasy", lambda: bpeasy_tokens(pieces, size)),
        "sentencepiece BPE": lambda: sentencepiece(pieces, size, "bpe"),
        "sentencepiece Unigram": lambda: sentencepiece(pieces, size, "unigram"),
    }
    words = count_words(pieces)
    timings = interleave(candidates, rounds, warmup=0)
    if not made["default"].fingerprint == made["fast"].fingerprint == made["counts"].fingerprint:
        raise Disagreement("the default and --fast learned different vocabularies: nothing is measured")
    own = {made["fast"].token_bytes(i) for i in range(size - 4)}
    print(f"  tokens shared with --fast: rustbpe {len(own & made['rustbpe']):,}, bpeasy {len(own & made['bpeasy']):,}")

    text_size = sum(len(piece.encode()) for piece in pieces)
    table = Table(
        f"Training {size:,} tokens on {text_size / 1e6:.1f} MB of ko, en, ja, zh (CPU-seconds, {rounds} rounds)",
        ("trainer", "CPU-s", "times less than the default", *(f"bytes per token {label}" for label in LANGUAGES)),
    )
    print(table.title)
    base = timings["default: tokenizers"].cpu
    names = {"default: tokenizers": "default", "--fast: words, merges": "fast", "--turbo: 20% of the text": "turbo",
             "--ultrafast: 2% of the text": "ultrafast", "--fast from saved words": "counts"}  # fmt: skip
    ratios = {name: lengths(made[key], whole) for name, key in names.items()}
    for name, timing in timings.items():
        table.add(name, timing.cpu, base / timing.cpu, *ratios.get(name, ["–"] * 4))
    full, turbo = ratios["default: tokenizers"], ratios["--turbo: 20% of the text"]
    table.goal("--fast against the default", base / timings["--fast: words, merges"].cpu, at_least=3)
    table.goal("--turbo against the default", base / timings["--turbo: 20% of the text"].cpu, at_least=12)
    price = 100 * max(1 - less / most for most, less in zip(full, turbo))
    table.goal("percent of bytes per token that --turbo costs, worst language", price, at_most=2.5)
    table.goal("--fast against rustbpe", timings["rustbpe"].cpu / timings["--fast: words, merges"].cpu, at_least=1)
    return table


def lengths(tokenizer: Tokenizer, sample: Sample) -> list[Any]:
    """Bytes per token on what was held out, by language."""
    held = {label: pieces or sample.texts[label] for label, pieces in sample.held_out.items()}
    return [
        sum(len(piece.encode()) for piece in pieces) / sum(map(len, tokenizer.encode_batch(pieces)))
        for pieces in held.values()
    ]


def rustbpe_tokens(pieces: list[str], size: int) -> set[bytes]:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(pieces), size - 4, pattern=O200K_SPLIT)
    return {bytes(token) for token, _ in trainer.get_mergeable_ranks()}


def bpeasy_tokens(pieces: list[str], size: int) -> set[bytes]:
    import bpeasy

    return set(bpeasy.train_bpe(iter(pieces), O200K_SPLIT, 128, size - 4))


def sentencepiece(pieces: list[str], size: int, kind: str) -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for piece in pieces for line in piece.splitlines()), model_type=kind,
            model_prefix=str(Path(folder, "m")), vocab_size=size, num_threads=1, minloglevel=2, byte_fallback=True,
            normalization_rule_name="identity", max_sentence_length=1 << 16,
        )  # fmt: skip


def encoding(tokenizer: Tokenizer, sample: Sample, rounds: int) -> Table:
    texts = list(sample)[:: max(1, len(list(sample)) // 2000)]
    theirs = tokenizer.backend
    theirs.encode_special_tokens = True
    if [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)] != tokenizer.encode_batch(texts):
        raise Disagreement("tokenizers and the twin encode differently: nothing is measured")
    size = sum(len(text.encode()) for text in texts)
    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: tokenizer.encode_batch(texts),
        "tokenizers encode_batch": lambda: theirs.encode_batch(texts, add_special_tokens=False),
        "tokenizers encode_batch_fast": lambda: theirs.encode_batch_fast(texts, add_special_tokens=False),
    }
    timings = interleave(candidates, rounds)
    table = Table(
        f"Encoding {size / 1e6:.1f} MB, {tokenizer.vocab_size:,} tokens",
        ("encoder", "MB per CPU-second", "times our time"),
    )
    print(table.title)
    for name, timing in timings.items():
        table.add(name, size / 1e6 / timing.cpu, timing.cpu / timings["ours"].cpu)
    table.goal("ours against tokenizers", timings["tokenizers encode_batch"].cpu / timings["ours"].cpu, at_least=4)
    return table


def memory(texts: Text, size: int, megabytes: tuple[int, int]) -> Table:
    """Peak memory of `moai tokenizer train` and `extend` from streams of two lengths."""
    budget = min(megabytes) * 950_000  # the default for 32,000 tokens; below the shorter stream
    table = Table(
        "Peak memory of training from a stream (MB beside the interpreter)",
        ("", *(f"{m} MB of text" for m in megabytes)),
    )
    print(table.title)

    def train(megabytes: int, engine: str) -> Callable[[], Any]:
        streams = {label: varied(documents, megabytes * 10**6 // 4) for label, documents in texts.items()}
        return lambda: train_tokenizer(sample_texts(streams, budget), size, engine=engine, fewer=True)  # type: ignore[arg-type]

    def count(megabytes: int) -> Callable[[], Any]:
        def call() -> None:
            words = WordCounts()
            sample_texts(
                {label: varied(documents, megabytes * 10**6 // 4) for label, documents in texts.items()}, None,
                sink=words.add,
            )  # fmt: skip
            train_tokenizer(words, size, fewer=True)

        return call

    candidates = {"default: tokenizers": lambda m: train(m, "tokenizers"), "--fast": lambda m: train(m, "words"),
                  "all words counted, as extend does (bounded)": count}  # fmt: skip
    for name, make in candidates.items():
        peaks = [peak_memory(make(m)) / 1e6 for m in megabytes]
        table.add(name, *peaks)
        if make is not count:  # its table of words grows, up to a bound
            what = f"{name}: {megabytes[1]} MB against {megabytes[0]} MB"
            table.goal(what, peaks[1] / peaks[0], at_most=1.15)
    return table


def varied(documents: list[str], size: int) -> Iterator[str]:
    """Documents again and again until so many bytes have passed, each time with other numbers and some new words."""
    rng, passed, turn = random.Random(0), 0, 0
    while passed < size:
        table = str.maketrans("0123456789", "".join(rng.sample("0123456789", 10)))
        for document in documents:
            text = document
            if turn:
                new = "".join(rng.choices(LETTERS, k=rng.randint(3, 9)))
                text = document.translate(table).replace("the", new, 3).replace("이", new, 3).replace("の", new, 3)
            passed += len(text.encode())
            yield text
            if passed >= size:
                return
        turn += 1


def extension(texts: Text, size: int) -> list[Table]:
    """Continued BPE on finance reports and on Korean chats, each beside its most frequent words as added tokens."""
    whole = sample_texts(texts, 10**9)
    base = train_tokenizer(whole, size, fewer=True)
    reports = json.loads((DATA / "finance" / "tatqa_dev.json").read_text(encoding="utf-8"))
    with (DATA / "ko" / "ChatbotData.csv").open(encoding="utf-8") as file:
        chats = ["\n".join(row[:2]) for row in csv.reader(file)]
    random.Random(0).shuffle(chats)
    domains = {"finance en (TAT-QA)": ["\n".join(strings_of_report(report)) for report in reports],
               "chat ko (ChatbotData)": chats}  # fmt: skip
    return [extend_on(label, documents, base, whole.held_out) for label, documents in domains.items()]


def extend_on(domain: str, documents: list[str], base: Tokenizer, general: Text) -> Table:
    learn = [document for i, document in enumerate(documents) if i % 10]
    extended = extend_tokenizer(base, learn, base.vocab_size * 119 // 100, fewer=True)
    control = with_added_words(base, learn, extended.vocab_size - base.vocab_size)
    table = Table(
        f"Extending {base.vocab_size:,} tokens by {extended.vocab_size - base.vocab_size:,} "
        f"({extended.vocab_size / base.vocab_size - 1:+.0%}) on {sum(len(t.encode()) for t in learn) / 1e6:.1f} MB: "
        f"{domain}",
        ("held-out text", "tokens before", "continued BPE", "added tokens", "lossless", "lossless, added tokens"),
    )
    print(table.title)
    changes: list[tuple[float, float]] = []
    for label, held in {domain: documents[::10], **{f"general {k}": v for k, v in general.items() if v}}.items():
        old, new_ids = count(base.encode_batch(held)), extended.encode_batch(held)
        added = [encoded.ids for encoded in control.encode_batch(held, add_special_tokens=False)]
        changes.append((count(new_ids) / old - 1, count(added) / old - 1))
        decoded = ([extended.decode(ids) for ids in new_ids], control.decode_batch(added, skip_special_tokens=False))
        back = [sum(map(str.__eq__, texts, held)) for texts in decoded]
        table.add(label, f"{old:,}", *(f"{c:+.1%}" for c in changes[-1]), *(f"{b:,} of {len(held):,}" for b in back))
    table.goal(f"percent of tokens saved, {domain}", -100 * changes[0][0], at_least=15)
    ours, theirs = (100 * max(change) for change in zip(*changes[1:]))
    table.goal("percent of tokens more on general text, worst language", ours, at_most=0)
    table.goal("the same for added tokens, the control", theirs, at_least=0)
    return table


def with_added_words(base: Tokenizer, texts: list[str], how_many: int) -> tokenizers.Tokenizer:
    """The base with the most frequent words of the texts as added tokens."""
    backend = tokenizers.Tokenizer.from_str(base.backend.to_str())
    frequent = sorted(count_words(texts).items(), key=lambda item: -item[1])
    spelled = (word.decode("utf-8", "ignore") for word, _ in frequent)
    whole = (word for word in dict.fromkeys(spelled) if word.strip() and len(base.encode(word)) > 1)
    backend.add_tokens(list(islice(whole, how_many)))
    return backend


def strings_of_report(report: dict[str, Any]) -> Iterable[str]:
    yield from (paragraph["text"] for paragraph in report["paragraphs"])
    yield from (" ".join(map(str, row)) for row in report["table"]["table"])
    yield from (question["question"] for question in report["questions"])


def count(ids: Iterable[list[int]]) -> int:
    return sum(map(len, ids))
