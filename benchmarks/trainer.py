"""The whole loop: tokens/s of `moai train` beside transformers' Trainer, on the same Qwen3, the same rows and updates.

Both read rows of the same prepared store, in the same order, and run everything that a run runs: reading, forward and
backward of two micro-batches, clipping, the optimizer, logging. A round is a short run of each candidate from the same
weights; timed are its steps from the third on, so neither set-up nor checkpoints count. What is compared is the time
of the CPUs, which other work on the machine does not move. The rows hold several documents;
Trainer is told where they begin by `position_ids`. `documents mixed` is Trainer without them, which computes something
else and needs no mask: the rows as run_clm.py has them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import models
from benchmarks.harness import Disagreement, Table, Timing, threads
from moai_llm import recipe as recipes
from moai_llm.data.loader import Loader
from moai_llm.data.prepare import prepare_texts
from moai_llm.data.shards import Store
from moai_llm.runtime import has_fast_bf16
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.training.events import read_metrics
from moai_llm.training.loop import train

TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "en" / "tinyshakespeare.txt"
ROWS, MICRO, LENGTH, VOCAB, WARM_UP = 4, 2, 512, 8192, 2
Spent = tuple[float, float]  # seconds of a step: wall, CPU


class Clock:
    """Called at the end of each step."""

    def __init__(self) -> None:
        self.times: list[Spent] = []

    def tick(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[Spent]:
        pairs = list(zip(self.times, self.times[1:]))[WARM_UP - 1 :]
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def run(quick: bool = False) -> list[Table]:
    if not TEXT.exists():
        raise SystemExit(f"this benchmark trains on tiny Shakespeare, which is not at {TEXT}")
    rounds, steps = (1, 3) if quick else (5, 6)
    with threads(2), tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        documents = prepare_data(work)
        candidates: dict[str, Callable[[Clock, int], float]] = {}
        for precision in ("fp32", "bf16") if has_fast_bf16(torch.device("cpu")) else ("fp32",):
            candidates[f"moai train, {precision}"] = lambda c, n, p=precision: ours(work, c, n, p)
            candidates[f"Trainer, {precision}"] = lambda c, n, p=precision: theirs(work, c, n, bf16=p == "bf16")
            if precision != "fp32":
                candidates[f"Trainer, {precision}, documents mixed"] = (
                    lambda c, n: theirs(work, c, n, bf16=True, apart=False)
                )  # fmt: skip
        candidates["moai train, defaults"] = lambda c, n: ours(work, c, n, None)
        candidates["Trainer, defaults"] = lambda c, n: theirs(work, c, n)
        timings = interleave(candidates, rounds, steps)
    title = f"Qwen3, 12.6M parameters, vocabulary 8k, {ROWS} x {LENGTH} tokens a step in two micro-batches, "
    columns = ("loop", "tokens/s", "ms (wall)", "ms (CPU)", "CPU time, moai train in this precision = 1")
    table = Table(title + f"rows of {documents:.1f} documents", columns)
    for name, t in timings.items():
        mine = timings[f"moai train, {name.split(', ')[1]}"]
        table.add(name, ROWS * LENGTH / t.wall, t.wall * 1e3, t.cpu * 1e3, t.cpu / mine.cpu)
    for name, t in timings.items():
        if name.startswith("Trainer"):
            mine = timings[f"moai train, {name.split(', ')[1]}"]
            table.goal(f"moai train against {name}, CPU time", t.cpu / mine.cpu, 1.15)
    return [table]


def interleave(candidates: dict[str, Callable[[Clock, int], float]], rounds: int, steps: int) -> dict[str, Timing]:
    """Steps of every candidate, each round one run of each. Those that compute the same have the same first loss.

    Raises:
        Disagreement: they do not.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in candidates}
    first: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in candidates.items():
            clock = Clock()
            first[name] = call(clock, steps)
            spent[name] += clock.steps()
    truth = first["moai train, fp32"]
    for name, loss in first.items():
        if "mixed" not in name and abs(loss - truth) > (1e-4 if "fp32" in name else 1e-2) * truth:
            raise Disagreement(f"the first loss of {name} is {loss}, that of moai train in fp32 {truth}")
    return {name: Timing(*zip(*pairs)) for name, pairs in spent.items()}


def prepare_data(work: Path) -> float:
    """A store, a model of either kind with the same weights, and the mean number of documents in a row."""
    texts = TEXT.read_text(encoding="utf-8").split("\n\n")
    speeches = ["\n\n".join(texts[i : i + 6]) for i in range(0, len(texts), 6)]
    tokenizer = train_tokenizer(speeches, VOCAB)
    prepare_texts(((text, "") for text in speeches), tokenizer, work / "store", [])
    native = models.qwen3(tokenizer.padded_vocab_size)
    native.save_pretrained(work / "native")
    models.ours(native).save_pretrained(tokenizer.save(work / "ours"))
    rows = Loader(Store(work / "store"), LENGTH, 0, step_rows=ROWS).rows(0, 64)
    return float((rows["seq_idx"].amax(1) + 1).float().mean())


def ours(work: Path, clock: Clock, steps: int, precision: str | None) -> float:
    """A run by the recipe; the loss of its first step."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    recipe = recipes.from_tree(
        {
            "data": {"train": str(work / "store"), "seq_len": LENGTH},
            "optim": {"lr": 1e-4, "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup": 0},
            "train": {
                "out": str(out), "init_from": str(work / "ours"), "steps": steps + 1, "device": "cpu",
                "batch_tokens": ROWS * LENGTH, "micro_batch_size": MICRO,
                **({} if precision is None else {"precision": precision}),
            },
            "eval": {"every": 1},  # when the hook is called: it only looks at the clock
        }
    )  # fmt: skip

    def hook(step: int, model: Any) -> dict[str, float]:
        if step <= steps:  # the last one is called after the checkpoint
            clock.tick()
        return {}

    train(recipe, hooks=[hook], quiet=True)
    return next(row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row)


class Packed(torch.utils.data.Dataset):
    """The rows of a run, in their order."""

    def __init__(self, store: Path, rows: int, apart: bool) -> None:
        batch = Loader(Store(store), LENGTH, 0, step_rows=ROWS).rows(0, rows)
        self.columns = {key: batch[key] for key in ("input_ids", "labels", *(["position_ids"] if apart else []))}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: column[i] for key, column in self.columns.items()}


class Sequential(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def theirs(work: Path, clock: Clock, steps: int, *, bf16: bool | None = None, apart: bool = True) -> float:
    """A run of Trainer; with `bf16` None by its own defaults but for sizes and learning rate."""
    model = transformers.Qwen3ForCausalLM.from_pretrained(work / "native", dtype=torch.float32)
    set_up: dict[str, Any] = {} if bf16 is None else {
        "bf16": bf16, "optim": "adamw_torch_fused", "adam_beta2": 0.95, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "trainer"), max_steps=steps, per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ROWS // MICRO, learning_rate=1e-4, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_first_step=True, logging_steps=10, **set_up,
    )  # fmt: skip

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    made = Sequential(model, arguments, train_dataset=Packed(work / "store", steps * ROWS, apart), callbacks=[Ticks()])
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    return next(row["loss"] for row in made.state.log_history if "loss" in row)
