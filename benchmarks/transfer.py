"""A model gets another tokenizer: bits per byte of held-out text of its new field, right after the transfer and after
some training, for every way to make the new rows, beside the model with the tokenizer it had.

A small base model learns general English long enough that its embedding means something. Then its tokenizer gets tokens
of financial reports (TAT-QA), in two ways: its merges are continued, or another tokenizer takes its place.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import Table, threads
from moai_llm import recipe as recipes
from moai_llm.commands.tokenizer_transfer import INITS, Transfer, find_source
from moai_llm.commands.tokenizer_transfer_check import EVERY, UNCHANGED, Trial
from moai_llm.data.prepare import prepare_texts
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.extend import extend_tokenizer
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.training.loop import train

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
GENERAL = ("en/rust_book.jsonl", "en/hf_course.jsonl", "sft/c4_demo.jsonl", "en/wikitext2_valid.txt")
FINANCE = "finance/tatqa_dev.json"
LENGTH, LR, SEEDS = 256, 1e-3, (0, 1)
BASE_ROWS, ROWS = 8, 4  # rows of a step of the base's training, and after the transfer
SIZES: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=LENGTH,
)  # fmt: skip
VOCABULARY, NEW_TOKENS = 2048, 1024
CASES = {"tied": ("continued merges", "another tokenizer"), "untied": ("continued merges",)}


def run(quick: bool = False) -> list[Table]:
    if not all((DATA / name).exists() for name in (*GENERAL, FINANCE)):
        raise SystemExit(f"this benchmark needs {', '.join((*GENERAL, FINANCE))} in {DATA}")
    base_steps, steps, seeds = (60, (5,), SEEDS[:1]) if quick else (1200, (25, 100), SEEDS)
    general, finance = general_texts(), finance_texts()
    learned = [text for i, text in enumerate(finance) if i % EVERY]  # without what is held out
    old = train_tokenizer(general, VOCABULARY)
    new = {
        "continued merges": extend_tokenizer(old, learned, VOCABULARY + NEW_TOKENS),
        "another tokenizer": train_tokenizer([*general[::4], *learned], VOCABULARY + NEW_TOKENS),
    }
    tables = []
    with threads(2), tempfile.TemporaryDirectory() as folder:
        for head, kinds in CASES.items():
            base = train_base(Path(folder) / head, old, general, base_steps, tied=head == "tied")
            for kind in kinds:
                place = Path(folder) / f"{head} {kind}"
                tables.append(compare(f"{kind}, {head} head", base, new[kind], finance, place, steps, seeds))
    return tables


def train_base(out: Path, tokenizer: Tokenizer, texts: list[str], steps: int, tied: bool) -> Path:
    """-> the run of a small model, trained on general text through the whole system."""
    prepare_texts(((text, "") for text in texts), tokenizer, out / "store", [])
    recipe = recipes.from_tree(
        {
            "model": {**SIZES, "tie_word_embeddings": tied},
            "data": {"train": str(out / "store"), "seq_len": LENGTH},
            "optim": {"lr": 2e-3},
            "schedule": {"warmup": 0.05},
            "train": {
                "out": str(out / "run"), "steps": steps, "precision": "fp32", "batch_tokens": BASE_ROWS * LENGTH,
                "micro_batch_size": BASE_ROWS, "device": "cpu",
            },
            "log": {"every": 100},
        }
    )  # fmt: skip
    train(recipe, title=f"base, {'tied' if tied else 'untied'}")
    return out / "run"


def compare(
    title: str, base: Path, new: Tokenizer, texts: list[str], folder: Path, steps: tuple[int, ...], seeds: Iterable[int]
) -> Table:
    """Bits per byte of every init and of the unchanged model, mean over the seeds."""
    transfer = Transfer(find_source(str(base)), new)
    places = ((text, "TAT-QA") for text in texts)
    trial = Trial(transfer, places, steps, folder, device="cpu", lr=LR, rows=ROWS, longest=LENGTH)
    found = {name: [trial.bits_per_byte(name, seed) for seed in seeds] for name in (UNCHANGED, *INITS)}
    mean = {name: [statistics.mean(column) for column in zip(*runs)] for name, runs in found.items()}
    columns = ("start", "at once", *(f"{n} steps" for n in steps), "per seed, at the end", "held-out tokens")
    made = sum(len(row) > 1 for row in transfer.rows)
    table = Table(f"{title}: bits per byte of financial reports, {made:,} new tokens", columns)
    print(table.title)
    for name, runs in found.items():
        cells = [f"{value:.4f}" for value in mean[name]]
        ends = ", ".join(f"{run[-1]:.4f}" for run in runs)
        table.add(name, *cells, ends, f"{trial.held_out_tokens(name):,}")
    for i, when in enumerate(columns[1:-2]):
        table.goal(f"mean, {when}, random = 1", mean["mean"][i] / mean["random"][i], at_most=1)
    return table


def general_texts() -> list[str]:
    texts = []
    for name in GENERAL:
        content = (DATA / name).read_text(encoding="utf-8")
        if name.endswith("jsonl"):
            texts += [json.loads(line)["text"] for line in content.splitlines()]
        else:  # one article after the other, each under a title of its own
            texts += re.split(r"\n(?= = [^=])", content)
    return [text for text in texts if text.strip()]


def finance_texts() -> list[str]:
    """Each report: its table, a line a row, and its paragraphs."""
    texts = []
    for report in json.loads((DATA / FINANCE).read_text(encoding="utf-8")):
        table = [" | ".join(row) for row in report["table"]["table"]]
        texts.append("\n".join(table) + "\n\n" + "\n\n".join(p["text"] for p in report["paragraphs"]))
    return texts
