"""Learning is right, not only running: held-out loss on tiny Shakespeare at equal steps and hyper-parameters.

Our dense model goes through the whole system (tokenizer, store, packing, `train`, checkpoint); the baseline is
transformers' Qwen3 of the same size with its own initialisation in a loop of twenty lines that shares nothing with ours
but the rows. The Mamba and hybrid twins are shown beside them.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks.harness import Table, threads
from moai_llm import recipe as recipes
from moai_llm.data.loader import Batch, Loader
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.inference import load_model
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.training.loop import train

TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "en" / "tinyshakespeare.txt"
ROWS, LENGTH, LR, SEEDS = 8, 256, 2e-3, (0, 1)
SIZES: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=LENGTH, tie_word_embeddings=True,
)  # fmt: skip
MIXERS = {
    "dense": {},
    "mamba": {"layer_types": ["linear_attention"], "mlp_layer_types": ["none"], "num_hidden_layers": 8},
    "hybrid": {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
}


def run(quick: bool = False) -> list[Table]:
    if not TEXT.exists():
        raise SystemExit(f"this benchmark trains on tiny Shakespeare, which is not at {TEXT}")
    steps, seeds = (20, SEEDS[:1]) if quick else (200, SEEDS)
    with threads(2), tempfile.TemporaryDirectory() as folder:
        prepare_data(Path(folder))
        losses = {f"ours, {name}": [ours(name, Path(folder), steps, seed) for seed in seeds] for name in MIXERS}
        losses["transformers Qwen3"] = [baseline(Path(folder), steps, seed) for seed in seeds]
    table = Table(
        f"Held-out loss after {steps} steps of {ROWS} x {LENGTH} tokens, mean of {len(seeds)} seeds, fp32",
        ("model", "parameters", "nats per token", "per seed"),
    )
    print(table.title)
    for name, found in losses.items():
        values = [loss for _, loss in found]
        cells = f"{statistics.mean(values):.4f}", ", ".join(f"{value:.4f}" for value in values)
        table.add(name, f"{found[0][0]:,}", *cells)
    mine, theirs = (statistics.mean(loss for _, loss in losses[name]) for name in ("ours, dense", "transformers Qwen3"))
    table.goal("dense loss, baseline = 1", mine / theirs, at_most=1.01)
    return [table]


def prepare_data(folder: Path) -> None:
    text = TEXT.read_text(encoding="utf-8")
    border = text.rindex("\n\n", 0, int(0.9 * len(text)))
    tokenizer = train_tokenizer([text[:border]], vocab_size=512)
    tokenizer.save(folder / "tokenizer")
    for name, part in {"train": text[:border], "valid": text[border:]}.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
        prepare([folder / f"{name}.txt"], tokenizer, folder / name)


def ours(name: str, folder: Path, steps: int, seed: int) -> tuple[int, float]:
    """-> parameters, held-out loss of a run through the whole system."""
    recipe = recipes.from_tree(
        {
            "model": {**SIZES, **MIXERS[name]},
            "data": {"train": str(folder / "train"), "seq_len": LENGTH},
            "optim": {"lr": LR},
            "schedule": {"name": "cosine", "warmup": 0.05},
            "train": {
                "out": str(folder / f"{name}-{seed}"), "steps": steps, "seed": seed, "precision": "fp32",
                "batch_tokens": ROWS * LENGTH, "micro_batch_size": ROWS,
            },
        }
    )  # fmt: skip
    checkpoint = train(recipe, title=f"{name}, seed {seed}", quiet=True).checkpoint
    return measured(load_model(checkpoint, device="cpu", dtype="fp32").model, folder, f"ours, {name}, seed {seed}")


def baseline(folder: Path, steps: int, seed: int) -> tuple[int, float]:
    store = Store(folder / "train")
    torch.manual_seed(seed)
    vocab_size = store.tokenizer().padded_vocab_size
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=vocab_size, **SIZES)).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    warmup = round(0.05 * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loader = Loader(store, LENGTH, seed)
    for step in range(steps):
        batch = loader.rows(step * ROWS, ROWS)
        loss = sum_of_losses(model, batch) / (batch["labels"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return measured(model, folder, f"transformers Qwen3, seed {seed}")


def measured(model: Any, folder: Path, name: str) -> tuple[int, float]:
    loss = held_out(model, folder)
    print(f"  {name}: {loss:.4f}", flush=True)
    return sum(p.numel() for p in model.parameters()), loss


def sum_of_losses(model: Any, batch: Batch) -> torch.Tensor:
    """The rows are pieces of one long text, so no row holds two documents."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def held_out(model: Any, folder: Path) -> float:
    """Nats per token of the last tenth of the text."""
    model.eval()
    batches: Iterator[Batch] = Loader(Store(folder / "valid"), LENGTH, seed=None).epoch(ROWS)
    nats = targets = 0.0
    for batch in batches:
        nats += float(sum_of_losses(model, batch))
        targets += float((batch["labels"][:, 1:] != -100).sum())
    return nats / targets
