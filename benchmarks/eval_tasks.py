"""Benchmark tasks through our adapter and through lm-eval's own, and perplexity in batches and a window at a time.

The same weights in our bricks and in transformers' Qwen3, the same tasks from local files, the same few-shot examples;
the two must agree on every answer before anything is measured. Needs the files of `moai eval tasks` in a folder:
`MOAI_EVAL_DATA`, or `shared/data/eval` beside the repository.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import models
from benchmarks.harness import Disagreement, Table, threads
from moai_llm.data.embedded import library_texts
from moai_llm.evaluation.harness import adapter, offline_and_quiet
from moai_llm.evaluation.perplexity import evaluate, measure
from moai_llm.evaluation.task_files import load_tasks
from moai_llm.inference import TextModel
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import train_tokenizer

VOCABULARY, CONTEXT = 8192, 4096
TASKS = ("mmlu_anatomy", "arc_challenge", "hellaswag", "truthfulqa_mc2", "lambada")
BATCH = 8  # rows of lm-eval's adapter; it takes no other measure


def run(quick: bool = False) -> list[Table]:
    data = Path(os.environ.get("MOAI_EVAL_DATA") or Path(__file__).parents[2] / "shared" / "data" / "eval")
    if not data.is_dir():
        raise SystemExit(f"{data}: no such folder; MOAI_EVAL_DATA names the one with mmlu.jsonl and the others")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    texts = [text for text, _ in library_texts()]
    tokenizer = train_tokenizer(texts[:400], VOCABULARY, fewer=True)
    with threads(2), tempfile.TemporaryDirectory() as folder:
        native = models.qwen3(tokenizer.vocab_size, max_position_embeddings=CONTEXT).eval()
        with torch.no_grad():  # answers that differ clearly
            for parameter in native.parameters():
                parameter.mul_(2.0)
        text_model = TextModel(models.ours(native).eval(), tokenizer, Path())
        tokenizer.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        lines = [line for text in texts[::40] for line in text.split("\n") if len(line) > 20]
        documents = sorted(texts, key=len)
        return [
            tasks(text_model, native, theirs, data, quick),
            perplexity("long documents", text_model, tokenizer, documents[:: 240 if quick else 160], quick),
            perplexity("single lines", text_model, tokenizer, lines[:: 60 if quick else 12], quick),
        ]


def tasks(text_model: TextModel, native: Any, tokenizer: Any, data: Path, quick: bool) -> Table:
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=native, tokenizer=tokenizer, batch_size=BATCH, max_length=CONTEXT)
    mine = adapter(text_model)
    parameters = sum(p.numel() for p in native.parameters()) / 1e6
    limit = 2 if quick else 10
    title = f"Tasks, {limit} documents each, dense model of {parameters:.0f} M parameters, fp32, 2 threads, CPU-seconds"
    table = Table(title, ("task", "examples", "ours", "lm-eval's HFLM", "times faster", "largest relative difference"))
    print(title)
    ratios = {}
    for loaded in load_tasks(list(TASKS), data):
        taken, said = {}, {}
        for name, lm in (("ours", mine), ("peer", peer)):
            _answers(lm, loaded, 1)  # what is built on first use
            loaded.task.set_fewshot_seed(1234)
            taken[name], said[name] = _timed(lambda lm=lm, loaded=loaded: _answers(lm, loaded, limit))  # type: ignore[misc]
        apart = float(np.max(np.abs(said["ours"] - said["peer"]) / np.maximum(1, np.abs(said["peer"]))))
        if apart > 1e-4:  # fp32
            raise Disagreement(f"{loaded.name}: answers differ by {apart:.1e}")
        ratios[loaded.name] = taken["peer"] / taken["ours"]
        shots = loaded.task.get_config("num_fewshot")
        table.add(loaded.name, str(shots), taken["ours"], taken["peer"], ratios[loaded.name], f"{apart:.1e}")
    table.goal("multiple choice with examples, the least of three", min(ratios[n] for n in TASKS[:3]), 2.0)
    table.goal("one answer a document (LAMBADA)", ratios["lambada"], 0.9)
    return table


def _answers(lm: Any, loaded: Any, limit: int) -> np.ndarray:
    from lm_eval.evaluator import evaluate as evaluate_task

    with offline_and_quiet():
        found = evaluate_task(lm, {"tasks": {loaded.name: loaded.task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    assert found is not None
    return np.array([answer[0][0] for sample in found["samples"][loaded.name] for answer in sample["resps"]])


def perplexity(name: str, text_model: TextModel, tokenizer: Tokenizer, texts: list[str], quick: bool) -> Table:
    encoded = [ids for ids in (tokenizer.encode(text) for text in texts) if len(ids) > 1]
    window, count = 512, sum(map(len, encoded))

    def one_at_a_time() -> float:
        pieces = [torch.tensor([ids[i : i + window]]) for ids in encoded for i in range(0, len(ids), window)]
        batches = ({"input_ids": piece, "labels": piece} for piece in pieces if piece.shape[1] > 1)
        return evaluate(text_model.model, batches, tokenizer).nats

    def in_batches(stride: int | None = None) -> float:
        return sum(d.found.nats for d in measure(text_model, ((t, None) for t in texts), window=window, stride=stride))

    title = f"Perplexity of {len(encoded):,} {name}, {count:,} tokens, windows of {window}, CPU-seconds"
    table = Table(title, ("", "CPU-seconds", "tokens per CPU-second"))
    print(title)
    runs: dict[str, Callable[[], float]] = {
        "a window at a time": one_at_a_time, "in batches": in_batches,
    }  # fmt: skip
    if count > window * len(encoded):
        runs["in batches, --stride 256"] = lambda: in_batches(256)
    rounds, found = (1 if quick else 3), dict[str, list[float]]()
    nats = {}
    for _ in range(rounds):
        for way, go in runs.items():
            seconds, nats[way] = _timed(go)
            found.setdefault(way, []).append(seconds)
    if abs(nats["in batches"] / nats["a window at a time"] - 1) > 1e-6:
        raise Disagreement(f"in batches {nats['in batches']}, one at a time {nats['a window at a time']}")
    middle = {way: float(np.median(seconds)) for way, seconds in found.items()}
    for way, seconds in middle.items():
        table.add(way, seconds, count / seconds)
    table.goal(
        f"{name}: in batches against a window at a time", middle["a window at a time"] / middle["in batches"], 1.0
    )
    return table


def _timed(go: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    found = go()
    return time.process_time() - begun, found
